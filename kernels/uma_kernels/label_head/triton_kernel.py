"""Logits and log-probabilities of a few tokens on a GPU; the logits of the whole vocabulary never lie in memory.

Knows rows, token ids and a packed weight; does not know what the tokens mean.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted
from uma_kernels.linear import PackedLinear
from uma_kernels.linear.triton_kernel import (
    Tile,
    constants,
    device_limits,
    operand_types,
    operands,
    products,
    quantize_rows,
)

LABELS = 4  # of one row that a program computes: a constant, so that a label's sum does not know how many there are
COLUMNS = 128  # of the vocabulary in a tile: likewise, for the sums of a row
FEW = Tile(64, COLUMNS, 128, 4, 5)
MANY = Tile(128, COLUMNS, 128, 8, 4)
FP32 = Tile(32, COLUMNS, 64, 8, 2)
EMULATED = Tile(16, COLUMNS, 128, 4, 2)


@triton.jit(do_not_specialize=["T", "L"])
def dots_kernel(
    hidden, rows, w, w_scales, ids, out, T, V, K, L, stride_h, stride_w, ids_row,
    SCALED: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, l] = hidden[rows[r]] . w[ids[r * ids_row + l]] in fp32; one out of range is not written."""
    r = tl.program_id(0).to(tl.int64)
    label = tl.program_id(1) * LABELS + tl.arange(0, LABELS)
    row = tl.load(rows + r)
    index = tl.load(ids + r * ids_row + label, label < L, -1)
    keep = (index >= 0) & (index < V) & (row >= 0) & (row < T)
    sums = tl.zeros((LABELS, BLOCK), tl.float32)
    for first in range(0, K, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        h = tl.load(hidden + row * stride_h + offs, (offs < K) & (row >= 0) & (row < T), 0.0).to(tl.float32)
        at = w + index[:, None] * stride_w + offs[None, :]
        sums += tl.load(at, keep[:, None] & (offs < K)[None, :], 0.0).to(tl.float32) * h[None, :]
    result = tl.sum(sums, 1)
    if SCALED:
        result *= tl.load(w_scales + index, keep, 0.0)
    tl.store(out + r * L + label, result, keep)


@triton.jit(do_not_specialize=["T"])
def logsumexp_tiles_kernel(
    x, w, x_scales, w_scales, tops, sums, T, V, K, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLUSH: tl.constexpr, TMA_X: tl.constexpr,
    TMA_W: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of each row and BLOCK_N tokens: the largest logit, and the sum of e^(logit - largest). tops, sums [T, tiles]."""
    first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    in_m, in_n = offs_m < T, offs_n < V
    logits = products(
        x, w, first_m, first_n, T, V, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, FLUSH, TMA_X, TMA_W, INTERPRETED
    )  # fmt: skip
    if SCALED:
        logits *= tl.load(x_scales + offs_m, in_m, 0.0)[:, None] * tl.load(w_scales + offs_n, in_n, 0.0)[None, :]
    logits = tl.where(in_n[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    to = offs_m.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + to, top, in_m)
    tl.store(sums + to, tl.sum(tl.exp(logits - top[:, None]), 1), in_m)


@triton.jit
def logprobs_kernel(tops, sums, logits, out, tiles, C, TILES: tl.constexpr, CHOSEN: tl.constexpr):
    """out = logits - logsumexp of the row, at most 0."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, TILES)
    top = tl.load(tops + row * tiles + offs, offs < tiles, float("-inf"))
    largest = tl.max(top, 0)
    whole = tl.sum(tl.load(sums + row * tiles + offs, offs < tiles, 0.0) * tl.exp(top - largest), 0)
    chosen = tl.arange(0, CHOSEN)
    value = tl.load(logits + row * C + chosen, chosen < C, 0.0) - largest - tl.log(whole)
    # a NaN stays one
    tl.store(out + row * C + chosen, tl.where(value > 0.0, 0.0, value), chosen < C)


def label_head(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    _dots(hidden, rows, weight, token_ids, 0, out)


def token_logprobs(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    if not out.numel():
        return
    x = hidden.index_select(0, rows)
    logits = torch.empty_like(out)
    _dots(x, torch.arange(x.shape[0], device=x.device), weight, token_ids, token_ids.shape[1], logits)
    x_scales = None
    if weight.scales is not None:
        x, x_scales = quantize_rows(x)
    tokens, width = x.shape
    vocabulary = weight.shape[0]
    capability = device_limits(x.device)[1]
    tile = EMULATED if interpreted() else FP32 if x.dtype is torch.float32 else FEW
    if tokens > FEW.rows and tile is FEW and capability >= 9:
        tile = MANY
    depth = tile.depth // x.element_size()
    a, b, how = operands(x, weight.data, tile, depth)
    tiles = triton.cdiv(vocabulary, tile.columns)
    tops, sums = torch.empty(2, tokens, tiles, dtype=torch.float32, device=x.device)
    logsumexp_tiles_kernel[(triton.cdiv(tokens, tile.rows), tiles)](
        a, b, x_scales, weight.scales, tops, sums, tokens, vocabulary, width, x.stride(0), weight.data.stride(0),
        SCALED=x_scales is not None, **how, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    logprobs_kernel[(tokens,)](
        tops, sums, logits, out, tiles, out.shape[1],
        TILES=triton.next_power_of_2(tiles), CHOSEN=triton.next_power_of_2(out.shape[1]),
    )  # fmt: skip


def _dots(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, ids: torch.Tensor, ids_row: int, out: torch.Tensor
) -> None:
    """The order of each sum is a function of K alone."""
    if not out.numel():
        return
    data, width = weight.data, weight.shape[1]
    count = out.shape[1]
    dots_kernel[(out.shape[0], triton.cdiv(count, LABELS))](
        hidden, rows, data, weight.scales, ids, out, hidden.shape[0], weight.shape[0], width, count,
        hidden.stride(0), data.stride(0), ids_row,
        SCALED=weight.scales is not None, LABELS=LABELS, BLOCK=min(1024, triton.next_power_of_2(width)),
    )  # fmt: skip


_DOTS = {
    "hidden": "*bf16", "rows": "*i64", "w": "*bf16", "ids": "*i64", "out": "*fp32", "T": "i32", "V": "i32", "K": "i32:16",
    "L": "i32", "stride_h": "i32:16", "stride_w": "i32:16", "ids_row": "i32",
}  # fmt: skip


def _tiles_case(tile: Tile, dtype: str, tma: bool) -> AotCase:
    depth = tile.depth // (4 if dtype == "fp32" else 2)
    return AotCase(
        f"logsumexp-{tile.rows}x{tile.columns}-{dtype}" + ("-tma" if tma else ""),
        logsumexp_tiles_kernel,
        operand_types(dtype, tile, depth, tma, tma)
        | {"tops": "*fp32", "sums": "*fp32", "T": "i32", "V": "i32", "K": "i32:16", "stride_x": "i32:16", "stride_w": "i32:16"},
        constants(tile, depth, dtype == "fp32", tma, tma) | {"x_scales": None, "w_scales": None, "SCALED": False},
        tile.warps,
        tile.stages,
        is_matmul=dtype != "fp32",
        only=90 if tma else None,
    )  # fmt: skip


AOT_CASES = [
    AotCase("dots", dots_kernel, _DOTS, {"w_scales": None, "SCALED": False, "LABELS": LABELS, "BLOCK": 1024}),
    _tiles_case(FEW, "bf16", True),
    _tiles_case(MANY, "bf16", True),
    _tiles_case(FEW, "bf16", False),
    _tiles_case(FP32, "fp32", False),
    AotCase(
        "logprobs",
        logprobs_kernel,
        {"tops": "*fp32", "sums": "*fp32", "logits": "*fp32", "out": "*fp32", "tiles": "i32", "C": "i32"},
        {"TILES": 2048, "CHOSEN": 1},
    ),
]
