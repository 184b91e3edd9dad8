"""The same weights in a peer's model: transformers, from the dequantised tensors of an opened model.

Knows how a configuration maps onto transformers' own; does not know benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch

from uma_engine.config import ModelConfig


def transformers_model(files: Any, auto_class: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model in evaluation mode that holds exactly the dequantised weights of `files` (Llama or Qwen2)."""
    config = _config(files.config)
    model = auto_class.from_config(config, dtype=dtype, attn_implementation="sdpa")
    state = {name: _dense(files.tensor(name)).to(dtype) for name in files.names()}
    if files.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _dense(weight: Any) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def _config(c: ModelConfig) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return classes[c.architecture](
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
    )
