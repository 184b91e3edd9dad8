"""Matrix products with packed weights, their biases and the adapters that change them.

Knows weights and the names of their places; does not know which layer they serve or how adapters are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from uma_engine.layers.batch_input import Routing
from uma_kernels.linear import PackedLinear, gated_linear, linear
from uma_kernels.lora import DeviceRouting, LoraPool, LoraRouting, LoraSlice, PackedLora, lora, lora_linear, lora_merged

__all__ = ["AdapterPools", "AdapterSites", "Adapters", "Linear", "MergedLinear", "Site", "SiteGroup"]


class AdapterSites(Protocol):
    """Where a layer finds the resident adapters of its site, indexed by slot; None where a slot leaves it alone."""

    @property
    def version(self) -> int:
        """Another number whenever a slot has got or lost its adapter."""
        ...

    def sites_of(self, site: str) -> Sequence[PackedLora | None]: ...


class AdapterPools(Protocol):
    """The same on a device: the adapters of a whole matrix product, by its first site."""

    def pool_of(self, site: str) -> LoraPool: ...


Adapters = AdapterSites | AdapterPools  # pools go with a DeviceRouting, sites with a LoraRouting


@dataclass(frozen=True, slots=True)
class Site:
    """One projection as adapters know it: its name, as in `layers.3.self_attn.q_proj`, and how many columns it gives."""

    name: str
    width: int


SiteGroup = tuple[int, tuple[Site, ...]]  # K, and the sites whose outputs lie side by side


class Linear:
    """y = x W^T + bias, plus each row's adapter.

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

    @property
    def adds(self) -> bool:
        """Whether adding to a residual costs no step of its own."""
        return self.weight.backend == "triton"

    def __call__(
        self,
        x: torch.Tensor,
        routing: Routing | None,
        adapters: Adapters | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, K] -> [T, N]. `routing` None: no row has an adapter, and `adapters` is not asked. With a `residual` [T, N]
        the result is added to it in place, and it is returned."""
        if isinstance(routing, DeviceRouting) and adapters is not None:
            out = residual
            if out is None:
                out = torch.empty(x.shape[0], self.weight.shape[0], dtype=x.dtype, device=x.device)
            pool = cast(AdapterPools, adapters).pool_of(self.site)
            lora_linear(x, self.weight, self.bias, out, pool, routing, residual is not None)
            return out
        out = linear(x, self.weight, self.bias, residual, self.precision, residual is not None)
        if routing is not None and adapters is not None:
            lora(x, out, cast(AdapterSites, adapters).sites_of(self.site), cast(LoraRouting, routing))
        return out


class MergedLinear:
    """Several projections of the same rows: their outputs side by side in one tensor [T, N], N the sum of their widths.

    A weight serves one or more sites in turn, its rows theirs one after the other: sites whose weights share a format
    cost one product. Each site keeps its own adapters.
    """

    __slots__ = ("biases", "precision", "sites", "weights", "width")

    def __init__(
        self,
        sites: Sequence[Site],
        weights: Sequence[PackedLinear],
        bias: torch.Tensor | None = None,
        precision: str = "exact",
    ) -> None:
        self.sites = tuple(sites)
        self.weights = tuple(weights)
        self.width = sum(site.width for site in sites)
        rows = [weight.shape[0] for weight in weights]
        assert sum(rows) == self.width, f"weights of {rows} rows do not serve {self.width} columns"
        self.biases = (None,) * len(rows) if bias is None else bias.split(rows)
        self.precision = precision

    def __call__(self, x: torch.Tensor, routing: Routing | None, adapters: Adapters | None) -> torch.Tensor:
        """x [T, K] -> [T, N]. `routing` None: no row has an adapter, and `adapters` is not asked."""
        out = torch.empty(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        if isinstance(routing, DeviceRouting) and adapters is not None and len(self.weights) == 1:
            pool = cast(AdapterPools, adapters).pool_of(self.sites[0].name)
            lora_linear(x, self.weights[0], self.biases[0], out, pool, routing)
            return out
        start = 0
        for weight, bias in zip(self.weights, self.biases, strict=True):
            end = start + weight.shape[0]
            linear(x, weight, bias, out[:, start:end], self.precision)
            start = end
        if routing is not None and adapters is not None:
            _update(x, out, self.sites, routing, adapters)
        return out

    def gated(
        self,
        x: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        routing: Routing | None,
        adapters: Adapters | None,
    ) -> torch.Tensor:
        """activation(self(x)) [T, N / 2], the bits included: one op where one weight on a device serves both halves and no
        adapter comes between."""
        plain = routing is None or adapters is None
        if plain and len(self.weights) == 1 and self.weights[0].backend == "triton":
            return gated_linear(x, self.weights[0], activation, self.biases[0], precision=self.precision)
        return activation(self(x, routing, adapters))


def _update(x: torch.Tensor, out: torch.Tensor, sites: Sequence[Site], routing: Routing, adapters: Adapters) -> None:
    """Add each row's adapter to the columns of each site."""
    if isinstance(routing, DeviceRouting):
        lora_merged(x, out, cast(AdapterPools, adapters).pool_of(sites[0].name), routing)
        return
    by_slot = cast(AdapterSites, adapters)
    lora_merged(x, out, [LoraSlice(site.width, by_slot.sites_of(site.name)) for site in sites], routing)
