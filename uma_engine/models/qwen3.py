"""Qwen3: Llama with an RMS norm over each head of queries and keys.

Knows what it declares; does not know how it is computed.
"""

from __future__ import annotations

from uma_engine.models.decoder import DecoderModel

__all__ = ["Qwen3"]


class Qwen3(DecoderModel):
    """As Llama, with norms of heads before the rotary positions."""

    head_norms = True
