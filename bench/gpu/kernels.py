"""The one kernel that the benches need and no library offers: reading memory and keeping nothing.

Knows bytes; does not know what they mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["read"]

BLOCK = 8192
PER_PROGRAM = 16


@triton.jit
def _read(x, out, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums PER_PROGRAM neighbouring blocks; one number leaves for each program."""
    first = tl.program_id(0).to(tl.int64) * PER_PROGRAM * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(PER_PROGRAM):
        total += tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def read(x: torch.Tensor) -> torch.Tensor:
    """Reads a contiguous int32 tensor once; its size must be a multiple of 128 Ki elements."""
    programs, rest = divmod(x.numel(), PER_PROGRAM * BLOCK)
    if rest or x.dtype is not torch.int32:
        raise ValueError(
            f"`x` has {x.numel()} elements of {x.dtype} but must have int32, a multiple of {PER_PROGRAM * BLOCK}"
        )
    out = torch.empty(programs, dtype=torch.int32, device=x.device)
    _read[(programs,)](x, out, PER_PROGRAM=PER_PROGRAM, BLOCK=BLOCK, num_warps=8)
    return out
