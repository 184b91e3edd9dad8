"""Rotary position embedding on a GPU: queries and keys of a token in one program, in place.

Knows strides and a table; does not know models.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase


@triton.jit
def rope_kernel(
    q, k, positions, table, length, heads, kv_heads, half, q_token, q_head, k_token, k_head,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """A token whose position is outside of the table is left as it is."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    if (position >= 0) & (position < length):
        offs = tl.arange(0, BLOCK_HALF)
        cos = tl.load(table + position * 2 * half + offs, offs < half, 0.0).to(tl.float32)[None, :]
        sin = tl.load(table + position * 2 * half + half + offs, offs < half, 0.0).to(tl.float32)[None, :]
        _rotate(q + token * q_token, heads, q_head, half, offs, cos, sin, BLOCK_Q)
        _rotate(k + token * k_token, kv_heads, k_head, half, offs, cos, sin, BLOCK_K)


@triton.jit
def _rotate(x, heads, stride, half, offs, cos, sin, BLOCK: tl.constexpr):
    head = tl.arange(0, BLOCK)[:, None]
    at = x + head * stride + offs[None, :]
    keep = (head < heads) & (offs[None, :] < half)
    first, second = tl.load(at, keep, 0.0).to(tl.float32), tl.load(at + half, keep, 0.0).to(tl.float32)
    # The fused step is written out: a compiler that chooses one may choose another for other strides.
    tl.store(at, tl.fma(first, cos, -(second * sin)).to(x.dtype.element_ty), keep)
    tl.store(at + half, tl.fma(second, cos, first * sin).to(x.dtype.element_ty), keep)


def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    kv_heads, half = k.shape[1], head_dim // 2
    block_q, block_k = triton.next_power_of_2(max(heads, 1)), triton.next_power_of_2(max(kv_heads, 1))
    block_half = triton.next_power_of_2(half)
    rope_kernel[(tokens,)](
        q, k, positions, table, table.shape[0], heads, kv_heads, half,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_HALF=block_half, num_warps=8 if block_q * block_half >= 2048 else 4,
    )  # fmt: skip


_TYPES = {
    "q": "*bf16", "k": "*bf16", "positions": "*i64", "table": "*fp32", "length": "i32", "heads": "i32", "kv_heads": "i32",
    "half": "i32:16", "q_token": "i32:16", "q_head": "i32:16", "k_token": "i32:16", "k_head": "i32:16",
}  # fmt: skip
AOT_CASES = [
    AotCase("rope-16-8-128", rope_kernel, _TYPES, {"BLOCK_Q": 16, "BLOCK_K": 8, "BLOCK_HALF": 64}),
    AotCase("rope-32-8-128", rope_kernel, _TYPES, {"BLOCK_Q": 32, "BLOCK_K": 8, "BLOCK_HALF": 64}, 8),
    AotCase("rope-64-8-256", rope_kernel, _TYPES, {"BLOCK_Q": 64, "BLOCK_K": 8, "BLOCK_HALF": 128}, 8),
]
