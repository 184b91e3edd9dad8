"""Products of a corpus of bytes, int8 or fp8, without a conversion of each byte on its way to the tensor cores.

Knows queries in parts and the products with them; does not know groups, filters nor rows' scales.

A query is scaled by a power of two. int8: it is written as 256 * high + low, two rows of int8 (as good as 16 bits), and int8
tensor cores multiply corpus bytes from where they were loaded to: sums are exact, whatever their order. fp8: it is rounded to
fp16, and four bytes of a row are one word: part j of a query has the columns 4 i + j, so that byte j of neighbouring words are
neighbours in a product, and what is loaded, converted and multiplied is never rearranged. Products with the tensor cores' own
fp8 would need no conversion, but add up in fewer bits than fp32 has.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.check import ShapeError

MOST_WIDE = 2**31 // 128**2 - 1  # columns of int8 whose sum of products always fits in 32 bits


@triton.jit
def prepare_kernel(queries, parts, scales, width, stride, INT8: tl.constexpr, BLOCK: tl.constexpr):
    """scales [Q], and parts of queries [Q, width]: int8 [Q, 2, stride], high and low; else fp16 [Q, 4, stride / 4]."""
    q = tl.program_id(0).to(tl.int64)
    queries += q * width
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(queries + i, i < width, 0.0)))
    # The power of two that makes the largest at most 2^15 / 1.004 < 127.5 * 256: high fits in a byte. A query of few bits stays
    # what it is. Where that power is not a normal number, the least normal one.
    exponent = tl.maximum(((tl.max(largest, 0) * 1.004).to(tl.int32, bitcast=True) >> 23) - 14, 1)
    tl.store(scales + q, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for first in range(0, stride, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(queries + i, i < width, 0.0) * inverse
        if INT8:
            whole = tl.floor(value + 0.5).to(tl.int32)
            high = (whole + 128) >> 8
            tl.store(parts + 2 * q * stride + i, high.to(tl.int8), i < stride)
            tl.store(parts + (2 * q + 1) * stride + i, (whole - 256 * high).to(tl.int8), i < stride)
        else:
            tl.store(parts + q * stride + i % 4 * (stride // 4) + i // 4, value.to(tl.float16), i < stride)


@triton.jit
def int8_products(
    data, parts, scales, row, first_query, num_queries, stride, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[n, q]: data[row[n]] . queries[first_query + q], 0 from num_queries on. A query's parts are neighbouring columns."""
    parts += first_query * 2 * stride
    part = tl.arange(0, 2 * BLOCK_Q)
    valid = part < 2 * num_queries
    sums = tl.zeros((BLOCK_N, 2 * BLOCK_Q), tl.int32)
    tl.assume(stride > 0)  # or else sums are converted in each step, for the case of none
    for first in range(0, stride, BLOCK_K):
        offs = first + tl.arange(0, BLOCK_K)
        at = data + row[:, None] * stride + offs[None, :]
        from_parts = parts + part[None, :] * stride + offs[:, None]
        if EVEN:
            a = tl.load(at)
            b = tl.load(from_parts, valid[None, :], 0)
        else:
            a = tl.load(at, (offs < stride)[None, :], 0)
            b = tl.load(from_parts, valid[None, :] & (offs < stride)[:, None], 0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    high, low = tl.split(tl.reshape(sums, (BLOCK_N, BLOCK_Q, 2)))
    q = tl.arange(0, BLOCK_Q)
    scale = tl.load(scales + first_query + q, q < num_queries, 0.0)
    return (high.to(tl.float32) * 256.0 + low.to(tl.float32)) * scale[None, :]


@triton.jit
def fp8_products(
    data, parts, scales, row, first_query, num_queries, stride, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same of words of four fp8: stride and BLOCK_K count words. BLOCK_K is part of the order of a sum."""
    parts += first_query * 4 * stride
    q = tl.arange(0, BLOCK_Q)
    valid = q < num_queries
    sums = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    for first in range(0, stride, BLOCK_K):
        offs = first + tl.arange(0, BLOCK_K)
        at = data + row[:, None] * stride + offs[None, :]
        from_parts = parts + q[None, :] * (4 * stride) + offs[:, None]
        if EVEN:
            words = tl.load(at)
            inside = valid[None, :]
        else:
            words = tl.load(at, (offs < stride)[None, :], 0)
            inside = valid[None, :] & (offs < stride)[:, None]
        a0, a1, a2, a3 = _unpacked(words, UPCAST)
        sums = tl.dot(a0, tl.load(from_parts, inside, 0.0).to(a0.dtype), sums, input_precision="ieee")
        sums = tl.dot(a1, tl.load(from_parts + stride, inside, 0.0).to(a0.dtype), sums, input_precision="ieee")
        sums = tl.dot(a2, tl.load(from_parts + 2 * stride, inside, 0.0).to(a0.dtype), sums, input_precision="ieee")
        sums = tl.dot(a3, tl.load(from_parts + 3 * stride, inside, 0.0).to(a0.dtype), sums, input_precision="ieee")
    return sums * tl.load(scales + first_query + q, valid, 0.0)[None, :]


@triton.jit
def _unpacked(words, UPCAST: tl.constexpr):
    """The four bytes of each word as fp16; interpreted, where there is no assembly, as fp32."""
    if UPCAST:
        a0, a1, a2, a3 = _byte(words, 0), _byte(words, 1), _byte(words, 2), _byte(words, 3)
    else:
        # Two words at once: two bytes are converted by one instruction, and a pair of one part is put together by another. The
        # compiler takes four times as many for shifts and casts.
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            """{
            .reg .b16 first_low, first_high, second_low, second_high;
            .reg .b32 first01, first23, second01, second23;
            mov.b32 {first_low, first_high}, $4;
            mov.b32 {second_low, second_high}, $5;
            cvt.rn.f16x2.e4m3x2 first01, first_low;
            cvt.rn.f16x2.e4m3x2 first23, first_high;
            cvt.rn.f16x2.e4m3x2 second01, second_low;
            cvt.rn.f16x2.e4m3x2 second23, second_high;
            prmt.b32 $0, first01, second01, 0x5410;
            prmt.b32 $1, first01, second01, 0x7632;
            prmt.b32 $2, first23, second23, 0x5410;
            prmt.b32 $3, first23, second23, 0x7632;
            }""",
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a0, a1, a2, a3


@triton.jit
def _byte(words, j: tl.constexpr):
    return ((words >> (8 * j)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


def prepare(queries: torch.Tensor, stride: int, int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts and scales of queries [Q, D] for rows of `stride` bytes."""
    if int8 and stride > MOST_WIDE:
        raise ShapeError(
            f"`corpus` has int8 rows of {stride} columns, more than the {MOST_WIDE} that are summed in 32 bits"
        )
    num_queries, width = queries.shape
    shape, dtype = ((num_queries, 2, stride), torch.int8) if int8 else ((num_queries, 4, stride // 4), torch.float16)
    parts = torch.empty(shape, dtype=dtype, device=queries.device)
    scales = torch.empty(num_queries, dtype=torch.float32, device=queries.device)
    prepare_kernel[(num_queries,)](queries, parts, scales, width, stride, INT8=int8, BLOCK=1024)
    return parts, scales


AOT_CASES = [
    AotCase(
        f"prepare-{name}",
        prepare_kernel,
        {"queries": "*fp32", "parts": parts, "scales": "*fp32", "width": "i32", "stride": "i32:16"},
        {"INT8": name == "int8", "BLOCK": 1024},
    )
    for name, parts in (("int8", "*i8"), ("fp8", "*fp16"))
]
