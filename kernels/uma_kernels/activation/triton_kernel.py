"""Gated activations on a GPU, elementwise over the halves of each row.

Knows two activations and row strides; does not know layers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase

BLOCK = 1024


@triton.jit
def gated(g, u, GELU: tl.constexpr):
    """silu(g) * u, or gelu(g) * u, in fp32: silu(x) = x * sigmoid(x); gelu by tanh is
    x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    turn = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    # 1 / (1 + e^-turn), with e^ of a number that is not positive: it cannot overflow
    small = tl.exp(-tl.abs(turn))
    share = tl.where(turn >= 0, 1.0, small) / (1.0 + small)
    return g * share * u


@triton.jit
def gated_kernel(gate_up, out, N, stride_in, stride_out, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_up + row * stride_in + offs, offs < N, 0.0).to(tl.float32)
    u = tl.load(gate_up + row * stride_in + N + offs, offs < N, 0.0).to(tl.float32)
    tl.store(out + row * stride_out + offs, gated(g, u, GELU).to(out.dtype.element_ty), offs < N)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    _gated(gate_up, out, False)


def geglu_tanh(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    _gated(gate_up, out, True)


def _gated(gate_up: torch.Tensor, out: torch.Tensor, gelu: bool) -> None:
    if out.numel():
        tokens, width = out.shape
        gated_kernel[(tokens, triton.cdiv(width, BLOCK))](
            gate_up, out, width, gate_up.stride(0), out.stride(0), GELU=gelu, BLOCK=BLOCK
        )


_TYPES = {"gate_up": "*bf16", "out": "*bf16", "N": "i32:16", "stride_in": "i32:16", "stride_out": "i32:16"}
AOT_CASES = [
    AotCase(name, gated_kernel, _TYPES, {"GELU": gelu, "BLOCK": BLOCK})
    for name, gelu in (("swiglu", False), ("geglu_tanh", True))
]
