"""Low-rank updates in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from uma_kernels.lora import PackedLora


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> tuple[tuple[torch.Tensor, ...], int]:
    return (lora_a.clone(), lora_b * scaling), 0


def lora(
    x: torch.Tensor, out: torch.Tensor, adapters: list[PackedLora | None], order: torch.Tensor, offsets: torch.Tensor
) -> None:
    bounds = offsets.tolist()
    for adapter, begin, end in zip(adapters, bounds, bounds[1:], strict=False):
        if adapter is None:
            continue
        rows = order[begin:end].to(device=x.device, dtype=torch.int64)
        lora_a, scaled_b = adapter.data
        out.index_add_(0, rows, x.index_select(0, rows) @ lora_a.T @ scaled_b.T)
