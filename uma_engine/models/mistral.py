"""Mistral: Llama with a sliding window, whose width the config gives.

Knows nothing beyond its name; does not know how a window is applied.
"""

from __future__ import annotations

from uma_engine.models.decoder import DecoderModel

__all__ = ["Mistral"]


class Mistral(DecoderModel):
    """As Llama; `sliding_window` of the config applies to every layer."""
