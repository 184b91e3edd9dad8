"""Gated activations of the MLP.

Knows two activations; does not know layers. Source: SwiGLU and GEGLU, arXiv 2002.05202.
"""

from __future__ import annotations

from types import ModuleType

import torch

from uma_kernels.activation import cpp, reference
from uma_kernels.check import FLOATS, ShapeError, check, out_like
from uma_kernels.dispatch import choose

__all__ = ["geglu_tanh", "swiglu"]


def swiglu(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out = silu(gate) * up, elementwise, where gate | up = gate_up: the halves of each row
    Shapes:     gate_up [T, 2 N] . out [T, N], apart from `gate_up`
    Numerics:   fp32; each element depends on its own inputs alone
    Errors:     ShapeError when shapes or dtypes do not fit
    """
    return _gated("swiglu", gate_up, out)


def geglu_tanh(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out = gelu(gate) * up with the tanh approximation of gelu, elementwise, where gate | up = gate_up: the
                halves of each row
    Shapes:     gate_up [T, 2 N] . out [T, N], apart from `gate_up`
    Numerics:   fp32; each element depends on its own inputs alone
    Errors:     ShapeError when shapes or dtypes do not fit
    """
    return _gated("geglu_tanh", gate_up, out)


def _gated(name: str, gate_up: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    check("gate_up", gate_up, (None, None), FLOATS)
    tokens, both = gate_up.shape
    if both % 2:
        raise ShapeError(f"`gate_up` has width {both} but must hold two halves of one width")
    out = out_like("out", out, (tokens, both // 2), gate_up)
    getattr(_backend(gate_up), name)(gate_up, out)
    return out


def _backend(x: torch.Tensor) -> ModuleType:
    backend = choose("activation", x.device.type)
    if backend == "triton":
        from uma_kernels.activation import triton_kernel

        return triton_kernel
    return cpp if backend == "cpp" and x.dtype is torch.float32 else reference
