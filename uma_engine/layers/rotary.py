"""Rotary tables: plain, linearly stretched, or stretched as Llama 3.1 does.

Knows frequencies and positions; does not know heads. Source: RoFormer, arXiv 2104.09864; the scaling of Llama 3.1 as in
transformers' `_compute_llama3_parameters`.
"""

from __future__ import annotations

import math

import torch

from uma_engine.config import RopeScaling
from uma_kernels.rope import rotary_table

__all__ = ["inverse_frequencies", "make_rotary_table"]


def make_rotary_table(head_dim: int, theta: float, scaling: RopeScaling | None, max_positions: int) -> torch.Tensor:
    """[max_positions, head_dim] fp32, cosines then sines; built once, whole."""
    return rotary_table(inverse_frequencies(head_dim, theta, scaling), max_positions)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """[head_dim / 2] fp32, in the arithmetic of the reference implementation: rounding here moves far positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponents
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    return _llama3(inv_freq, scaling)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between blended."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / inv_freq
    is_long = wavelengths > context / low
    is_between = ~is_long & ~(wavelengths < context / high)
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    return torch.where(is_between, blended, torch.where(is_long, inv_freq / scaling.factor, inv_freq))
