"""The gated feed-forward part of a block.

Knows three matrices and an activation; does not know norms or the residual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from uma_engine.layers.linear import AdapterSites, Linear
from uma_kernels.lora import LoraRouting

__all__ = ["GatedMLP"]

Activation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class GatedMLP:
    """down(activation(gate(x)) * up(x)); `activation` is `swiglu` or `geglu_tanh` of `uma_kernels.activation`."""

    __slots__ = ("activation", "down_proj", "gate_proj", "up_proj")

    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear, activation: Activation) -> None:
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def __call__(self, x: torch.Tensor, routing: LoraRouting | None, adapters: AdapterSites | None) -> torch.Tensor:
        gate = self.gate_proj(x, routing, adapters)
        gate = self.activation(gate, self.up_proj(x, routing, adapters), gate)
        return self.down_proj(gate, routing, adapters)
