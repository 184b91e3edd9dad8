"""Low-rank updates in C++ (csrc/cpu/lora.cpp). Shapes are checked by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from uma_kernels.check import NotFinite, ShapeError
from uma_kernels.dispatch import extension
from uma_kernels.linear.cpp import aligned_bytes

if TYPE_CHECKING:
    from uma_kernels.lora import LoraRouting, LoraSlice


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> tuple[tuple[torch.Tensor, ...], int]:
    kernels = extension()
    kind = {torch.float16: kernels.FactorType.fp16, torch.bfloat16: kernels.FactorType.bf16}.get(
        lora_a.dtype, kernels.FactorType.fp32
    )
    shape = (*lora_a.shape, lora_b.shape[0], kind)
    data = aligned_bytes(kernels.lora_packed_bytes(*shape))
    if not kernels.pack_lora(data.data_ptr(), *shape, scaling, lora_a.data_ptr(), lora_b.data_ptr()):
        raise NotFinite("a factor holds NaN or infinity")
    return (data,), data.data_ptr()


def lora(x: torch.Tensor, out: torch.Tensor, slices: Sequence[LoraSlice], routing: LoraRouting) -> None:
    addresses: list[int] = []
    for part in slices:
        for slot in routing.slots:
            adapter = part.adapters[slot]
            if adapter is not None and not adapter.address:
                raise ShapeError(f"the adapter in slot {slot} was packed for back end `{adapter.backend}`, not `cpp`")
            addresses.append(0 if adapter is None else adapter.address)
    bad = extension().lora(
        x.data_ptr(),
        x.shape[1],
        out.data_ptr(),
        out.stride(0),
        addresses,
        [part.num_columns for part in slices],
        routing.offsets.data_ptr(),
        routing.order.data_ptr(),
    )
    if bad >= 0:
        part, slot = slices[bad // len(routing.slots)], routing.slots[bad % len(routing.slots)]
        adapter = part.adapters[slot]
        assert adapter is not None
        raise ShapeError(
            f"the adapter in slot {slot} has K, N {adapter.in_features, adapter.out_features} but the batch needs"
            f" {x.shape[1], part.num_columns}"
        )
