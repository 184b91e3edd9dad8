"""Attention in plain torch, chunk by chunk with an explicit mask: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
    starts_q, starts_k = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        rows = slice(starts_q[n], starts_q[n + 1])
        slots = batch.context_slots[starts_k[n] : starts_k[n + 1]].long()
        _check_slots("context_slots", slots, -k.shape[0], k_cache.shape[0])
        keys, values = _context(k, k_cache, slots), _context(v, v_cache, slots)
        out[rows] = _attend(q[rows], keys, values, scale, window)


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
    for b, length in enumerate(context_lens.tolist()):
        if not 1 <= length <= block_table.shape[1] * block_size:
            raise IndexError(
                f"`context_lens[{b}]` is {length} but {block_table.shape[1]} blocks of {block_size} are given"
            )
        positions = torch.arange(length, device=q.device)
        slots = block_table[b, positions // block_size].long() * block_size + positions % block_size
        _check_slots("block_table", slots, 0, k_cache.shape[0])
        out[b] = _attend(q[b : b + 1], k_cache[slots], v_cache[slots], scale, window)[0]


def _check_slots(name: str, slots: torch.Tensor, low: int, high: int) -> None:
    if slots.numel() and (int(slots.min()) < low or int(slots.max()) >= high):
        raise IndexError(
            f"`{name}` reaches slots {int(slots.min())} .. {int(slots.max())}, outside {low} .. {high - 1}"
        )


def _context(step: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The rows [len_k, Hkv, D] that `slots` name, from the cache or from this step."""
    context = torch.empty(slots.numel(), *step.shape[1:], dtype=step.dtype, device=step.device)
    own = slots < 0
    context[own] = step[-slots[own] - 1]
    context[~own] = cache[slots[~own]]
    return context


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """q [len_q, H, D], the last rows of a context with keys and values [len_k, Hkv, D] -> [len_q, H, D]."""
    len_q, heads, head_dim = q.shape
    len_k, kv_heads, _ = keys.shape
    grouped = q.view(len_q, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped.double(), keys.double()).mul(scale).float()
    position = torch.arange(len_k - len_q, len_k, device=q.device)[:, None]
    key_position = torch.arange(len_k, device=q.device)[None, :]
    seen = key_position <= position
    if window is not None:
        seen &= key_position > position - window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hgqk,khd->qhgd", weights, values.float()).reshape(len_q, heads, head_dim)
