"""Root-mean-square normalisation, alone and fused with the residual addition before it.

Knows rows and a weight; does not know layers, or models that store `weight - 1`: the caller passes the multiplier.
"""

from __future__ import annotations

from types import ModuleType

import torch

from uma_kernels.check import FLOATS, ShapeError, check, out_like
from uma_kernels.dispatch import choose
from uma_kernels.norm import cpp, reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out = x / sqrt(mean(x^2) + eps) * weight, over the last dimension
    Shapes:     x, out [..., K], their rows (along the first dimension) at any stride . weight [K]; `out` may be `x`
    Numerics:   fp32; batch-invariant
    Errors:     ShapeError when shapes do not fit
    Source:     arXiv 1910.07467
    """
    if x.dim() == 0:
        raise ShapeError("`x` has no dimension but must have [..., K]")
    check("x", x, (None,) * x.dim(), FLOATS, strided=True)
    check("weight", weight, (x.shape[-1],), x.dtype)
    out = out_like("out", out, tuple(x.shape), x, strided=True)
    _backend(x).rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Semantics:  residual += x, in place; then out = residual / sqrt(mean(residual^2) + eps) * weight
    Shapes:     x, residual, out [T, K] . weight [K]; `out` may be `x`
    Numerics:   fp32; batch-invariant, and bitwise the addition followed by rms_norm
    Errors:     ShapeError when shapes do not fit
    """
    check("x", x, (None, None), FLOATS)
    check("residual", residual, tuple(x.shape), x.dtype)
    check("weight", weight, (x.shape[1],), x.dtype)
    out = out_like("out", out, tuple(x.shape), x)
    _backend(x).add_rms_norm(x, residual, weight, eps, out)
    return out


def _backend(x: torch.Tensor) -> ModuleType:
    backend = choose("norm", x.device.type)
    if backend == "triton":
        from uma_kernels.norm import triton_kernel

        return triton_kernel
    return cpp if backend == "cpp" and x.dtype is torch.float32 else reference
