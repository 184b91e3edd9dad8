"""Self-attention of one layer: projections, norms of heads, rotary positions, the KV cache, and who sees whom.

Knows the tensors of one step; does not know segments, blocks or the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_engine.layers.batch_input import BatchInput, Routing
from uma_engine.layers.linear import Adapters, Linear, MergedLinear
from uma_engine.layers.norm import RMSNorm
from uma_kernels import kv_cache
from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention
from uma_kernels.check import empty_rows
from uma_kernels.rope import rope

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
        q, (k, v) = self._queries(q), self._keys_and_values(kv)
        rope(q, k, batch.positions, self.table)
        kv_cache.write(k, v, k_cache, v_cache, batch.slot_mapping)
        return self._output(self._attend(q, k, v, batch, k_cache, v_cache), routing, adapters, residual)

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
        rope(k[:, :0], k, batch.positions, self.table)
        kv_cache.write(k, v, k_cache, v_cache, batch.slot_mapping)
        rows, routing = batch.output_rows, batch.output_lora_routing
        q = self._queries(q_proj(x.index_select(0, rows), routing, adapters))
        rope(q, q[:, :0], batch.positions.index_select(0, rows), self.table)
        s = self.shape
        out = tree_attention(q, k, v, k_cache, v_cache, last_attention, s.scale, s.window)
        return self._output(out, routing, adapters, residual)

    def _queries(self, q: torch.Tensor) -> torch.Tensor:
        q = q.view(q.shape[0], self.shape.num_heads, self.shape.head_dim)
        return q if self.q_norm is None else self.q_norm.in_place(q)

    def _keys_and_values(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = kv.view(kv.shape[0], 2 * self.shape.num_kv_heads, self.shape.head_dim)
        k, v = both[:, : self.shape.num_kv_heads], both[:, self.shape.num_kv_heads :]
        return (k if self.k_norm is None else self.k_norm.in_place(k)), v

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: BatchInput,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        s, decode = self.shape, batch.decode
        if decode is None:
            return tree_attention(q, k, v, k_cache, v_cache, batch.attention, s.scale, s.window)
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
        if n < q.shape[0]:
            tree_attention(q[n:], k, v, k_cache, v_cache, batch.attention, s.scale, s.window, out[n:])
        return out

    def _output(
        self, out: torch.Tensor, routing: Routing | None, adapters: Adapters | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        joined = out.view(out.shape[0], self.shape.num_heads * self.shape.head_dim)
        return self.o_proj(joined, routing, adapters, residual)
