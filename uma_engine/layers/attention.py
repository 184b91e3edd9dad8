"""Self-attention of one layer: projections, norms of heads, rotary positions, the KV cache, and who sees whom.

Knows the tensors of one step; does not know segments, blocks or the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_engine.layers.batch_input import BatchInput, DecodeBatch, Routing
from uma_engine.layers.linear import Adapters, Linear, MergedLinear
from uma_engine.layers.norm import RMSNorm
from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention
from uma_kernels.check import empty_rows
from uma_kernels.rope import HeadNorm, norm_rope, norm_rope_write

__all__ = ["Attention", "AttentionShape"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """`scale` multiplies q.k; `window` is how many tokens a row sees, itself included, None for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class Attention:
    """Grouped-query attention over cached keys and the keys of this step.

    `qkv_proj` gives queries, keys and values side by side; a layer that is asked for its output rows alone has queries
    apart from keys and values instead. `q_norm` and `k_norm` are norms over each head (None where the architecture has
    none); `table` is the rotary table, shared by all layers of the same theta.
    """

    __slots__ = ("k_norm", "o_proj", "q_norm", "qkv_proj", "shape", "table")

    def __init__(
        self,
        shape: AttentionShape,
        qkv_proj: MergedLinear | tuple[Linear, MergedLinear],
        o_proj: Linear,
        norms: tuple[RMSNorm | None, RMSNorm | None],
        table: torch.Tensor,
    ) -> None:
        self.shape = shape
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.q_norm, self.k_norm = norms
        self.table = table

    def __call__(
        self,
        x: torch.Tensor,
        batch: BatchInput,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        adapters: Adapters | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, K] -> [T, K]; keys and values are written to the cache at the step's slots. With a `residual` the result is
        added to it in place, and it is returned."""
        routing = batch.lora_routing
        if isinstance(self.qkv_proj, MergedLinear):
            qkv = self.qkv_proj(x, routing, adapters)
            q_width = self.shape.num_heads * self.shape.head_dim
            q, kv = qkv[:, :q_width], qkv[:, q_width:]
        else:
            q_proj, kv_proj = self.qkv_proj
            q, kv = q_proj(x, routing, adapters), kv_proj(x, routing, adapters)
        q, (k, v) = self._heads(q), self._keys_and_values(kv)
        norms = _norm_of(self.q_norm), _norm_of(self.k_norm)
        norm_rope_write(q, k, v, batch.positions, self.table, k_cache, v_cache, batch.slot_mapping, norms)
        out = self._attend(q, k, v, batch.decode, batch.attention, k_cache, v_cache)
        return self._output(out, routing, adapters, residual)

    def of_output_rows(
        self,
        x: torch.Tensor,
        batch: BatchInput,
        last_attention: AttentionBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        adapters: Adapters | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, K] -> [R, K]: keys and values of every row, queries of the output rows alone; `residual` [R, K] as above."""
        assert isinstance(self.qkv_proj, tuple)
        q_proj, kv_proj = self.qkv_proj
        k, v = self._keys_and_values(kv_proj(x, batch.lora_routing, adapters))
        norms = None, _norm_of(self.k_norm)
        norm_rope_write(k[:, :0], k, v, batch.positions, self.table, k_cache, v_cache, batch.slot_mapping, norms)
        rows, routing = batch.output_rows, batch.output_lora_routing
        q = self._heads(q_proj(x.index_select(0, rows), routing, adapters))
        norm_rope(q, batch.positions.index_select(0, rows), self.table, _norm_of(self.q_norm))
        out = self._attend(q, k, v, batch.decode, last_attention, k_cache, v_cache)
        return self._output(out, routing, adapters, residual)

    def _heads(self, q: torch.Tensor) -> torch.Tensor:
        return q.view(q.shape[0], self.shape.num_heads, self.shape.head_dim)

    def _keys_and_values(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = kv.view(kv.shape[0], 2 * self.shape.num_kv_heads, self.shape.head_dim)
        return both[:, : self.shape.num_kv_heads], both[:, self.shape.num_kv_heads :]

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decode: DecodeBatch | None,
        attention: AttentionBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        """The rows of `decode` first, those of `attention` after them; k and v of all rows of the step."""
        s = self.shape
        if decode is None:
            return tree_attention(q, k, v, k_cache, v_cache, attention, s.scale, s.window)
        out, n = empty_rows(tuple(q.shape), q), decode.num_rows
        paged_decode(
            q[:n],
            k_cache,
            v_cache,
            decode.block_table,
            decode.context_lens,
            decode.block_size,
            s.scale,
            s.window,
            out[:n],
        )
        first = 0 if decode.padded else n
        if first < q.shape[0]:
            tree_attention(q[first:], k, v, k_cache, v_cache, attention, s.scale, s.window, out[first:])
        return out

    def _output(
        self, out: torch.Tensor, routing: Routing | None, adapters: Adapters | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        joined = out.view(out.shape[0], self.shape.num_heads * self.shape.head_dim)
        return self.o_proj(joined, routing, adapters, residual)


def _norm_of(norm: RMSNorm | None) -> HeadNorm | None:
    return None if norm is None else (norm.weight, norm.eps)
