"""Reads a Hugging Face `config.json`, in its older and its newer spelling, into a ModelConfig.

Knows the keys and defaults of five architectures; does not know tensors or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uma_engine.catalog.fields import Fields
from uma_engine.config import ModelConfig, RopeScaling
from uma_engine.errors import CorruptFile, UnsupportedModel

__all__ = ["config_from_hf"]

ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
MAX_LAYERS = 1024
# What transformers assumes when a key is absent; older files leave out what equals the default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos": (1,), "eos": (2,), "positions": 2048},
    "mistral": {"bos": (1,), "eos": (2,), "positions": 131072, "kv_heads": 8},
    "qwen2": {"bos": (), "eos": (), "positions": 32768, "kv_heads": 32},
    "qwen3": {"bos": (), "eos": (), "positions": 32768, "kv_heads": 32, "head_dim": 128},
    "gemma3": {"bos": (2,), "eos": (1,), "positions": 131072, "kv_heads": 4, "head_dim": 256},
}


def config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The model's shape from `config.json` and, for its end tokens, `generation_config.json` (may be empty).

    Errors:  UnsupportedModel for another architecture or a feature that would change its results; CorruptFile for
             values of the wrong kind
    """
    fields = Fields(config, where)
    kind = fields.text("model_type", "unnamed")
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: the architecture `{kind}` is not supported", hint=f"supported are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    gemma, defaults = architecture == "gemma3", DEFAULTS[architecture]
    _refuse_unsupported(fields, gemma)
    num_layers = fields.size("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.fail("num_hidden_layers", num_layers, f"at most {MAX_LAYERS}")
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", defaults.get("kv_heads", num_heads))
    if num_heads % num_kv_heads:
        raise fields.fail("num_attention_heads", num_heads, f"a multiple of `num_key_value_heads` {num_kv_heads}")
    head_dim = fields.size("head_dim", defaults.get("head_dim", hidden_size // num_heads))
    window, layer_types = _windows(fields, architecture, num_layers)
    theta, local_theta, scaling = _rope(fields, gemma)
    bias = fields.flag("attention_bias", False)
    bos = fields.token_ids("bos_token_id", defaults["bos"])
    eos = fields.token_ids("eos_token_id", defaults["eos"])
    more_eos = Fields(generation, f"{where}, generation_config.json").token_ids("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=fields.size("max_position_embeddings", defaults["positions"]),
        tie_word_embeddings=fields.flag("tie_word_embeddings", gemma),
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        sliding_window=window,
        layer_types=layer_types,
        attention_bias=bias or architecture == "qwen2",
        attention_output_bias=bias and architecture != "qwen2",
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos + more_eos)),
    )


def _refuse_unsupported(fields: Fields, gemma: bool) -> None:
    """Anything that would silently give other numbers than the model's authors meant."""
    activation_key, activation = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    wanted: tuple[tuple[str, Any, Any], ...] = (
        (activation_key, activation, activation),
        ("quantization_config", None, None),
        ("partial_rotary_factor", 1.0, 1.0),
        ("final_logit_softcapping", None, None),
        ("attn_logit_softcapping", None, None),
        ("use_bidirectional_attention", False, False),
    )
    for key, default, supported in wanted:
        if (value := fields.get(key, default)) != supported:
            raise UnsupportedModel(
                f"{fields.where}: `{key}` is `{value}` but only `{supported}` is supported",
                hint="use an unquantised checkpoint or a GGUF file" if key == "quantization_config" else None,
            )


def _windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[str, ...]]:
    """(sliding window, "full" or "sliding" for each layer); no types when all layers are alike."""
    if architecture == "llama" or (architecture.startswith("qwen") and not fields.flag("use_sliding_window", False)):
        return None, ()
    window = fields.size("sliding_window", 4096 if architecture == "gemma3" else None)
    if window is None:
        return None, ()
    names = fields.get("layer_types", None)
    if names is not None:
        known = {"full_attention": "full", "sliding_attention": "sliding"}
        if not isinstance(names, list) or len(names) != num_layers or any(name not in known for name in names):
            raise fields.fail("layer_types", names, f"{num_layers} times `full_attention` or `sliding_attention`")
        return window, tuple(known[name] for name in names)
    if architecture == "gemma3":
        pattern = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
        return window, tuple("sliding" if (i + 1) % pattern else "full" for i in range(num_layers))
    if architecture == "mistral":
        return window, ()
    first = fields.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise fields.fail("max_window_layers", first, "an integer")
    return window, tuple("sliding" if i >= first else "full" for i in range(num_layers))


def _rope(fields: Fields, gemma: bool) -> tuple[float, float | None, RopeScaling | None]:
    """(theta, theta of sliding layers, scaling), from `rope_parameters` or from the older keys."""
    default_theta = 1e6 if gemma else 1e4
    new = fields.inside("rope_parameters")
    if gemma:
        full, local = new.inside("full_attention"), new.inside("sliding_attention")
        if local.text("rope_type", "default") != "default":
            raise UnsupportedModel(f"{local.where}: `rope_type` is `{local.get('rope_type')}`, which is not supported")
        local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 1e4))
    else:
        full, local_theta = new, None
    theta = full.number("rope_theta", fields.number("rope_theta", default_theta))
    scaling = full if full.values else fields.inside("rope_scaling")
    return theta, local_theta, _rope_scaling(scaling)


def _rope_scaling(fields: Fields) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))  # `type` in files from before 2024-08
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", fields.number("factor"))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            raise CorruptFile(f"{fields.where}: `low_freq_factor` {low} is not below `high_freq_factor` {high}")
        original = fields.size("original_max_position_embeddings")
        return RopeScaling("llama3", fields.number("factor"), low, high, original)
    raise UnsupportedModel(f"{fields.where}: `rope_type` is `{kind}`", hint="supported are default, linear and llama3")
