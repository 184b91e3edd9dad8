"""Matrix products in plain torch: the specification. A quantised weight is dequantised once, when it is packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uma_kernels.linear.formats import BlockQuantized

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


def pack(weight: torch.Tensor | BlockQuantized, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A copy of the weight as `dtype`, with one scale a row where that is FP8."""
    dense = weight.dequantize() if isinstance(weight, BlockQuantized) else weight
    if dtype is FP8:
        return quantize_fp8(dense)
    return dense.to(dtype, copy=True), None


def quantize_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K] as e4m3 values with a scale each [M] fp32: the largest magnitude of a row becomes 448, zeros keep scale 1."""
    wide = rows.float()
    top = wide.abs().amax(dim=1)
    scales = torch.where(top == 0, torch.ones_like(top), top / FP8_LARGEST)
    return (wide / scales[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scales


def linear(
    x: torch.Tensor, data: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    wide_bias = None if bias is None else bias.float()
    if scales is None:
        out.copy_(F.linear(x.float(), data.float(), wide_bias))
        return
    quants, x_scales = quantize_fp8(x)
    product = F.linear(quants.float(), data.float()) * (x_scales[:, None] * scales[None, :])
    out.copy_(product if wide_bias is None else product + wide_bias)


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


def gather_rows(data: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, out: torch.Tensor) -> None:
    if scales is None:
        out.copy_(data.index_select(0, ids))
    else:
        out.copy_(data.view(torch.uint8).index_select(0, ids).view(FP8).float() * scales[ids][:, None])
