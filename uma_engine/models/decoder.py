"""The decoder that every architecture is a variant of: what it declares, how it is built, one forward pass.

Knows layers and the shape of a model; does not know files, requests or sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from uma_engine.config import ModelConfig
from uma_engine.errors import InvariantViolation
from uma_engine.layers.attention import Attention, AttentionShape
from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
from uma_engine.layers.block import Block
from uma_engine.layers.embedding import Embedding
from uma_engine.layers.linear import Adapters, Linear, MergedLinear, Site, SiteGroup
from uma_engine.layers.mlp import Activation, GatedMLP
from uma_engine.layers.norm import RMSNorm
from uma_engine.layers.rotary import make_rotary_table
from uma_engine.models.taped_decode import TapedDecode
from uma_engine.models.weights import Reader, WeightSource
from uma_kernels.activation import swiglu
from uma_kernels.label_head import label_head
from uma_kernels.linear import PackedLinear, linear

__all__ = ["DecoderModel", "WeightSource"]


class DecoderModel:
    """A decoder-only model with packed weights, ready to run.

    `head` holds the weight of the logits [V, K]; a tied model shares it with the embedding. `num_bytes` is the memory
    of weights and rotary tables. `flops_per_token` counts the block's matrix products for one token (a multiply and
    an add are two), without attention and without logits. `precision` is the arithmetic of the blocks' linear layers
    (`uma_kernels.linear`), but of `fast` the last block's is `near`; logits are always exact.
    """

    # What an architecture declares; the rest is in its ModelConfig.
    activation: Activation = staticmethod(swiglu)
    head_norms = False  # RMS norm over each head of queries and keys
    post_norms = False  # norms after attention and after the MLP, besides those before
    scaled_embedding = False  # embeddings times sqrt(hidden_size)

    def __init__(self, config: ModelConfig, weights: Reader, max_positions: int, precision: str = "exact") -> None:
        self.config = config
        self.precision = precision
        self.max_positions = max_positions
        self.placement = weights.placement
        self._sites: dict[str, tuple[int, int]] = {}
        self._taped = TapedDecode(max_positions)
        self.between_layers: Callable[[], None] | None = None  # called before each layer, but not in a recorded decode
        self._groups: list[SiteGroup] = []
        c = config
        scale = c.hidden_size**0.5 if self.scaled_embedding else None
        embeddings = weights.linear("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), of_block=False)
        self.embedding = Embedding(embeddings, scale)
        tables = self._rotary_tables()
        self.blocks = [
            self._block(weights, layer, tables[c.window_of(layer) is not None]) for layer in range(c.num_layers)
        ]
        self.norm = RMSNorm(weights.vector("model.norm.weight", c.hidden_size), c.rms_norm_eps)
        self.head: PackedLinear = self.embedding.weight
        if not c.tie_word_embeddings:
            self.head = weights.linear("lm_head.weight", (c.vocab_size, c.hidden_size), of_block=False)
        weights.finish()
        self.num_bytes = weights.num_bytes + sum({id(t): t.nbytes for t in tables}.values())
        self.flops_per_token = 2 * sum(width_in * width_out for width_in, width_out in self._sites.values())

    def sites(self) -> dict[str, tuple[int, int]]:
        """Every place an adapter can change: site name -> (K, N), the widths in and out."""
        return dict(self._sites)

    def site_groups(self) -> list[SiteGroup]:
        """The sites again, in the order of the layers, those together whose outputs lie side by side."""
        return list(self._groups)

    @torch.inference_mode()
    def forward(self, batch: BatchInput, kv: KVCacheTensors, adapters: Adapters | None = None) -> torch.Tensor:
        """Final hidden states of the output rows, after the last norm: [R, hidden_size] of the weights' dtype.

        Writes the step's keys and values into `kv` at `batch.slot_mapping`. A row's bits depend on its tokens, its
        context and its adapter alone.

        Errors:  InvariantViolation when a position lies beyond `max_positions`
        """
        # On a device the host does not wait to look: the scheduler bounds the length of a path.
        if batch.positions.device.type == "cpu" and (highest := int(batch.positions.max())) >= self.max_positions:
            raise InvariantViolation(f"position {highest} is not below `max_positions` {self.max_positions}")
        # A step of decodes alone wants every row: there is nothing to prune.
        prune = batch.last_attention is not None and batch.num_decodes < batch.positions.shape[0]
        hidden = self._taped(self._layers, batch, kv, adapters) if self._taped.takes(batch) else None
        if hidden is None:
            hidden = self._layers(batch, kv, adapters, prune)
        return hidden if prune else hidden.index_select(0, batch.output_rows)

    def _layers(
        self, batch: BatchInput, kv: KVCacheTensors, adapters: Adapters | None, prune: bool = False
    ) -> torch.Tensor:
        """Hidden states after the last norm, of every row, with `prune` of the output rows."""
        residual, x = self.embedding(batch.input_ids), None  # x: what the next norm adds to the residual
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            if self.between_layers is not None:
                self.between_layers()
            x, residual = block(x, residual, batch, kv.k[layer], kv.v[layer], adapters, prune and layer == last)
        return self.norm(residual) if x is None else self.norm.add(x, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden_size] -> logits of the whole vocabulary [R, V], of the weights' dtype."""
        return linear(hidden, self.head)

    def label_logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden_size], token_ids [L] int64 -> logits of those tokens alone [R, L] fp32."""
        return label_head(hidden, torch.arange(hidden.shape[0], device=hidden.device), self.head, token_ids)

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of (full, sliding) layers; the same tensor unless sliding layers have a theta of their own."""
        c = self.config
        device = self.placement.device
        full = make_rotary_table(c.head_dim, c.rope_theta, c.rope_scaling, self.max_positions).to(device)
        if c.rope_local_theta is None:
            return full, full
        return full, make_rotary_table(c.head_dim, c.rope_local_theta, None, self.max_positions).to(device)

    def _block(self, weights: Reader, layer: int, table: torch.Tensor) -> Block:
        c = self.config
        is_last = layer == c.num_layers - 1  # which may be asked for its output rows alone
        # The last block makes almost half of the squared error of scores, and a ranking wants few of its rows: accuracy is cheap here.
        precision = "near" if is_last and self.precision == "fast" else self.precision
        hidden, inner = c.hidden_size, c.intermediate_size
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def merged(widths: dict[str, int], has_bias: bool) -> MergedLinear:
            sites = [Site(f"layers.{layer}.{name}", width) for name, width in widths.items()]
            packed = weights.linears([(f"model.{site.name}.weight", (site.width, hidden)) for site in sites])
            biases = [weights.vector(f"model.{site.name}.bias", site.width) for site in sites] if has_bias else None
            self._sites |= {site.name: (hidden, site.width) for site in sites}
            self._groups.append((hidden, tuple(sites)))
            return MergedLinear(sites, packed, None if biases is None else torch.cat(biases), precision)

        def projection(name: str, width_in: int, width_out: int, has_bias: bool) -> Linear:
            site = f"layers.{layer}.{name}"
            weight = weights.linear(f"model.{site}.weight", (width_out, width_in))
            self._sites[site] = (width_in, width_out)
            self._groups.append((width_in, (Site(site, width_out),)))
            bias = weights.vector(f"model.{site}.bias", width_out) if has_bias else None
            return Linear(site, weight, bias, precision)

        def norm(name: str, width: int = hidden) -> RMSNorm:
            return RMSNorm(weights.vector(f"model.layers.{layer}.{name}.weight", width), c.rms_norm_eps)

        q = {"self_attn.q_proj": q_width}
        kv = {"self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}
        attention = Attention(
            AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, c.scale, c.window_of(layer)),
            (
                (projection("self_attn.q_proj", hidden, q_width, c.attention_bias), merged(kv, c.attention_bias))
                if is_last
                else merged(q | kv, c.attention_bias)
            ),
            projection("self_attn.o_proj", q_width, hidden, c.attention_output_bias),
            (norm("self_attn.q_norm", c.head_dim), norm("self_attn.k_norm", c.head_dim))
            if self.head_norms
            else (None, None),
            table,
        )
        mlp = GatedMLP(
            merged({"mlp.gate_proj": inner, "mlp.up_proj": inner}, c.mlp_bias),
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
