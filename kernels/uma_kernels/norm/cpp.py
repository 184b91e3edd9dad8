"""Root-mean-square normalisation in C++ (csrc/cpu/norm.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    extension().rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    rows, width = x.shape
    extension().add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
