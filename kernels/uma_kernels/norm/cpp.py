"""Root-mean-square normalisation in C++ (csrc/cpu/norm.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import math

import torch

from uma_kernels.dispatch import extension


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    width = x.shape[-1]
    if x.dim() == 1:
        x, out = x[None], out[None]
    heads = math.prod(x.shape[1:-1])
    extension().rms_norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0), x.shape[0], heads, width, eps
    )


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    rows, width = x.shape
    extension().add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
