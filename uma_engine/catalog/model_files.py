"""Opens a model wherever it lies, a Hugging Face directory or a GGUF file, and gives its parts one form.

Knows which tensors each architecture needs and what its norms mean; does not know how they are computed with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from uma_engine.catalog.cache import file_digest, files_digest
from uma_engine.catalog.gguf import GGUFFile
from uma_engine.catalog.gguf_model import ROPE_FACTORS, canonical_name, config_from_gguf, unpermuted_rows
from uma_engine.catalog.hf_config import config_from_hf
from uma_engine.catalog.safetensors_reader import SafetensorsDirectory, read_json, refuse_pickle
from uma_engine.catalog.tokenizer import Tokenizer
from uma_engine.config import ModelConfig
from uma_engine.errors import CorruptFile, UnknownModel, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from uma_kernels.linear.formats import BlockQuantized

__all__ = ["ModelFiles", "expected_shapes", "open_model"]

MAX_TEMPLATE_FILE_BYTES = 1 << 20


class ModelFiles(ABC):
    """A model on disk: its shape, its tensors under Hugging Face names, its tokenizer and chat template.

    Norm weights are multipliers ready for `x / rms * weight`, whatever the checkpoint stores. A tied `lm_head.weight`
    is not listed. `chat_template` is the model's jinja source, None when it has none.
    """

    path: Path
    config: ModelConfig
    chat_template: str | None

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors the model needs, in the order of the layers."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor | BlockQuantized:
        """One tensor: dense fp32, or block-quantised as it is stored.

        Errors:  CorruptFile for NaN or infinity
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over the contents of the files, hex; remembered between runs while the files are untouched."""

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built at first use."""


def open_model(path: str | Path) -> ModelFiles:
    """Opens a `.gguf` file or a Hugging Face directory; checks that every tensor is there with its shape.

    Errors:  UnknownModel when no model is there; UnsupportedModel for pickles, other formats and architectures;
             CorruptFile when files are damaged or contradict each other
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _HubDirectory(path)
    if not path.is_file():
        raise UnknownModel(f"there is no file or directory `{path}`", hint="`uma models` lists the catalog")
    refuse_pickle(path)
    if path.suffix.lower() == ".safetensors":
        raise UnsupportedModel(f"`{path.name}` is weights alone", hint="point to its directory, with `config.json`")
    return _GGUFModel(path)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this shape has, by name, in the order of the layers."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = (
        ("self_attn.q_proj", q_width, hidden, config.attention_bias),
        ("self_attn.k_proj", kv_width, hidden, config.attention_bias),
        ("self_attn.v_proj", kv_width, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, q_width, config.attention_output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.architecture == "gemma3":
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.architecture in ("gemma3", "qwen3"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}.weight": (width,) for name, width in norms.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _check_shapes(config: ModelConfig, found: dict[str, tuple[int, ...]], where: str) -> dict[str, tuple[int, ...]]:
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise CorruptFile(f"{where} lacks the tensor `{name}`", hint="fetch the whole model again")
        if found[name] != shape:
            raise CorruptFile(f"{where}: `{name}` has the shape {found[name]} but the configuration says {shape}")
    if extra := found.keys() - expected.keys():
        raise UnsupportedModel(
            f"{where} holds `{min(extra)}`, which a {config.architecture} model of this configuration does not use",
            hint="leaving a weight out would change the model's answers: it is refused instead",
        )
    return expected


class _GGUFModel(ModelFiles):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.config = config_from_gguf(self.file)
        self._stored: dict[str, str] = {}
        for name in self.file.tensors:
            if name == ROPE_FACTORS:
                continue
            canonical = canonical_name(name, self.config.architecture)
            if canonical is None:
                raise UnsupportedModel(f"`{path}` holds the tensor `{name}`, which no supported architecture uses")
            self._stored[canonical] = name
        found = {canonical: self.file.tensors[name].shape for canonical, name in self._stored.items()}
        self._shapes = _check_shapes(self.config, found, f"`{path}`")
        template = self.file.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor | BlockQuantized:
        value = self.file.read(self._stored[name])
        heads = self._interleaved_heads(name)
        if heads is None:
            return value
        import torch

        index = torch.from_numpy(unpermuted_rows(heads, self.config.head_dim))
        return value.index_select(0, index) if isinstance(value, torch.Tensor) else value.rows(index)

    def _interleaved_heads(self, name: str) -> int | None:
        """How many heads' rows llama.cpp has interleaved in this tensor, None where it has not."""
        if self.config.architecture not in ("llama", "mistral"):
            return None
        if ".q_proj." in name:
            return self.config.num_heads
        return self.config.num_kv_heads if ".k_proj." in name else None

    @property
    def digest(self) -> str:
        return file_digest(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.file, self.digest)


class _HubDirectory(ModelFiles):
    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").exists():
            found_gguf = sorted(path.glob("*.gguf"))
            raise UnknownModel(
                f"`{path}` is not a model directory: it has no `config.json`",
                hint=f"point to the file: `{found_gguf[0]}`"
                if found_gguf
                else "point to a directory with `config.json`, a tokenizer and safetensors, or to a `.gguf` file",
            )
        self.config = config_from_hf(
            read_json(path / "config.json"), self._optional_json("generation_config.json"), f"`{path / 'config.json'}`"
        )
        self._weights = SafetensorsDirectory(path)
        found = {
            name: shape
            for name, shape in self._weights.shapes.items()
            # Recomputed from the configuration, or the same tensor as the embedding.
            if not name.endswith(".rotary_emb.inv_freq")
            and not (name == "lm_head.weight" and self.config.tie_word_embeddings)
        }
        self._shapes = _check_shapes(self.config, found, f"`{path}`")
        self.chat_template = self._read_chat_template()

    def _optional_json(self, name: str) -> dict:
        path = self.path / name
        return read_json(path) if path.is_file() else {}

    def _read_chat_template(self) -> str | None:
        """`chat_template.jinja`, else `chat_template` of chat_template.json or tokenizer_config.json."""
        path = self.path / "chat_template.jinja"
        if path.is_file():
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    return file.read(MAX_TEMPLATE_FILE_BYTES)
            except (OSError, UnicodeDecodeError) as error:
                raise CorruptFile(f"`{path}` cannot be read: {error}") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = self._optional_json(name).get("chat_template")
            if isinstance(template, list):  # several named templates: the one for plain chat
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
        return None

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor:
        value = self._weights.read(name)
        # Gemma's checkpoints store the norms' distance from 1.
        is_offset = self.config.architecture == "gemma3" and value.dim() == 1 and name.endswith("norm.weight")
        return value + 1.0 if is_offset else value

    @property
    def digest(self) -> str:
        described = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        templates = ("chat_template.jinja", "chat_template.json")
        paths = [self.path / name for name in (*described, *templates)]
        return files_digest([path for path in paths if path.is_file()] + self._weights.files)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)
