"""Attention in C++ (csrc/cpu/attention.cpp). Shapes are checked by the caller, slots here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uma_kernels.dispatch import extension

if TYPE_CHECKING:
    from uma_kernels.attention import AttentionBatch


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    heads, head_dim = q.shape[1:]
    tokens = k.shape[0]  # rows that a negative slot may name
    slots, kv_heads, _ = k_cache.shape
    bad = extension().tree_attention(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
        batch.cu_seqlens_q.data_ptr(), batch.cu_seqlens_k.data_ptr(), batch.context_slots.data_ptr(),
        batch.cu_seqlens_q.shape[0] - 1, tokens, slots, heads, kv_heads, head_dim, scale, window or 0,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"`context_slots[{bad}]` is {int(batch.context_slots[bad])}, outside {-tokens} .. {slots - 1}")


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    sequences, heads, head_dim = q.shape
    slots, kv_heads, _ = k_cache.shape
    blocks = block_table.shape[1]
    bad = extension().paged_decode(
        q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), block_table.data_ptr(),
        context_lens.data_ptr(), sequences, blocks, block_size, slots, heads, kv_heads, head_dim, scale, window or 0,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(
            f"sequence {bad}: `context_lens` is {int(context_lens[bad])} with {blocks} blocks of {block_size}, "
            f"and its blocks are {block_table[bad].tolist()} in a cache of {slots} slots"
        )
