"""Gemma 3: norms before and after each part, norms of heads, GeGLU, scaled embeddings, alternating windows.

Knows what it declares; does not know how it is computed, nor that its texts begin with a BOS token.
"""

from __future__ import annotations

from uma_engine.models.decoder import DecoderModel
from uma_kernels.activation import geglu_tanh

__all__ = ["Gemma3"]


class Gemma3(DecoderModel):
    """Sliding layers have a rotary theta of their own; scaling of positions applies to full layers alone."""

    activation = staticmethod(geglu_tanh)
    head_norms = True
    post_norms = True
    scaled_embedding = True
