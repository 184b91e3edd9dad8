"""RMS norms with their weight, alone or fused with the residual sum.

Knows one weight and its epsilon; does not know where in a block it stands.
"""

from __future__ import annotations

import torch

from uma_kernels.norm import add_rms_norm, rms_norm

__all__ = ["RMSNorm"]


class RMSNorm:
    """x / rms(x) * weight over the last dimension; `weight` is the multiplier itself in every architecture."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; returns the norm of the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)
