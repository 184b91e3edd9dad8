"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Knows nothing beyond its name; does not know where biases are added.
"""

from __future__ import annotations

from uma_engine.models.decoder import DecoderModel

__all__ = ["Qwen2"]


class Qwen2(DecoderModel):
    """As Llama; `attention_bias` of the config is true for it."""
