"""Gated activations of the MLP.

Knows two activations; does not know layers. Source: SwiGLU and GEGLU, arXiv 2002.05202.
"""

from __future__ import annotations

import torch

from uma_kernels.activation import cpp, reference
from uma_kernels.check import check, out_like
from uma_kernels.dispatch import choose

__all__ = ["geglu_tanh", "swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out = silu(gate) * up, elementwise
    Shapes:     gate, up, out [T, N] fp32; `out` may be `gate` or `up`
    Numerics:   fp32; each element depends on its own inputs alone
    Errors:     ShapeError when shapes or dtypes differ
    """
    return _gated("swiglu", gate, up, out)


def geglu_tanh(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out = gelu(gate) * up with the tanh approximation of gelu, elementwise
    Shapes:     gate, up, out [T, N] fp32; `out` may be `gate` or `up`
    Numerics:   fp32; each element depends on its own inputs alone
    Errors:     ShapeError when shapes or dtypes differ
    """
    return _gated("geglu_tanh", gate, up, out)


def _gated(name: str, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    check("gate", gate, (None, None))
    check("up", up, tuple(gate.shape))
    out = out_like("out", out, tuple(gate.shape), gate)
    backend = cpp if choose("activation", gate.device.type) == "cpp" else reference
    getattr(backend, name)(gate, up, out)
    return out
