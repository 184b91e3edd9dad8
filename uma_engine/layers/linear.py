"""A matrix product with its packed weight, its bias and the adapters that change it.

Knows one weight and the name of its place; does not know which layer it serves or how adapters are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from uma_kernels.linear import PackedLinear, linear
from uma_kernels.lora import LoraRouting, PackedLora, lora

__all__ = ["AdapterSites", "Linear"]


class AdapterSites(Protocol):
    """Where a layer finds the resident adapters of its site, indexed by slot; None where a slot leaves it alone."""

    def sites_of(self, site: str) -> Sequence[PackedLora | None]: ...


class Linear:
    """y = x W^T + bias, plus each row's adapter. `site` names the layer, as in `layers.3.self_attn.q_proj`.

    `precision` is that of the product with the weight (`uma_kernels.linear`); adapters always compute in fp32.
    """

    __slots__ = ("bias", "precision", "site", "weight")

    def __init__(
        self, site: str, weight: PackedLinear, bias: torch.Tensor | None = None, precision: str = "exact"
    ) -> None:
        self.site = site
        self.weight = weight
        self.bias = bias
        self.precision = precision

    def __call__(self, x: torch.Tensor, routing: LoraRouting | None, adapters: AdapterSites | None) -> torch.Tensor:
        """x [T, K] -> [T, N]. `routing` None: no row has an adapter, and `adapters` is not asked."""
        out = linear(x, self.weight, self.bias, precision=self.precision)
        if routing is not None and adapters is not None:
            lora(x, out, adapters.sites_of(self.site), routing)
        return out
