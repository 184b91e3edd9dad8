"""Gated activations in plain torch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate.float()) * up.float())


def geglu_tanh(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.gelu(gate.float(), approximate="tanh") * up.float())
