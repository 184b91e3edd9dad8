"""Rotary position embedding in plain torch: the specification."""

from __future__ import annotations

import torch


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    bad = ((positions < 0) | (positions >= table.shape[0])).nonzero()
    if bad.numel():
        index = int(bad[0, 0])
        raise IndexError(f"`positions[{index}]` is {int(positions[index])} but `table` has {table.shape[0]} rows")
    half = q.shape[-1] // 2
    cos, sin = table[positions][:, None, :].split(half, dim=-1)
    for x in (q, k):
        first, second = (part.to(torch.float32, copy=True) for part in x.split(half, dim=-1))
        x[..., :half] = first * cos - second * sin
        x[..., half:] = second * cos + first * sin
