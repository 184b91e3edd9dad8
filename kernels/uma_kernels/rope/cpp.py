"""Rotary position embedding in C++ (csrc/cpu/rope.cpp). Shapes are checked by the caller, positions here."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    tokens, heads, head_dim = q.shape
    bad = extension().rope(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), positions.data_ptr(), table.data_ptr(),
        tokens, heads, k.shape[1], head_dim, table.shape[0],
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"`positions[{bad}]` is {int(positions[bad])} but `table` has {table.shape[0]} rows")
