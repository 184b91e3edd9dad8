"""Mixed low-rank updates against torch: for each adapter, its rows gathered, two products, and the sum added back."""

from __future__ import annotations

import argparse

import torch

from bench.ops import measure, options, set_threads
from uma_kernels import dispatch
from uma_kernels.lora import LoraRouting, lora, pack_lora
from uma_kernels.lora.cases import BENCH_CASES, LoraCase
from uma_kernels.testing import assert_reduction


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
    for case in BENCH_CASES:
        bench_case(args, case)


if __name__ == "__main__":
    main()
