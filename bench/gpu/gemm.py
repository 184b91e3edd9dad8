"""Matrix products and the small ops of a decoder layer on a GPU, beside cuBLAS, torch and the measured ceilings.

    python -m bench.gpu.gemm [--quick] [--tune] [--only linear fp8 small head sampling]

Knows shapes of real layers and what each op has to move or multiply; does not know the engine. Every cell is checked before
it is timed, and a row of each product is compared bit for bit with itself alone (`same_bits`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.harness import Timing, ceilings, compare, end, guarded, num_copies, require_gpu, save, table
from uma_kernels import activation, kv_cache, norm, rope
from uma_kernels.check import TILE_ROWS
from uma_kernels.dispatch import use_backend
from uma_kernels.label_head import label_head, token_logprobs
from uma_kernels.linear import FP8, gather_rows, linear, pack
from uma_kernels.linear import triton_kernel as gemm
from uma_kernels.linear.triton_kernel import Tile
from uma_kernels.sampling import SamplingBatch, sample
from uma_kernels.testing import assert_reduction

LAYERS = {  # (N, K) of each product of a layer
    "0.6B": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "1.7B": {"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (12288, 2048), "down": (2048, 6144)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "llama-8B": {"gate_up": (28672, 4096), "down": (4096, 14336)},
}
DEVICE = "cuda"
Call = Callable[[], object]
results: list[dict[str, Any]] = []


def race(contestants: dict[str, Sequence[Call]], rounds: int = 11) -> dict[str, Timing]:
    return compare(contestants, max(2, *(len(calls) for calls in contestants.values())), rounds)


def report(op: str, case: str, times: dict[str, Timing], flops: int = 0, moved: int = 0, **more: Any) -> None:
    """One row: the first contestant is ours. Ratios above 1: we are faster."""
    (_, ours), *peers = times.items()
    row: dict[str, Any] = {"op": op, "case": case, **ours.as_row()}
    for name, theirs in peers:
        row |= {f"{name}_us": round(theirs.median, 2), f"vs_{name}": round(theirs.median / ours.median, 3)}
    limits = ceilings()
    if flops:
        rate = flops / ours.median / 1e6
        row |= {"tflop_s": round(rate, 1), "of_matmul": round(rate / limits.bf16_tflop_s, 3)}
    if moved:
        rate = moved / ours.median / 1e3
        row |= {"gb_s": round(rate), "of_copy": round(rate / limits.copy_gb_s, 3)}
        row |= {"of_read": round(rate / limits.read_gb_s, 3)}
    row |= more
    results.append(row)
    save("gemm", [row])
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def check_product(ours: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Against fp32, at a few rows: within what rounding the result to 16 bits allows."""
    rows = torch.linspace(0, x.shape[0] - 1, min(8, x.shape[0]), device=x.device).long()
    true = F.linear(x[rows].double(), w.double())
    library = F.linear(x[rows], w)
    assert_reduction(ours[rows], library, true, torch.bfloat16)


def linear_cell(name: str, tokens: int, shape: tuple[int, int], tile: Tile | None = None) -> float:
    """Audit (ours) against fast (cuBLAS) in one cell; our median in microseconds."""
    rows, width = shape
    sets = num_copies(2 * (rows * width + tokens * (rows + width)))
    weights = [normal(rows, width) * width**-0.5 for _ in range(sets)]
    inputs = [normal(max(tokens, TILE_ROWS), width)[:tokens] for _ in range(sets)]  # as the engine's own ops allot them
    outs = [torch.empty(tokens, rows, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
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
        moved = 2 * (rows * width + tokens * (rows + width))
        used = gemm.plan(tokens, rows, torch.bfloat16, *gemm.device_limits(inputs[0].device))
        report(
            "linear", f"{name}-T{tokens}-N{rows}-K{width}", times, 2 * tokens * rows * width, moved, same_bits=same,
            tile=f"{used.rows}x{used.columns}x{used.depth}B-w{used.warps}-s{used.stages}",
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
    for cells, trials in ((wide, WIDE_TRIALS), (narrow, NARROW_TRIALS)):
        for tokens, shape in cells:
            found: list[tuple[float, Tile]] = []
            for tile in trials:
                try:
                    found.append((linear_cell("tune", tokens, shape, tile), tile))
                except Exception as error:  # a tile that does not fit in shared memory is no candidate
                    print(f"T{tokens} {shape} {tile}: {type(error).__name__} {str(error)[:90]}")
            found.sort(key=lambda pair: pair[0])
            for us, tile in found:
                row = {
                    "op": "tune",
                    "case": f"T{tokens}-N{shape[0]}-K{shape[1]}",
                    "us": round(us, 2),
                    "tile": str(tile),
                }
                results.append(row)
            print(f"T{tokens} {shape}:", "; ".join(f"{s:.1f} {t}" for s, t in found[:3]), flush=True)


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


def small_op(name: str, case: str, moved: int, make: Callable[[], tuple[Call, Call, Call]], rounds: int = 11) -> None:
    """`make` gives on fresh buffers: ours, the peer, and a check."""
    with guarded(f"{name} {case}"):
        made = [make() for _ in range(num_copies(moved))]
        made[0][2]()
        report(name, case, race({"ours": [m[0] for m in made], "torch": [m[1] for m in made]}, rounds), moved=moved)


def close(ours: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(ours.float(), true.float(), rtol=2e-2, atol=2e-2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def bench_small(quick: bool) -> None:
    for tokens in (64, 4096) if quick else (1, 64, 1024, 4096, 16384):
        for width in (1024, 4096):

            def norms(tokens: int = tokens, width: int = width) -> tuple[Call, Call, Call]:
                x, w, out = normal(tokens, width), normal(width), torch.empty_like(normal(tokens, width))
                return (
                    lambda: norm.rms_norm(x, w, 1e-6, out),
                    lambda: F.rms_norm(x, (width,), w, 1e-6),
                    lambda: close(norm.rms_norm(x, w, 1e-6), F.rms_norm(x, (width,), w, 1e-6)),
                )

            def add_norms(tokens: int = tokens, width: int = width) -> tuple[Call, Call, Call]:
                x, residual, w = normal(tokens, width), normal(tokens, width), normal(width)
                out = torch.empty_like(x)
                return (
                    lambda: norm.add_rms_norm(x, residual, w, 1e-6, out),
                    lambda: F.rms_norm(residual.add_(x), (width,), w, 1e-6),
                    lambda: close(
                        norm.add_rms_norm(x, residual.clone(), w, 1e-6), F.rms_norm(x + residual, (width,), w, 1e-6)
                    ),
                )

            small_op("rms_norm", f"T{tokens}-K{width}", 4 * tokens * width, norms)
            small_op("add_rms_norm", f"T{tokens}-K{width}", 8 * tokens * width, add_norms)

        def ropes(tokens: int = tokens) -> tuple[Call, Call, Call]:
            q, k = normal(tokens, 32, 128), normal(tokens, 8, 128)
            table = rope.rotary_table(10000.0 ** (-torch.arange(0, 128, 2, device=DEVICE).float() / 128), 4096)
            positions = torch.arange(tokens, device=DEVICE) % 4096

            def plain() -> tuple[torch.Tensor, torch.Tensor]:
                cos, sin = table[positions][:, None, :].to(q.dtype).chunk(2, -1)
                turned = []
                for x in (q, k):
                    a, b = x.chunk(2, -1)
                    turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
                return turned[0], turned[1]

            def right() -> None:
                expected = plain()
                ours = q.clone(), k.clone()
                rope.rope(*ours, positions, table)
                close(ours[0], expected[0])
                close(ours[1], expected[1])

            return lambda: rope.rope(q, k, positions, table), plain, right

        def gates(tokens: int = tokens) -> tuple[Call, Call, Call]:
            merged, out = normal(tokens, 2 * 12288), normal(tokens, 12288)
            gate, up = merged.chunk(2, -1)
            return (
                lambda: activation.swiglu(merged, out),
                lambda: F.silu(gate) * up,
                lambda: close(activation.swiglu(merged), F.silu(gate) * up),
            )

        def writes(tokens: int = tokens) -> tuple[Call, Call, Call]:
            k, v, k_cache, v_cache = (normal(n, 8, 128) for n in (tokens, tokens, 2 * tokens, 2 * tokens))
            slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
            narrow = slots.int()

            def right() -> None:
                kv_cache.write(k, v, k_cache, v_cache, narrow)
                assert torch.equal(k_cache[slots], k)
                assert torch.equal(v_cache[slots], v)

            return (
                lambda: kv_cache.write(k, v, k_cache, v_cache, narrow),
                lambda: (k_cache.index_copy_(0, slots, k), v_cache.index_copy_(0, slots, v)),
                right,
            )

        small_op("rope", f"T{tokens}-H32-Hkv8-D128", 4 * tokens * 40 * 128, ropes)
        small_op("swiglu", f"T{tokens}-N12288", 6 * tokens * 12288, gates)
        small_op("kv_cache.write", f"T{tokens}-Hkv8-D128", 8 * tokens * 8 * 128, writes)


def plain_label_head(hidden: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return hidden[rows].float() @ w[ids].float().T


def plain_logprobs(hidden: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.mm(hidden[rows], w.T).float().log_softmax(-1).gather(1, ids)


def head_cells(vocabulary: int, width: int, quick: bool) -> None:
    w = normal(vocabulary, width) * width**-0.5
    weight, hidden = pack(w), normal(8192, width)
    tables = [torch.randint(vocabulary, (4096,), device=DEVICE) for _ in range(4)]
    assert torch.equal(gather_rows(weight, tables[0]), w[tables[0]])
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(gather_rows, weight, ids) for ids in tables],
        "torch": [partial(w.index_select, 0, ids) for ids in tables],
    }
    report("gather_rows", f"T4096-K{width}", race(contenders), moved=4 * 4096 * width)
    for count in (100, 500):
        rows, ids = torch.randint(8192, (count,), device=DEVICE), torch.randint(vocabulary, (2,), device=DEVICE)
        true = hidden[rows].double() @ w[ids].double().T
        assert (label_head(hidden, rows, weight, ids) - true).abs().max() <= 2.0**-18 * true.abs().max()
        contenders = {
            "ours": [partial(label_head, hidden, rows, weight, ids)] * 8,
            "torch": [partial(plain_label_head, hidden, rows, w, ids)] * 8,
        }
        report("label_head", f"R{count}-L2-K{width}", race(contenders), moved=2 * (count + 2) * width)
    for count in (16, 1024) if quick else (1, 16, 64, 1024, 4096):
        rows, ids = torch.arange(count, device=DEVICE), torch.randint(vocabulary, (count, 1), device=DEVICE)
        ours = token_logprobs(hidden, rows, weight, ids)
        some = hidden[: min(8, count)]
        true = F.linear(some.double(), w.double()).log_softmax(-1).gather(1, ids[:8])
        assert (ours[:8] - true).abs().max() <= 1e-4
        same = torch.equal(ours[-1:], token_logprobs(hidden, rows[-1:], weight, ids[-1:]))
        contenders = {
            "ours": [partial(token_logprobs, hidden, rows, weight, ids)] * 2,
            "torch": [partial(plain_logprobs, hidden, rows, w, ids)] * 2,
        }
        flops, moved = 2 * count * vocabulary * width, 2 * vocabulary * width
        case = f"R{count}-V{vocabulary}-K{width}"
        report("token_logprobs", case, race(contenders, 9), flops, moved, same_bits=same)


def bench_head(quick: bool) -> None:
    for width in (1024, 4096):
        with guarded(f"heads K{width}"):
            head_cells(151936, width, quick)


def plain_sample(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Temperature 0.8, then top_k, or top_p by a sort: what torch offers without a kernel of one's own."""
    if top_k:
        values, ids = (logits / 0.8).topk(top_k)
        return ids.gather(1, torch.multinomial(values.softmax(-1), 1))
    values, ids = (logits / 0.8).sort(dim=-1, descending=True)
    weights = values.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
    return ids.gather(1, torch.multinomial(weights, 1))


SAMPLING = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "plain": (0.8, 0, 1.0),
    "top_k-50": (0.8, 50, 1.0),
    "top_p-0.95": (0.8, 0, 0.95),
}


def bench_sampling(quick: bool) -> None:
    vocabulary = 151936
    for rows in (64,) if quick else (1, 64, 256):
        logits = [
            torch.randn(rows, vocabulary, device=DEVICE) * 3 for _ in range(num_copies(4 * rows * vocabulary, 16))
        ]
        ones = torch.ones(rows, device=DEVICE)
        for name, (temperature, top_k, top_p) in SAMPLING.items():
            with guarded(f"sampling {name} B{rows}"):
                settings = SamplingBatch(
                    ones * temperature, (ones * top_k).int(), ones * top_p, ones * 0, ones, ones * 0, ones * 0,
                    torch.arange(rows, device=DEVICE), torch.zeros(rows, device=DEVICE, dtype=torch.int64),
                )  # fmt: skip
                with use_backend("reference"):
                    expected = sample(
                        logits[0][:8], SamplingBatch(*(getattr(settings, f)[:8] for f in settings.__slots__))
                    )
                assert torch.equal(sample(logits[0], settings)[:8], expected), name
                peer = (
                    partial(plain_sample, top_k=top_k, top_p=top_p)
                    if name != "greedy"
                    else partial(torch.argmax, dim=-1)
                )
                contestants: dict[str, Sequence[Call]] = {
                    "ours": [partial(sample, x, settings) for x in logits], "torch": [partial(peer, x) for x in logits],
                }  # fmt: skip
                report("sampling", f"{name}-B{rows}-V{vocabulary}", race(contestants), moved=4 * rows * vocabulary)


PARTS: dict[str, Callable[[bool], None]] = {
    "linear": bench_linear,
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
        print(
            table(
                results, ("op", "case", "us", "vs_cublas", "vs_torch", "of_matmul", "of_copy", "of_read", "same_bits")
            )
        )
    end()


if __name__ == "__main__":
    main()
