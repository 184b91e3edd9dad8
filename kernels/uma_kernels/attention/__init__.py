"""Attention over a tree of segments, and over block tables for decoding.

Knows queries, keys, values and where each key lies; does not know requests, segments' text or who owns a cache slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from uma_kernels.attention import cpp, reference
from uma_kernels.check import ShapeError, check, out_like
from uma_kernels.dispatch import choose

__all__ = ["AttentionBatch", "paged_decode", "tree_attention"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Which keys each query of a step sees. Built once a step, shared by all layers.

    Semantics:  chunk n asks with rows cu_seqlens_q[n] .. cu_seqlens_q[n + 1] of q. Its context, the whole path from the
                root to its own last token, is context_slots[cu_seqlens_k[n] : cu_seqlens_k[n + 1]] in path order.
                A slot s >= 0 is row s of the cache; s < 0 is row -s - 1 of this step's own k and v.
    Shapes:     cu_seqlens_q, cu_seqlens_k [N + 1] int32 . context_slots [cu_seqlens_k[N]] int32
    Errors:     ShapeError when the parts do not fit together or a chunk has more queries than context
    """

    cu_seqlens_q: torch.Tensor
    context_slots: torch.Tensor
    cu_seqlens_k: torch.Tensor
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        check("cu_seqlens_q", self.cu_seqlens_q, (None,), torch.int32)
        check("cu_seqlens_k", self.cu_seqlens_k, tuple(self.cu_seqlens_q.shape), torch.int32)
        check("context_slots", self.context_slots, (None,), torch.int32)
        starts_q, starts_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        if not starts_q or starts_q[0] != 0 or starts_k[0] != 0:
            raise ShapeError("`cu_seqlens_q` and `cu_seqlens_k` must begin with 0")
        if starts_k[-1] != self.context_slots.numel():
            raise ShapeError(
                f"`cu_seqlens_k` ends with {starts_k[-1]} but `context_slots` has {self.context_slots.numel()} elements"
            )
        for n in range(len(starts_q) - 1):
            queries, context = starts_q[n + 1] - starts_q[n], starts_k[n + 1] - starts_k[n]
            if not 0 <= queries <= context:
                raise ShapeError(f"chunk {n} has {queries} queries and {context} context tokens")
        object.__setattr__(self, "num_tokens", starts_q[-1])


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Semantics:  out[t] = softmax(scale * q[t] . K^T) V over the keys that t sees. Query j of a chunk with len_q queries
                and len_k context tokens sits at path position len_k - len_q + j and sees positions 0 .. its own, of
                these the last `window`. Query head h reads key-value head h // (H / Hkv)
    Shapes:     q [T, H, D] . k, v [Tk, Hkv, D] . k_cache, v_cache [S, Hkv, D] . out [T, H, D]; Hkv divides H,
                D a multiple of 8 up to 256
    Numerics:   fp32; batch-invariant: a row's keys are reduced in tiles of path positions, wherever they lie
    Errors:     ShapeError when shapes do not fit . ValueError when `window` < 1 . IndexError when a slot is outside the
                cache or the step
    Source:     online softmax, arXiv 1805.02867; tiling, FlashAttention-2, arXiv 2307.08691
    """
    tokens, heads, head_dim = _check_heads(q, k_cache, v_cache, window)
    check("k", k, (None, k_cache.shape[1], head_dim))  # the step may have more rows than queries
    check("v", v, tuple(k.shape))
    if tokens != batch.num_tokens:
        raise ShapeError(f"`q` has {tokens} rows but `batch` describes {batch.num_tokens}")
    out = out_like("out", out, (tokens, heads, head_dim), q)
    backend = cpp if choose("attention.tree", q.device.type) == "cpp" else reference
    backend.tree_attention(q, k, v, k_cache, v_cache, batch, scale, window, out)
    return out


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Semantics:  one query a sequence, the last of its context: out[b] = softmax(scale * q[b] . K^T) V over positions
                0 .. context_lens[b] - 1, of these the last `window`; position p lies in cache row
                block_table[b, p // block_size] * block_size + p % block_size. Its own key is already in the cache
    Shapes:     q [B, H, D] . k_cache, v_cache [S, Hkv, D] . block_table [B, M] int32 . context_lens [B] int32 .
                out [B, H, D]; Hkv divides H, D a multiple of 8 up to 256
    Numerics:   fp32; batch-invariant, and bitwise what tree_attention gives for the same position (cpp)
    Errors:     ShapeError when shapes do not fit . ValueError when `window` < 1 . IndexError when a block or a context
                length is out of range; a context holds at least the query's own token
    Source:     PagedAttention, arXiv 2309.06180
    """
    sequences, heads, head_dim = _check_heads(q, k_cache, v_cache, window)
    check("block_table", block_table, (sequences, None), torch.int32)
    check("context_lens", context_lens, (sequences,), torch.int32)
    if block_size < 1:
        raise ShapeError(f"`block_size` is {block_size} but must be at least 1")
    out = out_like("out", out, (sequences, heads, head_dim), q)
    backend = cpp if choose("attention.paged_decode", q.device.type) == "cpp" else reference
    backend.paged_decode(q, k_cache, v_cache, block_table, context_lens, block_size, scale, window, out)
    return out


def _check_heads(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None
) -> tuple[int, int, int]:
    check("q", q, (None, None, None))
    rows, heads, head_dim = q.shape
    check("k_cache", k_cache, (None, None, head_dim))
    check("v_cache", v_cache, tuple(k_cache.shape))
    kv_heads = k_cache.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"`q` has {heads} heads, not a multiple of the {kv_heads} heads of the cache")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ShapeError(f"the head dimension is {head_dim} but must be a multiple of 8 from 8 to 256")
    if window is not None and window < 1:
        raise ValueError(f"`window` is {window} but must be at least 1, or None for no window")
    return rows, heads, head_dim
