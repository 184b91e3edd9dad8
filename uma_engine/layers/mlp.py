"""The gated feed-forward part of a block.

Knows its matrices and an activation; does not know norms or the residual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from uma_engine.layers.batch_input import Routing
from uma_engine.layers.linear import Adapters, Linear, MergedLinear

__all__ = ["GatedMLP"]

Activation = Callable[[torch.Tensor], torch.Tensor]  # gate | up [T, 2 I] -> [T, I]


class GatedMLP:
    """down(activation(gate(x) | up(x))); `activation` is `swiglu` or `geglu_tanh` of `uma_kernels.activation`."""

    __slots__ = ("activation", "down_proj", "gate_up_proj")

    def __init__(self, gate_up_proj: MergedLinear, down_proj: Linear, activation: Activation) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.activation = activation

    def __call__(
        self,
        x: torch.Tensor,
        routing: Routing | None,
        adapters: Adapters | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """With a `residual` the result is added to it in place, and it is returned."""
        gated = self.gate_up_proj.gated(x, self.activation, routing, adapters)
        return self.down_proj(gated, routing, adapters, residual)
