"""Gated activations in C++ (csrc/cpu/activation.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    extension().swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())


def geglu_tanh(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    extension().geglu_tanh(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
