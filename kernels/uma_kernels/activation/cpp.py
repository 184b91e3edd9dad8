"""Gated activations in C++ (csrc/cpu/activation.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    extension().swiglu(gate_up.data_ptr(), out.data_ptr(), *out.shape)


def geglu_tanh(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    extension().geglu_tanh(gate_up.data_ptr(), out.data_ptr(), *out.shape)
