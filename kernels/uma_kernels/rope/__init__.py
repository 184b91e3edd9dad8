"""Rotary position embedding of queries and keys.

Knows positions and a table of angles; does not know which scaling of the frequencies a model asks for.
"""

from __future__ import annotations

import torch

from uma_kernels.check import FLOATS, ShapeError, check, check_indices
from uma_kernels.dispatch import choose
from uma_kernels.rope import cpp, reference

__all__ = ["rope", "rotary_table"]


def rotary_table(inv_freq: torch.Tensor, max_positions: int) -> torch.Tensor:
    """
    Semantics:  row p is cos(p * inv_freq) followed by sin(p * inv_freq); the angle is rounded to fp32 first, as when
                the models were trained
    Shapes:     inv_freq [D / 2] -> [max_positions, D]
    Errors:     ShapeError when `inv_freq` is not a vector of fp32
    """
    check("inv_freq", inv_freq, (None,))
    positions = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    """
    Semantics:  in place, for every head of q[t] and k[t], with cos | sin = table[positions[t]] and halves x1 | x2:
                x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin   (half-split, as in GPT-NeoX)
    Shapes:     q [T, H, D] . k [T, Hkv, D], their rows at any stride . positions [T] int64 . table [P, D]; D even
    Numerics:   fp32; each element depends on its own row alone
    Errors:     ShapeError when shapes do not fit . IndexError when a position is outside the table
    Source:     RoFormer, arXiv 2104.09864
    """
    check("q", q, (None, None, None), FLOATS, strided=True)
    tokens, _, head_dim = q.shape
    if head_dim % 2:
        raise ShapeError(f"the head dimension is {head_dim} but must be even")
    check("k", k, (tokens, None, head_dim), q.dtype, strided=True)
    check("positions", positions, (tokens,), torch.int64)
    check("table", table, (None, head_dim))
    backend = choose("rope", q.device.type)
    if backend == "triton":
        from uma_kernels.rope import triton_kernel

        check_indices("positions", positions, 0, table.shape[0])
        triton_kernel.rope(q, k, positions, table)
    else:
        (cpp if backend == "cpp" and q.dtype is torch.float32 else reference).rope(q, k, positions, table)
