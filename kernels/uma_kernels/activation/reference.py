"""Gated activations in plain torch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(F.silu(gate) * up)


def geglu_tanh(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(F.gelu(gate, approximate="tanh") * up)
