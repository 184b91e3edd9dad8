"""Attention over a tree of segments, and over block tables for decoding.

Knows queries, keys, values and where each key lies; does not know requests, segments' text or who owns a cache slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch

from uma_kernels.attention import cpp, reference
from uma_kernels.attention.plan import Ints, TreePlan, build
from uma_kernels.check import FLOATS, ShapeError, check, out_like
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
    plans: dict[tuple[torch.device, int, int, int | None], TreePlan] = field(
        init=False, repr=False, default_factory=dict
    )
    _slot_range: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check("cu_seqlens_q", self.cu_seqlens_q, (None,), torch.int32)
        check("cu_seqlens_k", self.cu_seqlens_k, tuple(self.cu_seqlens_q.shape), torch.int32)
        check("context_slots", self.context_slots, (None,), torch.int32)
        starts_q, starts_k, slots = self._on_host()
        if not len(starts_q) or starts_q[0] != 0 or starts_k[0] != 0:
            raise ShapeError("`cu_seqlens_q` and `cu_seqlens_k` must begin with 0")
        if starts_k[-1] != len(slots):
            raise ShapeError(f"`cu_seqlens_k` ends with {starts_k[-1]} but `context_slots` has {len(slots)} elements")
        queries, context = np.diff(starts_q), np.diff(starts_k)
        bad = np.flatnonzero((queries < 0) | (queries > context))
        if len(bad):
            n = int(bad[0])
            raise ShapeError(f"chunk {n} has {queries[n]} queries and {context[n]} context tokens")
        object.__setattr__(self, "num_tokens", int(starts_q[-1]))
        object.__setattr__(self, "_slot_range", (int(slots.min()), int(slots.max())) if len(slots) else (0, -1))

    def plan(self, device: torch.device, block_q: int, block_n: int, window: int | None) -> TreePlan:
        """The schedule of the step on a device, for one tile size and window: built by the first layer that asks.

        A captured graph reads the addresses it was captured with: who replays one puts a plan of its own tensors into
        `plans` (programs with no rows do nothing) and copies each step's into them.
        """
        key = (device, block_q, block_n, window)
        found = self.plans.get(key)
        if found is None:
            found = self.plans[key] = build(*self._on_host(), block_q, block_n, window, device)
        return found

    def check_slots(self, step_rows: int, cache_slots: int) -> None:
        """IndexError unless every slot names one of `step_rows` rows of the step or of `cache_slots` of the cache."""
        low, high = self._slot_range
        if low < -step_rows or high >= cache_slots:
            raise IndexError(f"`context_slots` reaches {low} .. {high}, outside {-step_rows} .. {cache_slots - 1}")

    def _on_host(self) -> tuple[Ints, Ints, Ints]:
        """The offsets of queries and of keys, and the slots."""
        return self.cu_seqlens_q.cpu().numpy(), self.cu_seqlens_k.cpu().numpy(), self.context_slots.cpu().numpy()


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
                D a multiple of 8 up to 256; rows of q, k and v at any stride
    Numerics:   fp32, bf16 or fp16, all alike; fp32 inside, the weights rounded to the dtype of v where that has a matrix
                unit (triton). Batch-invariant: a row's keys are reduced in tiles of path positions, wherever they lie
    Errors:     ShapeError when shapes do not fit . ValueError when `window` < 1, or `scale` <= 0 (triton) . IndexError
                when a slot is outside the cache or the step
    Source:     online softmax, arXiv 1805.02867; tiling, FlashAttention-2, arXiv 2307.08691
    """
    tokens, heads, head_dim = _check_heads(q, k_cache, v_cache, window)
    check("k", k, (None, k_cache.shape[1], head_dim), q.dtype, strided=True)  # the step may have more rows than queries
    check("v", v, tuple(k.shape), q.dtype, strided=True)
    if tokens != batch.num_tokens:
        raise ShapeError(f"`q` has {tokens} rows but `batch` describes {batch.num_tokens}")
    out = out_like("out", out, (tokens, heads, head_dim), q)
    _backend("attention.tree", q).tree_attention(q, k, v, k_cache, v_cache, batch, scale, window, out)
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
                out [B, H, D]; Hkv divides H, D a multiple of 8 up to 256; rows of q at any stride
    Numerics:   as tree_attention; batch-invariant, and bitwise what tree_attention gives for the same position (cpp). On a
                GPU the context is cut into splits of a fixed length that are joined from the front: other bits
    Errors:     ShapeError when shapes do not fit . ValueError when `window` < 1, or `scale` <= 0 (triton) . IndexError
                when a block or a context length is out of range; a context holds at least the query's own token. Where
                values may not be looked at (check.readable) such a sequence gives NaN, and zeros without any context
    Source:     PagedAttention, arXiv 2309.06180
    """
    sequences, heads, head_dim = _check_heads(q, k_cache, v_cache, window)
    check("block_table", block_table, (sequences, None), torch.int32)
    check("context_lens", context_lens, (sequences,), torch.int32)
    if block_size < 1:
        raise ShapeError(f"`block_size` is {block_size} but must be at least 1")
    out = out_like("out", out, (sequences, heads, head_dim), q)
    _backend("attention.paged_decode", q).paged_decode(
        q, k_cache, v_cache, block_table, context_lens, block_size, scale, window, out
    )
    return out


def _backend(op: str, q: torch.Tensor) -> ModuleType:
    name = choose(op, q.device.type)
    if name == "triton":
        from uma_kernels.attention import triton_kernel  # only where it is used: it imports triton

        return triton_kernel
    return cpp if name == "cpp" and q.dtype == torch.float32 else reference


def _check_heads(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None
) -> tuple[int, int, int]:
    check("q", q, (None, None, None), FLOATS, strided=True)
    rows, heads, head_dim = q.shape
    check("k_cache", k_cache, (None, None, head_dim), q.dtype)
    check("v_cache", v_cache, tuple(k_cache.shape), q.dtype)
    kv_heads = k_cache.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"`q` has {heads} heads, not a multiple of the {kv_heads} heads of the cache")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ShapeError(f"the head dimension is {head_dim} but must be a multiple of 8 from 8 to 256")
    if window is not None and window < 1:
        raise ValueError(f"`window` is {window} but must be at least 1, or None for no window")
    return rows, heads, head_dim
