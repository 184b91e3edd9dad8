"""Turns a loaded model into an ONNX graph that gives label logits: layer by layer, from the very objects that the engine runs.

Knows the layers and what each of them means in ONNX's operators; does not know architectures (their model classes have put
the layers together), files' formats or how the graph is run.

The graph, for B prompts of S new tokens each behind P tokens that they share:
  input_ids [B, S] int64, filled up on the right with any id . last [B] int64, each row's last token in S
  label_ids [L] int64 . past_key.i, past_value.i [B or 1, Hkv, P, D] of each layer i, one for all rows or one each; P may be 0
  label_logits [B, L] . present_key.i, present_value.i [B, Hkv, P + S, D]
No row sees another, and filling comes after a row's own tokens: none of them sees it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from uma_engine.adapters import LoadedAdapter, load_adapter
from uma_engine.adapters.loader import MAX_RANK
from uma_engine.catalog.model_files import ModelFiles
from uma_engine.errors import InvalidRequest, UmaError, UnsupportedModel
from uma_engine.layers.attention import Attention
from uma_engine.layers.block import Block
from uma_engine.layers.linear import Linear, MergedLinear, Site
from uma_engine.layers.mlp import GatedMLP
from uma_engine.layers.norm import RMSNorm
from uma_engine.models import DecoderModel, load_model
from uma_engine.models.weights import Progress
from uma_engine.onnx.graph import GraphWriter
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.dispatch import use_backend
from uma_kernels.linear import PackedLinear, gather_rows
from uma_kernels.lora import PackedLora

__all__ = ["FORMAT", "export_onnx"]

FORMAT = 1  # of inputs, outputs and metadata
DEFAULT_MAX_MODEL_LEN = 8192


@torch.inference_mode()
def export_onnx(
    files: ModelFiles,
    directory: str | Path,
    *,
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `model.onnx` and its weights, in fp32, to the new directory `directory`; returns it.

    Quantised weights are dequantised. `adapter`, a PEFT directory, is merged: w + scaling * b @ a, computed in fp64 and
    rounded once. `max_model_len` bounds prompts, as in the engine. All or nothing: the directory appears when it is whole.

    Errors:  InvalidRequest when the directory exists and is not empty, or for another `max_model_len`; MissingPackage
             without `onnx`; UmaError when the disk is full; as `load_model` and `load_adapter`
    """
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(f"`{target}` exists and is not an empty directory", hint="name a new one", param="onnx")
    limit = files.config.max_position_embeddings
    length = min(limit, DEFAULT_MAX_MODEL_LEN) if max_model_len is None else max_model_len
    if not 1 <= length <= limit:
        raise InvalidRequest(
            f"`max_model_len` is {length} but the model was made for 1 to {limit} positions", param="max_model_len"
        )
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        scratch.chmod(0o755)
        # The reference back end's packed weights and adapters are plain tensors.
        with contextlib.closing(GraphWriter(scratch)) as graph, use_backend("reference"):
            model = load_model(files, max_positions=length, progress=progress)
            loaded = None if adapter is None else load_adapter(adapter, model.sites(), MAX_RANK)
            _Exporter(model, {} if loaded is None else loaded.packed, graph).run()
            graph.save(_metadata(files, model, loaded))
        scratch.replace(target)
    except OSError as error:  # a full disk, a parent that is no directory
        raise UmaError(f"`{target}` cannot be written: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _metadata(files: ModelFiles, model: DecoderModel, adapter: LoadedAdapter | None) -> dict[str, str]:
    c = model.config
    numbers = {"num_layers": c.num_layers, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
    numbers |= {"vocab_size": c.vocab_size, "max_model_len": model.max_positions, "format": FORMAT}
    digests = {"base_digest": files.digest, "adapter_digest": adapter.digest.hex() if adapter else ""}
    return {f"uma.{name}": str(value) for name, value in {**numbers, **digests, "architecture": c.architecture}.items()}


class _Exporter:
    """Walks one model. Hidden states are [B, S, K] until the last layer has picked each row's last token: then [B, K]."""

    def __init__(self, model: DecoderModel, adapter: Mapping[str, PackedLora], graph: GraphWriter) -> None:
        self.model = model
        self.adapter = adapter
        self.graph = graph
        self.tables: dict[int, tuple[str, str]] = {}
        self.num_norms = 0
        self.masks: dict[tuple[int, int | None], str] = {}

    def run(self) -> None:
        g, model = self.graph, self.model
        input_ids = g.input("input_ids", np.int64, ("batch", "new"))
        self.last = g.input("last", np.int64, ("batch",))
        label_ids = g.input("label_ids", np.int64, ("labels",))
        c = model.config
        past_shape = ("past_batch", c.num_kv_heads, "past", c.head_dim)
        self.past = [
            tuple(g.input(f"past_{kind}.{i}", np.float32, past_shape) for kind in ("key", "value"))
            for i in range(c.num_layers)
        ]
        self._positions(input_ids)
        embedding = g.weight("embed_tokens", _dense([model.embedding.weight]))
        residual = g.node("Gather", embedding, input_ids)
        if model.embedding.scale is not None:
            residual = g.node("Mul", residual, g.number(float(model.embedding.scale)))
        x = None
        for layer, block in enumerate(model.blocks):
            x, residual = self._block(layer, block, x, residual, layer == c.num_layers - 1)
        assert x is not None  # a model has at least one layer
        hidden = self._norm(model.norm, g.node("Add", residual, x))
        head = embedding if model.head is model.embedding.weight else g.weight("lm_head", _dense([model.head]))
        rows = g.node("Gather", head, label_ids)
        logits = g.node("MatMul", hidden, g.node("Transpose", rows, perm=[1, 0]))
        g.output("label_logits", logits, np.float32, ("batch", "labels"))

    def _positions(self, input_ids: str) -> None:
        """Sizes of this run, the positions of its columns [S], of each row's last token [B], and of all keys [P + S]."""
        g = self.graph
        sizes = g.node("Shape", input_ids)
        self.batch = g.node("Slice", sizes, g.ints(0), g.ints(1))
        new = g.node("Gather", sizes, g.number(1))
        past = g.node("Gather", g.node("Shape", self.past[0][0]), g.number(2))
        total = g.node("Add", past, new)
        self.columns = g.node("Range", past, total, g.number(1))
        self.keys = g.node("Range", g.number(0), total, g.number(1))
        self.last_positions = g.node("Add", self.last, past)
        self.last_index = g.node("Unsqueeze", self.last, g.ints(1))

    def _block(self, layer: int, block: Block, x: str | None, residual: str, is_last: bool) -> tuple[str, str]:
        g = self.graph
        if x is not None:
            residual = g.node("Add", residual, x)
        attended = self._attention(layer, block.attention, self._norm(block.input_norm, residual), is_last)
        if block.post_attention_norm is not None:
            attended = self._norm(block.post_attention_norm, attended)
        if is_last:
            residual = self._last_rows(residual)
        residual = g.node("Add", residual, attended)
        x = self._mlp(block.mlp, self._norm(block.mlp_norm, residual))
        return (x if block.post_mlp_norm is None else self._norm(block.post_mlp_norm, x)), residual

    def _last_rows(self, x: str) -> str:
        return self.graph.node("GatherND", x, self.last_index, batch_dims=1)

    # Attention

    def _attention(self, layer: int, attention: Attention, x: str, is_last: bool) -> str:
        """x [B, S, K] -> [B, S, K], in the last layer [B, K]."""
        g, s = self.graph, attention.shape
        q_width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        if isinstance(attention.qkv_proj, MergedLinear):
            widths = g.ints(q_width, kv_width, kv_width)
            rows, k, v = g.nodes("Split", 3, self._merged(attention.qkv_proj, x), widths, axis=-1)
            rows = self._last_rows(rows) if is_last else rows
        else:
            q_proj, kv_proj = attention.qkv_proj
            k, v = g.nodes("Split", 2, self._merged(kv_proj, x), g.ints(kv_width, kv_width), axis=-1)
            rows = self._linear(q_proj, self._last_rows(x) if is_last else x)
        columns, last = self._rotary(attention.table)
        k = self._rope(self._heads(k, s.num_kv_heads, s.head_dim, attention.k_norm), s.head_dim, columns)
        k, v = self._cached(layer, k, self._heads(v, s.num_kv_heads, s.head_dim, None))
        if is_last:  # [B, H * D]: one query a row
            q = g.node("Reshape", rows, g.ints(0, s.num_heads, 1, s.head_dim))
            q = q if attention.q_norm is None else self._norm(attention.q_norm, q)
            q = self._rope(q, s.head_dim, last)
        else:
            q = self._rope(self._heads(rows, s.num_heads, s.head_dim, attention.q_norm), s.head_dim, columns)
        # Heads that share keys become rows of one product.
        q = g.node("Reshape", q, g.ints(0, s.num_kv_heads, -1, s.head_dim))
        scores = g.node("MatMul", g.node("Mul", q, g.number(float(s.scale))), g.node("Transpose", k, perm=[0, 1, 3, 2]))
        mask = self._last_mask(s.window) if is_last else self._mask(s.num_heads // s.num_kv_heads, s.window)
        out = g.node("MatMul", g.node("Softmax", g.node("Add", scores, mask), axis=-1), v)
        out = g.node("Reshape", out, g.ints(0, s.num_heads, -1, s.head_dim))
        out = g.node("Transpose", out, perm=[0, 2, 1, 3])
        shape = g.ints(0, q_width) if is_last else g.ints(0, 0, q_width)
        return self._linear(attention.o_proj, g.node("Reshape", out, shape))

    def _heads(self, x: str, heads: int, head_dim: int, norm: RMSNorm | None) -> str:
        """[B, S, H * D] -> [B, H, S, D]"""
        g = self.graph
        x = g.node("Reshape", x, g.ints(0, 0, heads, head_dim))
        return g.node("Transpose", x if norm is None else self._norm(norm, x), perm=[0, 2, 1, 3])

    def _cached(self, layer: int, k: str, v: str) -> tuple[str, str]:
        """Keys and values of the past and of this run."""
        g, c = self.graph, self.model.config
        shape = ("batch", c.num_kv_heads, "total", c.head_dim)
        everywhere = g.node("Concat", self.batch, g.ints(1, 1, 1), axis=0)
        whole = []
        for kind, past, new in zip(("key", "value"), self.past[layer], (k, v), strict=True):
            joined = g.node("Concat", g.node("Expand", past, everywhere), new, axis=2)
            g.output(f"present_{kind}.{layer}", joined, np.float32, shape)
            whole.append(joined)
        return whole[0], whole[1]

    def _rotary(self, table: torch.Tensor) -> tuple[str, str]:
        """The angles, cosines then sines, of the columns [S, D] and of the last tokens [B, 1, 1, D]."""
        g = self.graph
        if id(table) not in self.tables:
            name = g.weight(f"rotary.{len(self.tables)}", table)
            last = g.node("Unsqueeze", g.node("Gather", name, self.last_positions), g.ints(1, 2))
            self.tables[id(table)] = g.node("Gather", name, self.columns), last
        return self.tables[id(table)]

    def _rope(self, x: str, head_dim: int, angles: str) -> str:
        """x [B, H, S, D], its halves turned as `uma_kernels.rope` does it."""
        g, halves = self.graph, self.graph.ints(head_dim // 2, head_dim // 2)
        cos, sin = g.nodes("Split", 2, angles, halves, axis=-1)
        first, second = g.nodes("Split", 2, x, halves, axis=-1)
        turned = (
            g.node("Sub", g.node("Mul", first, cos), g.node("Mul", second, sin)),
            g.node("Add", g.node("Mul", second, cos), g.node("Mul", first, sin)),
        )
        return g.node("Concat", *turned, axis=-1)

    def _mask(self, group: int, window: int | None) -> str:
        """[G * S, P + S]: the columns' mask once for each of the heads that share keys; the same for all layers alike."""
        g = self.graph
        if (group, window) not in self.masks:
            rows = g.node("Unsqueeze", g.node("Tile", self.columns, g.ints(group)), g.ints(1))
            self.masks[group, window] = self._mask_of(rows, window)
        return self.masks[group, window]

    def _last_mask(self, window: int | None) -> str:
        """[B, 1, 1, P + S]: what each row's last token sees."""
        return self._mask_of(self.graph.node("Unsqueeze", self.last_positions, self.graph.ints(1, 2, 3)), window)

    def _mask_of(self, rows: str, window: int | None) -> str:
        """0 where a position in `rows` sees a key, else minus infinity."""
        g = self.graph
        sees = g.node("LessOrEqual", self.keys, rows)
        if window is not None:
            sees = g.node("And", sees, g.node("Greater", self.keys, g.node("Sub", rows, g.number(window))))
        return g.node("Where", sees, g.number(0.0), g.number(float("-inf")))

    # Products, norms, activations

    def _linear(self, linear: Linear, x: str) -> str:
        site = Site(linear.site, linear.weight.shape[0])
        return self._product(x, [site], [linear.weight], linear.bias)

    def _merged(self, merged: MergedLinear, x: str) -> str:
        biases = [bias for bias in merged.biases if bias is not None]
        return self._product(x, merged.sites, merged.weights, torch.cat(biases) if biases else None)

    def _product(
        self, x: str, sites: Sequence[Site], weights: Sequence[PackedLinear], bias: torch.Tensor | None
    ) -> str:
        """x @ w.T + bias, the adapter's update in w."""
        g, weight, row = self.graph, _dense(weights), 0
        for site in sites:
            if (lora := self.adapter.get(site.name)) is not None:
                lora_a, scaled_b = (part.double() for part in lora.data)
                weight[row : row + site.width] = weight[row : row + site.width].double() + scaled_b @ lora_a
            row += site.width
        name = f"{sites[0].name}{''.join('+' + site.name.rpartition('.')[2] for site in sites[1:])}"
        out = g.node("MatMul", x, g.weight(f"{name}.weight", weight.T))
        return out if bias is None else g.node("Add", out, g.weight(f"{name}.bias", bias))

    def _norm(self, norm: RMSNorm, x: str) -> str:
        g = self.graph
        mean = g.node("ReduceMean", g.node("Pow", x, g.number(2.0)), axes=[-1], keepdims=1)
        rms = g.node("Sqrt", g.node("Add", mean, g.number(float(norm.eps))))
        self.num_norms += 1
        return g.node("Mul", g.node("Div", x, rms), g.weight(f"norms.{self.num_norms - 1}.weight", norm.weight))

    def _mlp(self, mlp: GatedMLP, x: str) -> str:
        g = self.graph
        gate, up = g.nodes("Split", 2, self._merged(mlp.gate_up_proj, x), axis=-1)
        if mlp.activation is swiglu:
            gate = g.node("Mul", gate, g.node("Sigmoid", gate))
        elif mlp.activation is geglu_tanh:
            gate = self._gelu_tanh(gate)
        else:
            raise UnsupportedModel(f"the activation `{mlp.activation.__name__}` has no form in ONNX here")
        return self._linear(mlp.down_proj, g.node("Mul", gate, up))

    def _gelu_tanh(self, x: str) -> str:
        """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))"""
        g = self.graph
        cubed = g.node("Mul", g.node("Mul", g.node("Mul", x, x), x), g.number(0.044715))
        inner = g.node("Mul", g.node("Add", x, cubed), g.number(0.7978845608028654))
        return g.node("Mul", g.node("Mul", x, g.number(0.5)), g.node("Add", g.node("Tanh", inner), g.number(1.0)))


def _dense(weights: Sequence[PackedLinear]) -> torch.Tensor:
    """The rows of packed weights in fp32, one after the other; a new tensor."""
    return torch.cat([gather_rows(weight, torch.arange(weight.shape[0])).float() for weight in weights])
