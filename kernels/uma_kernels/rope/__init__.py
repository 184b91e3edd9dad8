"""Rotary position embedding of queries and keys, alone and with what stands around it: norms of heads, the way into the cache.

Knows positions and a table of angles; does not know which scaling of the frequencies a model asks for.
"""

from __future__ import annotations

import torch

from uma_kernels import kv_cache
from uma_kernels.check import FLOATS, ShapeError, check, check_indices
from uma_kernels.dispatch import choose
from uma_kernels.norm import rms_norm
from uma_kernels.rope import cpp, reference

__all__ = ["HeadNorm", "norm_rope", "norm_rope_write", "rope", "rotary_table"]

HeadNorm = tuple[torch.Tensor, float]  # a weight [D] and its epsilon


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


def norm_rope(q: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, norm: HeadNorm | None) -> None:
    """
    Semantics:  q in place: `rms_norm` of each head where there is a norm, then `rope`
    Shapes:     q [T, H, D], its rows at any stride . positions [T] int64 . table [P, D]
    Numerics:   bit for bit what the two ops give; on a GPU a norm may sum a head's squares in another order than `rms_norm`, which
                depends on the number of heads alone: so `norm_rope_write` has the same bits
    Errors:     those of the two
    """
    if choose("rope", q.device.type) != "triton":
        if norm is not None:
            rms_norm(q, *norm, q)
        rope(q, q[:, :0], positions, table)
        return
    from uma_kernels.rope import triton_fused

    _check_rotary("q", q, positions, table, norm)
    triton_fused.norm_rope(q, positions, table, norm)


def norm_rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
) -> None:
    """
    Semantics:  q and k in place: `rms_norm` of each head where there is a norm (of q, of k), then `rope`; then `kv_cache.write`. What a
                row of k that was written holds afterwards is not said: it is in the cache
    Shapes:     q [T, H, D] (H may be 0) . k, v [T, Hkv, D], rows of all at any stride . positions [T] int64 . table [P, D] .
                k_cache, v_cache [S, Hkv, D] . slot_mapping [T] int32
    Numerics:   bit for bit what the three ops give; of norms on a GPU see `norm_rope`
    Errors:     those of the three
    """
    if choose("rope", q.device.type) != "triton":
        for x, norm in zip((q, k), norms, strict=True):
            if norm is not None and x.shape[1]:
                rms_norm(x, *norm, x)
        rope(q, k, positions, table)
        kv_cache.write(k, v, k_cache, v_cache, slot_mapping)
        return
    from uma_kernels.rope import triton_fused

    _check_rotary("q", q, positions, table, norms[0])
    _check_rotary("k", k, positions, table, norms[1])
    check("k_cache", k_cache, (None, *k.shape[1:]), k.dtype)
    check("v_cache", v_cache, tuple(k_cache.shape), k.dtype)
    check("v", v, tuple(k.shape), k.dtype, strided=True)
    check("slot_mapping", slot_mapping, (k.shape[0],), torch.int32)
    check_indices("slot_mapping", slot_mapping, -1, k_cache.shape[0])
    triton_fused.norm_rope_write(q, k, v, positions, table, k_cache, v_cache, slot_mapping, norms)


def _check_rotary(
    name: str, x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, norm: HeadNorm | None
) -> None:
    check(name, x, (None, None, None), FLOATS, strided=True)
    tokens, _, head_dim = x.shape
    if head_dim % 2:
        raise ShapeError(f"the head dimension is {head_dim} but must be even")
    check("positions", positions, (tokens,), torch.int64)
    check("table", table, (None, head_dim))
    check_indices("positions", positions, 0, table.shape[0])
    if norm is not None:
        check(f"norm of {name}", norm[0], (head_dim,), x.dtype)
