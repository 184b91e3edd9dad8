"""The decoder that every architecture is a variant of: what it declares, how it is built, one forward pass.

Knows layers and the shape of a model; does not know files, requests or sampling.
"""

from __future__ import annotations

import torch

from uma_engine.config import ModelConfig
from uma_engine.errors import InvariantViolation
from uma_engine.layers.attention import Attention, AttentionShape
from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
from uma_engine.layers.block import Block
from uma_engine.layers.embedding import Embedding
from uma_engine.layers.linear import AdapterSites, Linear
from uma_engine.layers.mlp import Activation, GatedMLP
from uma_engine.layers.norm import RMSNorm
from uma_engine.layers.rotary import make_rotary_table
from uma_engine.models.weights import WeightReader, WeightSource
from uma_kernels.activation import swiglu
from uma_kernels.label_head import label_head
from uma_kernels.linear import PackedLinear, linear

__all__ = ["DecoderModel", "WeightSource"]


class DecoderModel:
    """A decoder-only model with packed weights, ready to run.

    `head` holds the weight of the logits [V, K]; a tied model shares it with the embedding. `num_bytes` is the memory
    of weights and rotary tables. `flops_per_token` counts the block's matrix products for one token (a multiply and
    an add are two), without attention and without logits. `precision` is the arithmetic of the blocks' linear layers
    (`uma_kernels.linear`); logits are always exact.
    """

    # What an architecture declares; the rest is in its ModelConfig.
    activation: Activation = staticmethod(swiglu)
    head_norms = False  # RMS norm over each head of queries and keys
    post_norms = False  # norms after attention and after the MLP, besides those before
    scaled_embedding = False  # embeddings times sqrt(hidden_size)

    def __init__(
        self, config: ModelConfig, weights: WeightReader, max_positions: int, precision: str = "exact"
    ) -> None:
        self.config = config
        self.precision = precision
        self.max_positions = max_positions
        self._sites: dict[str, tuple[int, int]] = {}
        c = config
        scale = c.hidden_size**0.5 if self.scaled_embedding else None
        self.embedding = Embedding(weights.linear("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)), scale)
        tables = self._rotary_tables()
        self.blocks = [
            self._block(weights, layer, tables[c.window_of(layer) is not None]) for layer in range(c.num_layers)
        ]
        self.norm = RMSNorm(weights.vector("model.norm.weight", c.hidden_size), c.rms_norm_eps)
        self.head: PackedLinear = self.embedding.weight
        if not c.tie_word_embeddings:
            self.head = weights.linear("lm_head.weight", (c.vocab_size, c.hidden_size))
        weights.finish()
        self.num_bytes = weights.num_bytes + sum({id(t): t.nbytes for t in tables}.values())
        self.flops_per_token = 2 * sum(width_in * width_out for width_in, width_out in self._sites.values())

    def sites(self) -> dict[str, tuple[int, int]]:
        """Every place an adapter can change: site name -> (K, N), the widths in and out."""
        return dict(self._sites)

    @torch.inference_mode()
    def forward(self, batch: BatchInput, kv: KVCacheTensors, adapters: AdapterSites | None = None) -> torch.Tensor:
        """Final hidden states of the output rows, after the last norm: [R, hidden_size] fp32.

        Writes the step's keys and values into `kv` at `batch.slot_mapping`. A row's bits depend on its tokens, its
        context and its adapter alone.

        Errors:  InvariantViolation when a position lies beyond `max_positions`
        """
        if (last_position := int(batch.positions.max())) >= self.max_positions:
            raise InvariantViolation(f"position {last_position} is not below `max_positions` {self.max_positions}")
        # A step of decodes alone wants every row: there is nothing to prune.
        prune = batch.last_attention is not None and batch.num_decodes < batch.positions.shape[0]
        residual, x = self.embedding(batch.input_ids), None
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x, residual = block(x, residual, batch, kv.k[layer], kv.v[layer], adapters, prune and layer == last)
        assert x is not None  # a model has at least one layer
        hidden = self.norm.add(x, residual)
        return hidden if prune else hidden.index_select(0, batch.output_rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden_size] -> logits of the whole vocabulary [R, V] fp32."""
        return linear(hidden, self.head)

    def label_logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden_size], token_ids [L] int64 -> logits of those tokens alone [R, L] fp32."""
        return label_head(hidden, torch.arange(hidden.shape[0]), self.head, token_ids)

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of (full, sliding) layers; the same tensor unless sliding layers have a theta of their own."""
        c = self.config
        full = make_rotary_table(c.head_dim, c.rope_theta, c.rope_scaling, self.max_positions)
        if c.rope_local_theta is None:
            return full, full
        return full, make_rotary_table(c.head_dim, c.rope_local_theta, None, self.max_positions)

    def _block(self, weights: WeightReader, layer: int, table: torch.Tensor) -> Block:
        c = self.config
        hidden, inner = c.hidden_size, c.intermediate_size
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def projection(name: str, width_in: int, width_out: int, has_bias: bool) -> Linear:
            site = f"layers.{layer}.{name}"
            weight = weights.linear(f"model.{site}.weight", (width_out, width_in))
            self._sites[site] = (width_in, width_out)
            bias = weights.vector(f"model.{site}.bias", width_out) if has_bias else None
            return Linear(site, weight, bias, self.precision)

        def norm(name: str, width: int = hidden) -> RMSNorm:
            return RMSNorm(weights.vector(f"model.layers.{layer}.{name}.weight", width), c.rms_norm_eps)

        attention = Attention(
            AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, c.scale, c.window_of(layer)),
            (
                projection("self_attn.q_proj", hidden, q_width, c.attention_bias),
                projection("self_attn.k_proj", hidden, kv_width, c.attention_bias),
                projection("self_attn.v_proj", hidden, kv_width, c.attention_bias),
                projection("self_attn.o_proj", q_width, hidden, c.attention_output_bias),
            ),
            (norm("self_attn.q_norm", c.head_dim), norm("self_attn.k_norm", c.head_dim))
            if self.head_norms
            else (None, None),
            table,
        )
        mlp = GatedMLP(
            projection("mlp.gate_proj", hidden, inner, c.mlp_bias),
            projection("mlp.up_proj", hidden, inner, c.mlp_bias),
            projection("mlp.down_proj", inner, hidden, c.mlp_bias),
            self.activation,
        )
        if not self.post_norms:
            return Block(attention, mlp, norm("input_layernorm"), norm("post_attention_layernorm"))
        return Block(
            attention,
            mlp,
            input_norm=norm("input_layernorm"),
            mlp_norm=norm("pre_feedforward_layernorm"),
            post_attention_norm=norm("post_attention_layernorm"),
            post_mlp_norm=norm("post_feedforward_layernorm"),
        )
