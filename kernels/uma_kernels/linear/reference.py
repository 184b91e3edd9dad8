"""Matrix products in plain torch: the specification. A quantised weight is dequantised once, when it is packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uma_kernels.linear.formats import BlockQuantized

Handle = tuple[int, int, int, int, int, bool]


def pack(weight: torch.Tensor | BlockQuantized) -> tuple[torch.Tensor, Handle]:
    dense = weight.dequantize() if isinstance(weight, BlockQuantized) else weight.clone()
    return dense, (0, *dense.shape, 32, 32, False)


def linear(x: torch.Tensor, data: torch.Tensor, handle: Handle, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    out.copy_(F.linear(x, data, bias))


SMALLEST = 2.0**-90  # a block whose largest magnitude is below counts as zeros


def quantize_rows(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] in 16 bits: quants [T, K // block_size, block_size] (integers in fp64), scales and scaled sums [T, K // block_size] fp32."""
    values = x.reshape(x.shape[0], x.shape[1] // block_size, block_size)
    top = values.abs().amax(dim=-1)
    bad, zero = ~torch.isfinite(top), top < SMALLEST
    safe = torch.where(bad | zero, torch.ones_like(top), top)
    largest = torch.full_like(safe, 32767.0)  # a tensor: torch divides by, or into, a plain number in another way
    quants = torch.round(values * (largest / safe)[:, :, None]).double()
    quants = torch.where((bad | zero)[:, :, None], torch.zeros_like(quants), quants)
    scales = torch.where(zero, torch.zeros_like(top), safe / largest).masked_fill(bad, float("nan"))
    return quants, scales, scales * quants.sum(dim=-1).float()


def linear_near(x: torch.Tensor, weight: BlockQuantized, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Integer sums in fp64, which holds them exactly; each multiplication and addition of the fold rounds to fp32 once, as a fused one."""
    rows, size = weight.shape[0], weight.block_size
    quants_x, scales_x, sums_x = quantize_rows(x, size)
    quants_w = weight.unpacked().reshape(rows, -1, size).double()
    total = torch.zeros_like(out)
    for block in range(quants_w.shape[1]):
        dots = (quants_x[:, block] @ quants_w[:, block].T).float()
        scale = scales_x[:, block, None] * weight.scales[:, block]
        total = (total.double() + dots.double() * scale.double()).float()
        if weight.mins is not None:
            total = (total.double() + sums_x[:, block, None].double() * weight.mins[:, block].double()).float()
    out.copy_(total if bias is None else total + bias)


def gather_rows(data: torch.Tensor, handle: Handle, ids: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(data.index_select(0, ids))
