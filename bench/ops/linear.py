"""Packed matrix products against torch's fp32 product with the dequantised weight."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from bench.ops import measure, options, set_threads
from uma_kernels.linear import BlockQuantized, linear, pack
from uma_kernels.linear.cases import BENCH_CASES, FAST_BENCH_CASES, LinearCase, WeightFormat
from uma_kernels.testing import assert_fast, assert_near, assert_reduction

FORMATS = (WeightFormat(32), WeightFormat(4, 32, True), WeightFormat(8, 32))
PEAKS = {("near", 4): "int8_madd", ("near", 8): "int8_madd", ("fast", 4): "int4_madd", ("fast", 8): "int8_madd"}
# Of packed weights that are read in turn where rows are few, as a model's layers are: no cache holds them.
FEW_ROWS_BYTES = 96 << 20


def bench_case(args: argparse.Namespace, case: LinearCase, weight_format: WeightFormat, precision: str) -> None:
    first = pack(weight_format.random(case.rows, case.width))
    copies = 1 if case.tokens >= 64 else -(-FEW_ROWS_BYTES // first.nbytes)
    x, out = torch.randn(case.tokens, case.width), torch.empty(case.tokens, case.rows)
    weights = [weight_format.random(case.rows, case.width) for _ in range(copies)]
    packed = [pack(weight) for weight in weights]
    dense = [weight.dequantize() if isinstance(weight, BlockQuantized) else weight for weight in weights]

    def check() -> None:
        true = F.linear(x.double(), dense[0].double())
        made = linear(x, packed[0], precision=precision)
        if precision == "fast":
            assert_fast(made, x, dense[0], weight_format.block_size)
        elif precision == "near":
            assert_near(made, true)
        else:
            assert_reduction(made, F.linear(x, dense[0]), true)

    measure(
        args,
        check,
        lambda: [linear(x, weight, out=out, precision=precision) for weight in packed],
        lambda: [F.linear(x, weight) for weight in dense],
        op="linear",
        case=case.id + (f"-x{copies}" if copies > 1 else ""),
        dtype=weight_format.id + ("" if precision == "exact" else f" {precision}"),
        peak=PEAKS.get((precision, weight_format.bits), "fp32_fma"),
        flops=case.flops * copies,
        bytes_moved=case.bytes(packed[0].nbytes) * copies,
        peer="torch fp32",
    )


def main() -> None:
    args = options(__doc__ or "")
    set_threads(args.threads)
    torch.manual_seed(0)
    for case in BENCH_CASES:
        for weight_format in FORMATS:
            for precision in ("exact",) if weight_format.bits == 32 else ("exact", "near"):
                bench_case(args, case, weight_format, precision)
    for case in FAST_BENCH_CASES:
        for weight_format in FORMATS[1:]:
            bench_case(args, case, weight_format, "fast")


if __name__ == "__main__":
    main()
