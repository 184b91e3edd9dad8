"""Self-attention of one layer: projections, norms of heads, rotary positions, the KV cache, and who sees whom.

Knows the tensors of one step; does not know segments, blocks or the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_engine.layers.batch_input import BatchInput
from uma_engine.layers.linear import AdapterSites, Linear
from uma_engine.layers.norm import RMSNorm
from uma_kernels import kv_cache
from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention
from uma_kernels.lora import LoraRouting
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

    `q_norm` and `k_norm` are norms over each head (None where the architecture has none); `table` is the rotary table,
    shared by all layers of the same theta.
    """

    __slots__ = ("k_norm", "k_proj", "o_proj", "q_norm", "q_proj", "shape", "table", "v_proj")

    def __init__(
        self,
        shape: AttentionShape,
        projections: tuple[Linear, Linear, Linear, Linear],
        norms: tuple[RMSNorm | None, RMSNorm | None],
        table: torch.Tensor,
    ) -> None:
        self.shape = shape
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections
        self.q_norm, self.k_norm = norms
        self.table = table

    def __call__(
        self,
        x: torch.Tensor,
        batch: BatchInput,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        adapters: AdapterSites | None,
    ) -> torch.Tensor:
        """x [T, K] -> [T, K]; keys and values are written to the cache at the step's slots."""
        routing = batch.lora_routing
        q = self._queries(x, routing, adapters)
        k, v = self._keys_and_values(x, routing, adapters)
        rope(q, k, batch.positions, self.table)
        kv_cache.write(k, v, k_cache, v_cache, batch.slot_mapping)
        return self._output(self._attend(q, k, v, batch, k_cache, v_cache), routing, adapters)

    def of_output_rows(
        self,
        x: torch.Tensor,
        batch: BatchInput,
        last_attention: AttentionBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        adapters: AdapterSites | None,
    ) -> torch.Tensor:
        """x [T, K] -> [R, K]: keys and values of every row, queries of the output rows alone."""
        k, v = self._keys_and_values(x, batch.lora_routing, adapters)
        rope(k[:, :0], k, batch.positions, self.table)
        kv_cache.write(k, v, k_cache, v_cache, batch.slot_mapping)
        rows, routing = batch.output_rows, batch.output_lora_routing
        q = self._queries(x.index_select(0, rows), routing, adapters)
        rope(q, q[:, :0], batch.positions.index_select(0, rows), self.table)
        s = self.shape
        out = tree_attention(q, k, v, k_cache, v_cache, last_attention, s.scale, s.window)
        return self._output(out, routing, adapters)

    def _queries(self, x: torch.Tensor, routing: LoraRouting | None, adapters: AdapterSites | None) -> torch.Tensor:
        q = self.q_proj(x, routing, adapters).view(x.shape[0], self.shape.num_heads, self.shape.head_dim)
        return q if self.q_norm is None else self.q_norm(q)

    def _keys_and_values(
        self, x: torch.Tensor, routing: LoraRouting | None, adapters: AdapterSites | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        by_head = (x.shape[0], self.shape.num_kv_heads, self.shape.head_dim)
        k = self.k_proj(x, routing, adapters).view(by_head)
        v = self.v_proj(x, routing, adapters).view(by_head)
        return (k if self.k_norm is None else self.k_norm(k)), v

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
        out, n = torch.empty_like(q), decode.num_rows
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

    def _output(self, out: torch.Tensor, routing: LoraRouting | None, adapters: AdapterSites | None) -> torch.Tensor:
        return self.o_proj(out.view(out.shape[0], self.shape.num_heads * self.shape.head_dim), routing, adapters)
