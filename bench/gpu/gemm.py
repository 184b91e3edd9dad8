"""Matrix products and the small ops of a decoder layer on a GPU, beside cuBLAS, torch and the measured ceilings.

    python -m bench.gpu.gemm [--quick] [--tune] [--only linear gated add fp8 small head sampling]

Knows shapes of real layers and what each op has to move or multiply; does not know the engine. Every cell is checked before
it is timed, and a row of each product is compared bit for bit with itself alone (`same_bits`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from bench.gpu.cells import DEVICE, Call, normal, race, report, results
from bench.gpu.harness import ceilings, end, guarded, num_copies, require_gpu, save, table
from bench.gpu.small import bench_head, bench_sampling, bench_small
from uma_kernels import activation
from uma_kernels.check import TILE_ROWS
from uma_kernels.linear import FP8, linear, pack
from uma_kernels.linear import triton_gated as gated
from uma_kernels.linear import triton_kernel as gemm
from uma_kernels.linear.triton_kernel import Tile
from uma_kernels.testing import assert_reduction

LAYERS = {  # (N, K) of each product of a layer
    "0.6B": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "1.7B": {"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (12288, 2048), "down": (2048, 6144)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "llama-8B": {"gate_up": (28672, 4096), "down": (4096, 14336)},
}


def check_product(ours: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Against fp32, at a few rows: within what rounding the result to 16 bits allows."""
    rows = torch.linspace(0, x.shape[0] - 1, min(8, x.shape[0]), device=x.device).long()
    true = F.linear(x[rows].double(), w.double())
    library = F.linear(x[rows], w)
    assert_reduction(ours[rows], library, true, torch.bfloat16)


def operands(tokens: int, rows: int, width: int, moved: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """x and w, as many as have to take turns; x with memory for a whole tile, as the engine's own ops allot it."""
    sets = range(num_copies(moved))
    weights = [normal(rows, width) * width**-0.5 for _ in sets]
    return [normal(max(tokens, TILE_ROWS), width)[:tokens] for _ in sets], weights


def chosen(tokens: int, rows: int) -> str:
    """The tile that `plan` names."""
    used = gemm.plan(tokens, rows, torch.bfloat16, *gemm.device_limits(torch.device(DEVICE)))
    return f"{used.rows}x{used.columns}x{used.depth}B-w{used.warps}-s{used.stages}"


def linear_cell(name: str, tokens: int, shape: tuple[int, int], tile: Tile | None = None) -> float:
    """Audit (ours) against fast (cuBLAS) in one cell; our median in microseconds."""
    rows, width = shape
    moved = 2 * (rows * width + tokens * (rows + width))
    inputs, weights = operands(tokens, rows, width, moved)
    outs = [torch.empty(tokens, rows, device=DEVICE, dtype=torch.bfloat16) for _ in inputs]
    gemm.linear(inputs[0], weights[0], None, None, outs[0], tile=tile)
    check_product(outs[0], inputs[0], weights[0])
    alone = torch.empty(1, rows, device=DEVICE, dtype=torch.bfloat16)
    same = True
    for row in {0, tokens // 2, tokens - 1}:
        gemm.linear(inputs[0][row : row + 1], weights[0], None, None, alone)
        same = same and torch.equal(alone[0], outs[0][row])

    triples = list(zip(inputs, weights, outs, strict=True))
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(gemm.linear, x, w, None, None, out, tile=tile) for x, w, out in triples]
    }
    if tile is None:
        contenders["cublas"] = [partial(torch.mm, x, w.T, out=out) for x, w, out in triples]
    times = race(contenders, rounds=11)
    if tile is None:
        report(
            "linear", f"{name}-T{tokens}-N{rows}-K{width}", times, 2 * tokens * rows * width, moved, same_bits=same,
            tile=chosen(tokens, rows),
        )  # fmt: skip
    return times["ours"].median


def bench_linear(quick: bool) -> None:
    for model, layers in LAYERS.items():
        for site, shape in layers.items():
            for tokens in (
                (1, 16, 64, 1024, 4096) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
            ):
                with guarded(f"linear {model}-{site} T{tokens}"):
                    linear_cell(f"{model}-{site}", tokens, shape)
    ratios = [r["vs_cublas"] for r in results if r["op"] == "linear"]
    prefill = [
        r["vs_cublas"] for r in results if r["op"] == "linear" and int(r["case"].split("-T")[1].split("-")[0]) >= 1024
    ]
    print(f"linear: geometric mean against cuBLAS {statistics.geometric_mean(ratios):.3f},", end=" ")
    print(f"prefill {statistics.geometric_mean(prefill):.3f}, worst prefill {min(prefill):.3f}")


def two_ops(x: torch.Tensor, w: torch.Tensor, merged: torch.Tensor, out: torch.Tensor) -> None:
    gemm.linear(x, w, None, None, merged)
    activation.swiglu(merged, out)


def plain_gated(x: torch.Tensor, w: torch.Tensor, merged: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = torch.mm(x, w.T, out=merged).chunk(2, -1)
    torch.mul(F.silu(gate), up, out=out)


def gated_cell(name: str, tokens: int, shape: tuple[int, int], tile: Tile | None = None) -> float:
    """swiglu at the end of gate | up, beside the same as two launches and cuBLAS with torch's; our median in microseconds."""
    rows, width = shape
    moved = 2 * (rows * width + tokens * (rows // 2 + width))
    inputs, weights = operands(tokens, rows, width, moved)
    merged, outs = ([normal(tokens, n) for _ in inputs] for n in (rows, rows // 2))
    gated.gated_linear(inputs[0], weights[0], None, None, outs[0], False, tile)
    expected, alone = torch.empty_like(outs[0]), torch.empty_like(outs[0][:1])
    two_ops(inputs[0], weights[0], merged[0], expected)
    gated.gated_linear(inputs[0][-1:], weights[0], None, None, alone, False)
    check_product(merged[0], inputs[0], weights[0])
    same = torch.equal(outs[0], expected) and torch.equal(alone[0], expected[-1])

    quadruples = list(zip(inputs, weights, merged, outs, strict=True))
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(gated.gated_linear, x, w, None, None, out, False, tile) for x, w, _, out in quadruples]
    }
    if tile is None:
        contenders["two_ops"] = [partial(two_ops, *four) for four in quadruples]
        contenders["torch"] = [partial(plain_gated, *four) for four in quadruples]
    times = race(contenders)
    if tile is None:
        report(
            "gated", f"{name}-T{tokens}-N{rows}-K{width}", times, 2 * tokens * rows * width, moved, same_bits=same,
            tile=chosen(tokens, rows),
        )  # fmt: skip
    return times["ours"].median


def bench_gated(quick: bool) -> None:
    for model in ("0.6B", "1.7B", "8B"):
        for tokens in (1, 64, 4096) if quick else (1, 16, 64, 1024, 4096, 8192):
            with guarded(f"gated {model} T{tokens}"):
                gated_cell(f"{model}-gate_up", tokens, LAYERS[model]["gate_up"])


def product_then_add(x: torch.Tensor, w: torch.Tensor, product: torch.Tensor, residual: torch.Tensor) -> None:
    gemm.linear(x, w, None, None, product)
    residual.add_(product)


def add_cell(name: str, tokens: int, shape: tuple[int, int]) -> None:
    """A product that adds to the residual, beside a product and an addition, and cuBLAS, which adds too."""
    rows, width = shape
    moved = 2 * (rows * width + tokens * (2 * rows + width))
    inputs, weights = operands(tokens, rows, width, moved)
    outs, residuals = ([normal(tokens, rows) for _ in inputs] for _ in range(2))
    x, w, before = inputs[0], weights[0], residuals[0].clone()
    alone = before[-1:].clone()
    gemm.linear(x, w, None, None, residuals[0], add=True)
    gemm.linear(x[-1:], w, None, None, alone, add=True)
    true = F.linear(x[:8].double(), w.double()) + before[:8].double()
    assert_reduction(residuals[0][:8], torch.addmm(before, x, w.T)[:8], true, torch.bfloat16)
    same = torch.equal(alone[0], residuals[0][-1])
    quadruples = list(zip(inputs, weights, outs, residuals, strict=True))
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(gemm.linear, x, w, None, None, to, add=True) for x, w, _, to in quadruples],
        "two_ops": [partial(product_then_add, *four) for four in quadruples],
        "torch": [partial(torch.addmm, to, x, w.T, out=to) for x, w, _, to in quadruples],
    }
    report(
        "linear-add", f"{name}-T{tokens}-N{rows}-K{width}", race(contenders), 2 * tokens * rows * width, moved,
        same_bits=same, tile=chosen(tokens, rows),
    )  # fmt: skip


def bench_add(quick: bool) -> None:
    for model in ("0.6B", "1.7B", "8B"):
        for site in ("o", "down"):
            for tokens in (64, 4096) if quick else (1, 16, 64, 1024, 4096, 8192):
                with guarded(f"add {model}-{site} T{tokens}"):
                    add_cell(f"{model}-{site}", tokens, LAYERS[model][site])


# What `--tune` tries; the best of them belong in `WIDE` and `NARROW`.
WIDE_TRIALS = [
    Tile(128, 256, 128, 8, 3), Tile(128, 256, 128, 8, 4), Tile(128, 256, 128, 8, 3, persistent=False),
    Tile(128, 256, 128, 8, 3, tma=False), Tile(256, 128, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 128, 128, 4, 3),
    Tile(128, 128, 128, 4, 3, persistent=False), Tile(128, 128, 128, 8, 3, persistent=False), Tile(64, 256, 128, 4, 4),
]  # fmt: skip
NARROW_TRIALS = [
    Tile(64, 128, 128, 4, 6), Tile(64, 64, 128, 4, 8), Tile(64, 64, 256, 4, 5), Tile(64, 64, 256, 4, 4, persistent=False),
    Tile(64, 32, 256, 4, 4), Tile(64, 32, 256, 4, 6), Tile(64, 32, 256, 4, 4, persistent=False), Tile(64, 32, 512, 4, 4),
    Tile(64, 32, 256, 4, 4, tma=False), Tile(64, 16, 256, 4, 6), Tile(64, 16, 512, 4, 4), Tile(64, 16, 512, 4, 5),
]  # fmt: skip


def tune() -> None:
    wide = [(t, s) for t in (1024, 4096) for s in ((4096, 1024), (2048, 6144), (6144, 4096), (4096, 12288))]
    narrow = [
        (t, s) for t in (1, 16, 64) for s in ((1024, 3072), (4096, 1024), (4096, 4096), (4096, 14336), (24576, 4096))
    ]
    gates = [(4096, layers["gate_up"]) for layers in LAYERS.values()]  # whose epilogue is longer
    races = (("", linear_cell, wide, WIDE_TRIALS), ("", linear_cell, narrow, NARROW_TRIALS))
    for op, cell, cells, trials in (*races, ("gated-", gated_cell, gates, WIDE_TRIALS)):
        for tokens, shape in cells:
            found: list[tuple[float, Tile]] = []
            for tile in trials:
                try:
                    found.append((cell("tune", tokens, shape, tile), tile))
                except Exception as error:  # a tile that does not fit in shared memory is no candidate
                    print(f"T{tokens} {shape} {tile}: {type(error).__name__} {str(error)[:90]}")
            found.sort(key=lambda pair: pair[0])
            for us, tile in found:
                row = {
                    "op": "tune",
                    "case": f"{op}T{tokens}-N{shape[0]}-K{shape[1]}",
                    "us": round(us, 2),
                    "tile": str(tile),
                }
                results.append(row)
            print(f"{op}T{tokens} {shape}:", "; ".join(f"{s:.1f} {t}" for s, t in found[:3]), flush=True)


def fp8_cell(site: str, tokens: int, shape: tuple[int, int]) -> None:
    """8-bit weights and activations beside bf16: speed, and how far each lies from the true product."""
    rows, width = shape
    sets = num_copies(rows * width + 2 * tokens * (rows + width))
    weights = [normal(rows, width) * width**-0.5 for _ in range(sets)]
    packed = [pack(w, FP8) for w in weights]
    inputs = [normal(tokens, width) for _ in range(sets)]
    outs = [normal(tokens, rows) for _ in range(sets)]
    x = inputs[0][:64]
    true = F.linear(x.double(), weights[0].double())
    errors = [((linear(x, w) - true).norm() / true.norm()).item() for w in (packed[0], pack(weights[0]))]
    assert errors[0] < 0.06, f"relative error {errors[0]}"
    same = torch.equal(linear(inputs[0], packed[0])[-1:], linear(inputs[0][-1:], packed[0]))
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(linear, x, w, None, out) for x, w, out in zip(inputs, packed, outs, strict=True)],
        "ours_bf16": [
            partial(gemm.linear, x, w, None, None, out) for x, w, out in zip(inputs, weights, outs, strict=True)
        ],
    }
    library: list[Call] = []
    for x, w in zip(inputs, packed, strict=True):  # without the time to quantise the activations
        quants, scales = gemm.quantize_rows(x)
        assert w.scales is not None
        library.append(
            partial(torch._scaled_mm, quants, w.data.T, scales[:, None], w.scales[None, :], out_dtype=torch.bfloat16)
        )
    try:
        library[0]()
        contenders["scaled_mm_alone"] = library
    except RuntimeError as error:
        print("torch._scaled_mm:", str(error)[:120])
    moved = rows * width + 2 * tokens * (rows + width)
    case = f"8B-{site}-T{tokens}-N{rows}-K{width}"
    quality = {"same_bits": same, "relative_error": round(errors[0], 5), "relative_error_bf16": round(errors[1], 5)}
    report("linear-fp8", case, race(contenders, 11), 2 * tokens * rows * width, moved, **quality)


def bench_fp8(quick: bool) -> None:
    for site, shape in {"qkv": (6144, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}.items():
        for tokens in (16, 4096) if quick else (1, 16, 64, 1024, 4096):
            with guarded(f"fp8 {site} T{tokens}"):
                fp8_cell(site, tokens, shape)


PARTS: dict[str, Callable[[bool], None]] = {
    "linear": bench_linear,
    "gated": bench_gated,
    "add": bench_add,
    "fp8": bench_fp8,
    "small": bench_small,
    "head": bench_head,
    "sampling": bench_sampling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer numbers of tokens")
    parser.add_argument("--tune", action="store_true", help="race tiles of the product instead")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    print(ceilings())
    if args.tune:
        tune()
        save("gemm-tune", results)
    else:
        for part in args.only:
            PARTS[part](args.quick)
        columns = "op case us vs_cublas vs_two_ops vs_torch of_matmul of_copy of_read same_bits"
        print(table(results, columns.split()))
    end()


if __name__ == "__main__":
    main()
