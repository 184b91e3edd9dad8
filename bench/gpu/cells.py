"""What the GPU benches of single ops share: contestants in turn, one row a cell, tensors of random numbers.

Knows timings and ceilings; does not know any op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.gpu.harness import Timing, ceilings, compare, guarded, num_copies, save

__all__ = ["DEVICE", "Call", "close", "normal", "race", "report", "results", "small_op"]

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


def small_op(
    name: str,
    case: str,
    moved: int,
    make: Callable[[], tuple[Call, Call, Call]],
    peer: str = "torch",
    rounds: int = 11,
) -> None:
    """`make` gives on fresh buffers: ours, the peer, and a check."""
    with guarded(f"{name} {case}"):
        made = [make() for _ in range(num_copies(moved))]
        made[0][2]()
        report(name, case, race({"ours": [m[0] for m in made], peer: [m[1] for m in made]}, rounds), moved=moved)


def close(ours: torch.Tensor, true: torch.Tensor) -> None:
    torch.testing.assert_close(ours.float(), true.float(), rtol=2e-2, atol=2e-2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()
