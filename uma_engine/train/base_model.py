"""A catalog base as a transformers model that can be trained: the dequantised weights, tree attention, LoRA on it.

Knows how a configuration maps onto transformers' own; does not know data or losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uma_engine.config import ModelConfig
from uma_engine.errors import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from uma_engine.train.recipe import LoRA

__all__ = ["add_lora", "transformers_model"]


def transformers_model(files: Any, auto_class: Any, dtype: torch.dtype | None = None, attention: str = "sdpa") -> Any:
    """A transformers model in evaluation mode that holds exactly the dequantised weights of `files`.

    Errors:  UnsupportedModel for an architecture that is not mapped
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    model = auto_class.from_config(_config(files.config), dtype=dtype, attn_implementation=attention)
    state = {name: _dense(files.tensor(name)).to(dtype) for name in files.names()}
    if files.config.architecture == "gemma3":  # its norms keep their distance from 1
        state = {name: value - 1 if name.endswith("norm.weight") else value for name, value in state.items()}
    if files.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _dense(weight: Any) -> torch.Tensor:
    import torch

    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def _config(c: ModelConfig) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": _rope(c),
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    windows: dict[str, Any] = {
        "sliding_window": c.sliding_window,
        "layer_types": [
            "full_attention" if c.window_of(layer) is None else "sliding_attention" for layer in range(c.num_layers)
        ],
    }
    if c.architecture == "llama":
        return transformers.LlamaConfig(**sizes, attention_bias=c.attention_bias, mlp_bias=c.mlp_bias)
    if c.architecture == "mistral":
        return transformers.MistralConfig(**sizes, sliding_window=c.sliding_window)
    if c.architecture in ("qwen2", "qwen3"):
        sizes |= windows | {"use_sliding_window": c.sliding_window is not None}
        if c.architecture == "qwen2":
            return transformers.Qwen2Config(**sizes)
        return transformers.Qwen3Config(**sizes, attention_bias=c.attention_bias)
    if c.architecture == "gemma3":
        return transformers.Gemma3TextConfig(**sizes, **windows, query_pre_attn_scalar=round(c.scale**-2))
    raise UnsupportedModel(f"a `{c.architecture}` base cannot be trained")


def _rope(c: ModelConfig) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if (stretch := c.rope_scaling) is not None:
        full |= {"rope_type": stretch.kind, "factor": stretch.factor}
        if stretch.kind == "llama3":
            full |= {
                "low_freq_factor": stretch.low_freq_factor,
                "high_freq_factor": stretch.high_freq_factor,
                "original_max_position_embeddings": stretch.original_max_position_embeddings,
            }
    if c.architecture != "gemma3":
        return full
    local = {"rope_type": "default", "rope_theta": c.rope_local_theta or c.rope_theta}
    return {"full_attention": full, "sliding_attention": local}


def add_lora(model: Any, lora: LoRA, seed: int) -> Any:
    """The model wrapped by peft, its base frozen; the adapter's first values are a function of `seed`."""
    import torch
    from peft import LoraConfig, get_peft_model

    layers = model.config.num_hidden_layers
    if lora.layers is not None and not 1 <= lora.layers <= layers:
        raise InvalidRequest(f"`lora.layers` is {lora.layers} but the base has {layers} layers", param="lora.layers")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float is as good
        target_modules=list(lora.targets),
        layers_to_transform=None if lora.layers is None else list(range(layers - lora.layers, layers)),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)
