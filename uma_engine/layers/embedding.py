"""Token ids to rows of the embedding.

Knows the embedding weight, which the logits may share; does not know text.
"""

from __future__ import annotations

import torch

from uma_kernels.linear import PackedLinear, gather_rows

__all__ = ["Embedding"]


class Embedding:
    """Rows of a packed weight [V, K], multiplied by `scale` where the architecture asks for it."""

    __slots__ = ("scale", "weight")

    def __init__(self, weight: PackedLinear, scale: float | None = None) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] int64 -> [T, K] fp32, a new tensor that the caller may change."""
        return gather_rows(self.weight, input_ids, scale=1.0 if self.scale is None else self.scale)
