"""One transformer block: attention and MLP around a residual that is kept in place.

Knows the order of norms and sums; does not know which architecture asked for it.
"""

from __future__ import annotations

import torch

from uma_engine.layers.attention import Attention
from uma_engine.layers.batch_input import BatchInput
from uma_engine.layers.linear import Adapters
from uma_engine.layers.mlp import GatedMLP
from uma_engine.layers.norm import RMSNorm

__all__ = ["Block"]


class Block:
    """Pre-norm block; with `post_attention_norm` and `post_mlp_norm` also each part's output is normed before the sum.

    The output of the MLP is not yet added: it is returned beside the residual, and the next norm adds it. Where products can add
    what they compute (on a GPU) and no norm comes between, nothing is left to add.
    """

    __slots__ = ("attention", "input_norm", "mlp", "mlp_norm", "post_attention_norm", "post_mlp_norm")

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP,
        input_norm: RMSNorm,
        mlp_norm: RMSNorm,
        post_attention_norm: RMSNorm | None = None,
        post_mlp_norm: RMSNorm | None = None,
    ) -> None:
        self.attention = attention
        self.mlp = mlp
        self.input_norm = input_norm
        self.mlp_norm = mlp_norm
        self.post_attention_norm = post_attention_norm
        self.post_mlp_norm = post_mlp_norm

    def __call__(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        batch: BatchInput,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        adapters: Adapters | None,
        prune: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(x, residual) [T, K] -> the same; with `prune` [R, K], the output rows alone. x None: nothing is left to add."""
        normed = self.input_norm(residual) if x is None else self.input_norm.add(x, residual)
        adds = self.post_attention_norm is None and self.post_mlp_norm is None
        adds = adds and self.attention.o_proj.adds and self.mlp.down_proj.adds
        if prune:
            assert batch.last_attention is not None
            residual, routing = residual.index_select(0, batch.output_rows), batch.output_lora_routing
            onto = residual if adds else None
            attended = self.attention.of_output_rows(
                normed, batch, batch.last_attention, k_cache, v_cache, adapters, onto
            )
        else:
            routing, onto = batch.lora_routing, residual if adds else None
            attended = self.attention(normed, batch, k_cache, v_cache, adapters, onto)
        if adds:
            self.mlp(self.mlp_norm(residual), routing, adapters, residual)
            return None, residual
        if self.post_attention_norm is not None:
            attended = self.post_attention_norm(attended)
        x = self.mlp(self.mlp_norm.add(attended, residual), routing, adapters)
        return (x if self.post_mlp_norm is None else self.post_mlp_norm(x)), residual
