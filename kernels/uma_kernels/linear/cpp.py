"""Matrix products in C++ (csrc/cpu/linear*.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.check import ptr
from uma_kernels.dispatch import extension
from uma_kernels.linear.formats import BlockQuantized

Handle = tuple[int, int, int, int, int, bool]

ALIGNMENT = 64


def aligned_bytes(count: int) -> torch.Tensor:
    """`count` uninitialised bytes that begin on a cache line."""
    memory = torch.empty(count + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + count]


def pack(weight: torch.Tensor | BlockQuantized) -> tuple[torch.Tensor, Handle]:
    kernels = extension()
    if isinstance(weight, BlockQuantized):
        layout = (*weight.shape, weight.bits, weight.block_size, weight.mins is not None)
        data = aligned_bytes(kernels.packed_bytes(*layout))
        quants, scales = weight.quants.contiguous(), weight.scales.contiguous()
        mins = None if weight.mins is None else weight.mins.contiguous()
        handle = (data.data_ptr(), *layout)
        kernels.pack_quantized(*handle, quants.data_ptr(), scales.data_ptr(), ptr(mins))
    else:
        layout = (*weight.shape, 32, 32, False)
        data = aligned_bytes(kernels.packed_bytes(*layout))
        handle = (data.data_ptr(), *layout)
        kernels.pack_dense(*handle, weight.data_ptr())
    return data, handle


def linear(x: torch.Tensor, data: torch.Tensor, handle: Handle, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    extension().linear(*handle, x.data_ptr(), x.shape[0], ptr(bias), out.data_ptr(), out.stride(0))


def linear_near(
    x: torch.Tensor, data: torch.Tensor, handle: Handle, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    kernels = extension()
    multiply = kernels.linear if handle[3] == 32 else kernels.linear_near
    multiply(*handle, x.data_ptr(), x.shape[0], ptr(bias), out.data_ptr(), out.stride(0))


def linear_fast(
    x: torch.Tensor, data: torch.Tensor, handle: Handle, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    kernels = extension()
    multiply = kernels.linear if handle[3] == 32 else kernels.linear_fast
    multiply(*handle, x.data_ptr(), x.shape[0], ptr(bias), out.data_ptr(), out.stride(0))


def gather_rows(data: torch.Tensor, handle: Handle, ids: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    bad = extension().gather_rows(*handle, ids.data_ptr(), ids.shape[0], scale, out.data_ptr())
    if bad >= 0:
        raise IndexError(f"`ids[{bad}]` is {ids[bad].item()} but the weight has {handle[1]} rows")
