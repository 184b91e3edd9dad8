"""Llama, SmolLM2 and their kin: the plain pre-norm decoder.

Knows nothing beyond its name; does not know Llama 3's rotary scaling: the config says it.
"""

from __future__ import annotations

from uma_engine.models.decoder import DecoderModel

__all__ = ["Llama"]


class Llama(DecoderModel):
    """SwiGLU, one norm before each part, no norms of heads."""
