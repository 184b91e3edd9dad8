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


def quantize_rows(
    x: torch.Tensor, block_size: int, levels: float = 32767.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, K] as integers up to `levels`: quants [T, B, block_size] (in fp64), scales and scaled sums [T, B] fp32, B blocks."""
    values = x.reshape(x.shape[0], x.shape[1] // block_size, block_size)
    top = values.abs().amax(dim=-1)
    bad, zero = ~torch.isfinite(top), top < SMALLEST
    safe = torch.where(bad | zero, torch.ones_like(top), top)
    largest = torch.full_like(safe, levels)  # a tensor: torch divides by, or into, a plain number in another way
    quants = torch.round(values * (largest / safe)[:, :, None]).double()
    quants = torch.where((bad | zero)[:, :, None], torch.zeros_like(quants), quants)
    scales = torch.where(zero, torch.zeros_like(top), safe / largest).masked_fill(bad, float("nan"))
    return quants, scales, scales * quants.sum(dim=-1).float()


def split_outliers(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] without the outliers of its blocks, and these alone: values at least twice as large as every other of their block."""
    blocks = x.reshape(x.shape[0], x.shape[1] // block_size, block_size)
    first, second = blocks.abs().topk(2, dim=-1).values.unbind(-1)
    apart = torch.isfinite(first) & (first >= SMALLEST) & (first * 0.5 >= second)
    outlier = apart[:, :, None] & (blocks.abs() == first[:, :, None])
    zeros = torch.zeros_like(blocks)
    return torch.where(outlier, zeros, blocks).reshape(x.shape), torch.where(outlier, blocks, zeros).reshape(x.shape)


def linear_near(x: torch.Tensor, weight: BlockQuantized, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    total = fold_blocks(torch.zeros_like(out), quantize_rows(x, weight.block_size), weight)
    out.copy_(total if bias is None else total + bias)


def linear_fast(x: torch.Tensor, weight: BlockQuantized, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    rest, outliers = split_outliers(x, weight.block_size)
    quants, scales, sums = quantize_rows(rest, weight.block_size, 127.0)
    values = outliers.reshape(quants.shape)  # at most one of a block is not 0
    quants_w = weight.unpacked().reshape(weight.shape[0], -1, weight.block_size).double()
    total = torch.zeros_like(out)
    for block in range(quants.shape[1]):
        scaled = values[:, block].sum(dim=-1)[:, None] * weight.scales[:, block]
        chosen = (values[:, block] != 0).double() @ quants_w[:, block].T
        total = (total.double() + chosen * scaled.double()).float()
    total = fold_blocks(total, (quants, scales, sums + values.sum(dim=-1)), weight)
    out.copy_(total if bias is None else total + bias)


def fold_blocks(
    total: torch.Tensor, rows_x: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: BlockQuantized
) -> torch.Tensor:
    """`total` with all blocks' products added. Integer sums in fp64, which holds them exactly; each multiplication and
    addition of the fold rounds to fp32 once, as a fused one."""
    quants_x, scales_x, sums_x = rows_x
    quants_w = weight.unpacked().reshape(weight.shape[0], -1, weight.block_size).double()
    for block in range(quants_w.shape[1]):
        dots = (quants_x[:, block] @ quants_w[:, block].T).float()
        scale = scales_x[:, block, None] * weight.scales[:, block]
        total = (total.double() + dots.double() * scale.double()).float()
        if weight.mins is not None:
            total = (total.double() + sums_x[:, block, None].double() * weight.mins[:, block].double()).float()
    return total


def gather_rows(data: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, out: torch.Tensor) -> None:
    if scales is None:
        out.copy_(data.index_select(0, ids))
    else:
        out.copy_(data.view(torch.uint8).index_select(0, ids).view(FP8).float() * scales[ids][:, None])
