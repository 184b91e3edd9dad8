"""Mixed low-rank updates: of one matrix against torch, and of SmolLM2-135M's layers against how others do it on a CPU.

    python -m bench.ops.lora [--only layers]

A case of whole layers gives the tax: the time of the layers' products with their updates over that without, from calls in
turn. Both of the others' ways are written out here: vLLM's CPU path (each row's factors gathered, then einsum) and PEFT's
mixed batch (for each adapter its rows gathered, two products, the sum added back). Either is given the updates alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from bench.ops import measure, options, set_threads
from uma_kernels import dispatch
from uma_kernels.linear import linear, pack
from uma_kernels.linear.cases import WeightFormat
from uma_kernels.lora import LoraRouting, LoraSlice, lora, lora_merged, pack_lora
from uma_kernels.lora.cases import BENCH_CASES, LoraCase
from uma_kernels.testing import assert_reduction

SITES = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))  # K, and N of each projection
WEIGHTS = WeightFormat(4, 32, True)
PRECISION = "near"
RANK, SCALING = 16, 2.0


@dataclass(frozen=True)
class LayersCase:
    """`copies` layers one after another, so that no cache holds what a whole model would read from memory."""

    tokens: int
    adapters: int
    copies: int
    factors: torch.dtype = torch.float32  # as they are stored and read; the others are given the same values in fp32

    @property
    def id(self) -> str:
        stored = "" if self.factors is torch.float32 else f"-{str(self.factors).removeprefix('torch.')}"
        return f"smollm2-135m-x{self.copies}-T{self.tokens}-a{self.adapters}-r{RANK}{stored}"


LAYERS_CASES = [
    LayersCase(*shape, factors)
    for factors in (torch.float32, torch.float16)  # as PEFT and as `uma train` save them
    for shape in ((256, 1, 4), (256, 8, 4), (256, 64, 1), (1024, 1, 4), (1024, 8, 4), (1024, 64, 1), (16, 8, 6))
]


class SiteBench:
    """One product of some layers: its weights, the factors of its adapters, and the three ways of adding them."""

    def __init__(self, case: LayersCase, width: int, rows: tuple[int, ...], routing: LoraRouting) -> None:
        self.case, self.rows, self.routing = case, rows, routing
        self.x, self.out = torch.randn(case.tokens, width), torch.zeros(case.tokens, sum(rows))
        self.mapping = torch.arange(case.tokens) % case.adapters
        self.weights = [pack(WEIGHTS.random(sum(rows), width)) for _ in range(case.copies)]
        self.factors = [  # of each layer and projection: A [adapters, R, K] and B [adapters, N, R]
            [(self.some(RANK, width), self.some(n, RANK)) for n in rows] for _ in range(case.copies)
        ]
        self.slices = [
            [
                LoraSlice(
                    n,
                    [pack_lora(a.to(case.factors), b.to(case.factors), SCALING) for a, b in zip(*stacked, strict=True)],
                )
                for n, stacked in zip(rows, layer, strict=True)
            ]
            for layer in self.factors
        ]
        self.weight_macs = case.tokens * width * sum(rows) * case.copies
        self.flops = 2 * case.tokens * RANK * sum(width + n for n in rows) * case.copies
        own = sum(adapter.nbytes for layer in self.slices for part in layer for adapter in part.adapters if adapter)
        self.bytes = own + 4 * case.copies * case.tokens * (width + 2 * sum(rows))

    def some(self, *shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(self.case.adapters, *shape)).to(self.case.factors).float()

    def base(self, layer: int, precision: str) -> None:
        linear(self.x, self.weights[layer], out=self.out, precision=precision)

    def ours(self, layer: int) -> None:
        lora_merged(self.x, self.out, self.slices[layer], self.routing)

    def gathered(self, layer: int) -> None:
        for out, (lora_a, lora_b) in zip(self.out.split(self.rows, 1), self.factors[layer], strict=True):
            shrunk = torch.einsum("tk,trk->tr", self.x, lora_a[self.mapping])
            out += SCALING * torch.einsum("tr,tnr->tn", shrunk, lora_b[self.mapping])

    def one_after_another(self, layer: int) -> None:
        for out, (lora_a, lora_b) in zip(self.out.split(self.rows, 1), self.factors[layer], strict=True):
            for adapter in range(self.case.adapters):
                rows = (self.mapping == adapter).nonzero().flatten()
                own = self.x.index_select(0, rows)
                out.index_add_(0, rows, F.linear(F.linear(own, lora_a[adapter]), lora_b[adapter]) * SCALING)

    def check(self) -> None:
        base = torch.randn(self.out.shape)
        results = []
        for way in (self.ours, self.gathered, self.one_after_another):
            self.out.copy_(base)
            way(0)
            results.append(self.out.clone())
        true, x = base.double(), self.x.double()
        for out, (lora_a, lora_b) in zip(true.split(self.rows, 1), self.factors[0], strict=True):
            for adapter in range(self.case.adapters):
                rows = self.mapping == adapter
                out[rows] += SCALING * x[rows] @ lora_a[adapter].double().T @ lora_b[adapter].double().T
        assert_reduction(results[0], results[2], true)
        assert_reduction(results[1], results[2], true)


def tax_of(plain: Callable[[], None], updated: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Median of (time of `updated` / time of `plain` - 1) over calls in turn, and the median time of `plain`."""
    ratios: list[float] = []
    times: list[float] = []
    plain()
    updated()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 7:
        begin = time.perf_counter()
        plain()
        middle = time.perf_counter()
        updated()
        ratios.append((time.perf_counter() - middle) / (middle - begin) - 1)
        times.append(middle - begin)
    return median(ratios), median(times)


def bench_layers(args: argparse.Namespace, case: LayersCase) -> None:
    if args.only not in f"lora layers {case.id} fp32":
        return
    routing = LoraRouting.build(torch.arange(case.tokens) % case.adapters, case.adapters)
    sites = [SiteBench(case, width, rows, routing) for width, rows in SITES]

    def through(way: Callable[[SiteBench, int], None]) -> None:
        for layer in range(case.copies):
            for site in sites:
                way(site, layer)

    def updated(site: SiteBench, layer: int) -> None:
        site.base(layer, PRECISION)
        site.ours(layer)

    def check() -> None:
        for site in sites:
            site.check()

    tax, base = tax_of(
        lambda: through(lambda site, layer: site.base(layer, PRECISION)), lambda: through(updated), args.seconds
    )
    base_gop_s = 2 * sum(site.weight_macs for site in sites) / base / 1e9
    print(f"tax over {PRECISION} {WEIGHTS.id} at {base_gop_s:.0f} GOP/s: {tax:.1%}", flush=True)
    ways = {
        "per-row gather and einsum (vLLM's CPU path)": SiteBench.gathered,
        "index_select, index_add (PEFT's mixed batch)": SiteBench.one_after_another,
    }
    for name, way in ways.items():
        peer = partial(through, way)
        measure(
            args,
            check,
            lambda: through(SiteBench.ours),
            peer,
            op="lora",
            case=f"layers {case.id}",
            dtype="fp32",
            flops=sum(site.flops for site in sites),
            bytes_moved=sum(site.bytes for site in sites),
            peer=name,
            tax=round(tax, 4),
            tax_over=f"{WEIGHTS.id} {PRECISION}",
            base_gop_s=round(base_gop_s, 1),
        )


def bench_case(args: argparse.Namespace, case: LoraCase) -> None:
    factors = [(torch.randn(r, case.width), torch.randn(case.rows, r), 2.0) for r in case.ranks]
    packed = [pack_lora(*f) for f in factors]
    with dispatch.use_backend("reference"):
        plain = [pack_lora(*f) for f in factors]
    routing = LoraRouting.build(case.token_lora_mapping, len(packed))
    x, base = torch.randn(case.tokens, case.width), torch.randn(case.tokens, case.rows)

    def by_torch(out: torch.Tensor) -> None:
        with dispatch.use_backend("reference"):
            lora(x, out, plain, routing)

    def check() -> None:
        ours, torch_out, true = base.clone(), base.clone(), base.double()
        lora(x, ours, packed, routing)
        by_torch(torch_out)
        for t, slot in enumerate(case.token_lora_mapping):
            if slot >= 0:
                lora_a, lora_b, scaling = factors[slot]
                true[t] += scaling * (x[t].double() @ lora_a.double().T) @ lora_b.double().T
        assert_reduction(ours, torch_out, true)

    measure(
        args,
        check,
        lambda: lora(x, base, packed, routing),
        lambda: by_torch(base),
        op="lora",
        case=case.id,
        dtype="fp32",
        flops=case.flops,
        bytes_moved=sum(adapter.nbytes for adapter in packed) + 4 * case.tokens * (case.width + 2 * case.rows),
        peer="torch fp32, one adapter after another",
    )


def main() -> None:
    args = options(__doc__ or "")
    set_threads(args.threads)
    torch.manual_seed(0)
    for layers in LAYERS_CASES:
        bench_layers(args, layers)
    for case in BENCH_CASES:
        bench_case(args, case)


if __name__ == "__main__":
    main()
