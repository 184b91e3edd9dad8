"""Norms of heads, rotary embedding and the way into the cache in one launch: queries, keys and values are read once.

Knows strides, a table and slots; does not know models, blocks or requests. Between the three steps values are rounded as if they
were stored, so that the bits are those of three launches.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.rope import HeadNorm

HEADS = 16  # of a token that a program holds, at most: a decode step has few tokens and needs the programs


@triton.jit
def _normed_and_turned(
    x, weight, eps, head, heads, stride, half, cos, sin, is_inside,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of some heads of one token; a token whose position is outside of the table is not turned."""
    offs = tl.arange(0, BLOCK_HALF)[None, :]
    keep = (head < heads)[:, None] & (offs < half)
    at = x + head[:, None] * stride + offs
    first, second = tl.load(at, keep, 0.0), tl.load(at + half, keep, 0.0)
    if NORM:
        whole = tl.arange(0, BLOCK_D)[None, :]
        in_head = (head < heads)[:, None] & (whole < 2 * half)
        values = tl.load(x + head[:, None] * stride + whole, in_head, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 1) / (2 * half) + eps)[:, None]
        w1 = tl.load(weight + offs, offs < half, 0.0).to(tl.float32)
        w2 = tl.load(weight + half + offs, offs < half, 0.0).to(tl.float32)
        first = (first.to(tl.float32) * scale * w1).to(x.dtype.element_ty)
        second = (second.to(tl.float32) * scale * w2).to(x.dtype.element_ty)
    a, b = first.to(tl.float32), second.to(tl.float32)
    # The fused step is written out: a compiler that chooses one may choose another for other strides.
    turned_first = tl.fma(a, cos, -(b * sin)).to(x.dtype.element_ty)
    turned_second = tl.fma(b, cos, a * sin).to(x.dtype.element_ty)
    return tl.where(is_inside, turned_first, first), tl.where(is_inside, turned_second, second), offs, keep


@triton.jit
def norm_rope_write_kernel(
    q, k, v, positions, table, q_weight, k_weight, k_cache, v_cache, slots, length, S, q_eps, k_eps, heads, kv_heads, half,
    q_groups, q_token, q_head, k_token, k_head, v_token, v_head,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token)
    is_inside = (position >= 0) & (position < length)
    column = tl.arange(0, BLOCK_HALF)
    angles = table + tl.where(is_inside, position, 0) * 2 * half + column
    cos = tl.load(angles, column < half, 0.0)[None, :]
    sin = tl.load(angles + half, column < half, 0.0)[None, :]
    if group < q_groups:
        head = group * BLOCK_Q + tl.arange(0, BLOCK_Q)
        first, second, offs, keep = _normed_and_turned(
            q + token * q_token,
            q_weight,
            q_eps,
            head,
            heads,
            q_head,
            half,
            cos,
            sin,
            is_inside,
            Q_NORM,
            BLOCK_D,
            BLOCK_HALF,
        )
        at = q + token * q_token + head[:, None] * q_head + offs
        tl.store(at, first, keep)
        tl.store(at + half, second, keep)
    else:
        kv_head = (group - q_groups) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_first, k_second, k_offs, k_keep = _normed_and_turned(
            k + token * k_token,
            k_weight,
            k_eps,
            kv_head,
            kv_heads,
            k_head,
            half,
            cos,
            sin,
            is_inside,
            K_NORM,
            BLOCK_D,
            BLOCK_HALF,
        )
        slot = tl.load(slots + token).to(tl.int64)
        is_kept = (slot >= 0) & (slot < S)
        in_step = k + token * k_token + kv_head[:, None] * k_head + k_offs
        tl.store(in_step, k_first, k_keep & (is_kept == 0))
        tl.store(in_step + half, k_second, k_keep & (is_kept == 0))
        row = (slot * kv_heads + kv_head[:, None]) * 2 * half
        tl.store(k_cache + row + k_offs, k_first, k_keep & is_kept)
        tl.store(k_cache + row + half + k_offs, k_second, k_keep & is_kept)
        column_v = tl.arange(0, BLOCK_D)[None, :]
        moved = (kv_head < kv_heads)[:, None] & (column_v < 2 * half) & is_kept
        values = tl.load(v + token * v_token + kv_head[:, None] * v_head + column_v, moved)
        tl.store(v_cache + row + column_v, values, moved)


def norm_rope(q: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, norm: HeadNorm | None) -> None:
    none = q[:, :0]
    norm_rope_write(q, none, none, positions, table, none, none, None, (norm, None))


def norm_rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor | None,
    norms: tuple[HeadNorm | None, HeadNorm | None],
) -> None:
    """`slots`: None where there are no keys."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if not tokens or not heads + kv_heads:
        return
    (q_weight, q_eps), (k_weight, k_eps) = (norm or (None, 0.0) for norm in norms)
    # By the number of heads alone, so that a row's sums are the same whatever else a launch does.
    block_q, block_k = (min(HEADS, triton.next_power_of_2(max(n, 1))) for n in (heads, kv_heads))
    q_groups = triton.cdiv(heads, block_q)
    norm_rope_write_kernel[(tokens, q_groups + triton.cdiv(kv_heads, block_k))](
        q, k, v, positions, table, q_weight, k_weight, k_cache, v_cache, slots, table.shape[0], k_cache.shape[0], q_eps, k_eps,
        heads, kv_heads, head_dim // 2, q_groups, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), Q_NORM=q_weight is not None, K_NORM=k_weight is not None, num_warps=4,
    )  # fmt: skip


_TYPES = dict.fromkeys(("q", "k", "v", "q_weight", "k_weight", "k_cache", "v_cache"), "*bf16") | {
    "positions": "*i64", "table": "*fp32", "slots": "*i32", "q_eps": "fp32", "k_eps": "fp32", "half": "i32:16",
    **dict.fromkeys(("length", "S", "heads", "kv_heads", "q_groups"), "i32"),
    **dict.fromkeys(("q_token", "q_head", "k_token", "k_head", "v_token", "v_head"), "i32:16"),
}  # fmt: skip


def _case(heads: int, kv_heads: int, head_dim: int, norms: bool) -> AotCase:
    return AotCase(
        f"norm_rope_write-{heads}-{kv_heads}-{head_dim}" + ("-norms" if norms else ""),
        norm_rope_write_kernel,
        _TYPES,
        {"BLOCK_Q": min(HEADS, heads), "BLOCK_K": min(HEADS, kv_heads), "BLOCK_D": head_dim, "BLOCK_HALF": head_dim // 2,
         "Q_NORM": norms, "K_NORM": norms, **({} if norms else {"q_weight": None, "k_weight": None})},
    )  # fmt: skip


AOT_CASES = [_case(16, 8, 128, True), _case(32, 8, 128, False), _case(8, 4, 256, True)]
