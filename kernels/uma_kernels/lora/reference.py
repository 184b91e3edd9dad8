"""Low-rank updates in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uma_kernels.check import NotFinite

if TYPE_CHECKING:
    from uma_kernels.lora import PackedLora


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> tuple[tuple[torch.Tensor, ...], int]:
    if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
        raise NotFinite("a factor holds NaN or infinity")
    return (lora_a.to(torch.float32, copy=True), lora_b.float() * scaling), 0


def lora(
    x: torch.Tensor, out: torch.Tensor, adapters: list[PackedLora | None], order: torch.Tensor, offsets: torch.Tensor
) -> None:
    bounds = offsets.tolist()
    for adapter, begin, end in zip(adapters, bounds, bounds[1:], strict=False):
        if adapter is None:
            continue
        rows = order[begin:end].to(device=x.device, dtype=torch.int64)
        lora_a, scaled_b = adapter.data
        update = x.index_select(0, rows).float() @ lora_a.T @ scaled_b.T
        out[rows] = (out.index_select(0, rows).float() + update).to(out.dtype)
