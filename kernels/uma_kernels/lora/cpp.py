"""Low-rank updates in C++ (csrc/cpu/lora.cpp). Shapes are checked by the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uma_kernels.dispatch import extension
from uma_kernels.linear.cpp import aligned_bytes

if TYPE_CHECKING:
    from uma_kernels.lora import PackedLora


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> tuple[tuple[torch.Tensor, ...], int]:
    kernels = extension()
    shape = (*lora_a.shape, lora_b.shape[0])
    data = aligned_bytes(kernels.lora_packed_bytes(*shape))
    kernels.pack_lora(data.data_ptr(), *shape, scaling, lora_a.data_ptr(), lora_b.data_ptr())
    return (data,), data.data_ptr()


def lora(
    x: torch.Tensor, out: torch.Tensor, adapters: list[PackedLora | None], order: torch.Tensor, offsets: torch.Tensor
) -> None:
    addresses = tuple(0 if adapter is None else adapter.address for adapter in adapters)
    extension().lora(x.data_ptr(), out.data_ptr(), out.stride(0), addresses, offsets.data_ptr(), order.data_ptr())
