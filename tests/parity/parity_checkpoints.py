"""Tiny random checkpoints of every architecture: what they are made of, and what transformers says of them.

Knows transformers' configurations; does not know how ours are run.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from parity_helpers import Truth, exact, grouped, randomise

from uma_engine.catalog import open_model
from uma_engine.models import DecoderModel, load_model

__all__ = ["CHECKPOINTS", "Checkpoint", "make_checkpoint"]

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "attn_implementation": "sdpa",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Name -> (transformers' config class, what differs from SMALL). Windows are smaller than the sequences.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "hidden_size": 72,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
        },
    ),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "num_key_value_heads": 4},
    ),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 24,
            "rope_parameters": GEMMA_ROPE,
        },
    ),
}
PREFIX, LEFT, RIGHT = 17, 9, 6  # lengths of a shared prefix and of two siblings


@dataclass
class Checkpoint:
    """A model on disk, transformers' own in fp32 and fp64, and what they say of two sequences with a common prefix."""

    path: Path
    hf: torch.nn.Module
    hf_exact: torch.nn.Module
    prefix: list[int]
    left: list[int]
    right: list[int]
    left_truth: Truth  # of prefix + left
    right_truth: Truth

    def load_hf(self) -> torch.nn.Module:
        """A new copy of transformers' model in fp32."""
        return copy.deepcopy(self.hf)

    def load_hf_exact(self) -> torch.nn.Module:
        """A new copy of transformers' model that computes in fp64."""
        return exact(self.hf)

    def load(self) -> DecoderModel:
        """The model packed for the back end in force."""
        return load_model(open_model(self.path), max_positions=128)


def make_checkpoint(name: str, path: Path) -> Checkpoint:
    """Make the checkpoint `name` of CHECKPOINTS in the directory `path`; the same every time."""
    random.seed(name)
    torch.manual_seed(random.randrange(2**31))
    config_class, changes = CHECKPOINTS[name]
    config = getattr(transformers, config_class)(**SMALL | changes)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(hf)
    hf.save_pretrained(path)
    prefix, left, right = (random.choices(range(SMALL["vocab_size"]), k=n) for n in (PREFIX, LEFT, RIGHT))
    hf_exact = exact(hf)
    truths = grouped([Truth.of(hf, hf_exact, prefix + own) for own in (left, right)])
    return Checkpoint(path, hf, hf_exact, prefix, left, right, *truths)
