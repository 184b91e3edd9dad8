"""Attention in Triton, on a GPU or in the interpreter.

Knows tiles of queries and keys, and the schedule that `plan` made of a step; does not know trees. Shapes are checked by the
caller. A row's keys are reduced tile by tile from the front of its path, in fp32; decoding cuts the path into splits of a
fixed number of positions and joins them from the front. Neither order knows of other rows.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.attention.plan import PIECE_FIELDS, PROGRAM_FIELDS
from uma_kernels.check import readable
from uma_kernels.dispatch import interpreted

if TYPE_CHECKING:
    from uma_kernels.attention import AttentionBatch

_PROGRAM = tl.constexpr(len(PROGRAM_FIELDS))
_PIECE = tl.constexpr(len(PIECE_FIELDS))
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes of a kernel. `block_m`: rows (a query times the query heads of a key-value head); `block_n`: keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """`split`: positions of a context that one program reduces, a multiple of `block_n`."""

    split: int
    block_n: int
    num_warps: int
    num_stages: int


# By the padded head dimension. The tile sizes decide a row's bits: they may depend on the head and the dtype alone.
TREE_CONFIGS = {
    16: Config(64, 64, 4, 3),
    32: Config(64, 64, 4, 3),
    64: Config(128, 64, 8, 5),
    128: Config(128, 64, 8, 5),
    256: Config(128, 32, 8, 3),
}
TREE_CONFIGS_BEFORE_SM90 = TREE_CONFIGS | {
    64: Config(128, 64, 8, 3),
    128: Config(64, 32, 4, 3),
    256: Config(64, 32, 8, 3),
}  # without wgmma registers are shorter
TREE_CONFIGS_FP32 = {
    16: Config(32, 16, 4, 1),
    32: Config(32, 16, 4, 1),
    64: Config(32, 16, 4, 1),
    128: Config(16, 16, 8, 1),
    256: Config(16, 16, 8, 1),
}
TREE_CONFIGS_FP32_BEFORE_SM90 = TREE_CONFIGS_FP32 | {256: Config(16, 16, 16, 1)}
DECODE_CONFIGS = {
    16: DecodeConfig(256, 64, 4, 3),
    32: DecodeConfig(256, 64, 4, 3),
    64: DecodeConfig(256, 128, 4, 4),
    128: DecodeConfig(256, 32, 4, 6),
    256: DecodeConfig(256, 32, 4, 4),
}
DECODE_CONFIGS_FP32 = {
    16: DecodeConfig(256, 32, 4, 2),
    32: DecodeConfig(256, 32, 4, 2),
    64: DecodeConfig(256, 32, 4, 2),
    128: DecodeConfig(256, 16, 4, 2),
    256: DecodeConfig(256, 16, 8, 1),
}
JOINED = 16  # splits that the joining kernel holds at a time
DECODE_PROGRAMS = 4096  # of a decode step, about: 15 for each that an H200 runs at once, so that long contexts even out


@triton.jit
def _scores(q, k, INTERPRETED: tl.constexpr):
    """q K^T in fp32. The interpreter's own product rounds 16-bit operands wrongly, and by where in a tile a row lies."""
    if INTERPRETED:
        return tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _softmax_step(scores, v, maximum, total, acc, scale, MASKED: tl.constexpr, INTERPRETED: tl.constexpr):
    """One tile of scores and values into the online softmax. Only with MASKED may a row have seen nothing yet."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    finite = tl.where(new_maximum == -float("inf"), 0.0, new_maximum) if MASKED else new_maximum
    shrink = tl.exp2((maximum - finite) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -(finite * scale)[:, None]))
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    weights = weights.to(v.dtype)
    if INTERPRETED:
        acc += tl.sum(weights.to(tl.float32)[:, None, :] * tl.trans(v.to(tl.float32))[None, :, :], 2)
    else:
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def _tiles(
    q, maximum, total, acc, k, v, k_cache, v_cache, slots, begin, end, keys, position, mine, window,
    k_stride, v_stride, k_cache_stride, v_cache_stride, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles `begin` .. `end` of the context whose slots begin at `slots`, into the online softmax of rows q.

    k .. v_cache point at the head. Rows outside `mine` see nothing of masked tiles, and keep their values.
    """
    column = tl.arange(0, BLOCK_D)
    stages: tl.constexpr = 1 if MASKED else None  # few tiles: nothing to overlap, and registers are short
    for tile in tl.range(begin, end, num_stages=stages):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if MASKED:
            slot = tl.load(slots + key, mask=key < keys, other=0)
        else:
            slot = tl.load(slots + key)
        cached = slot >= 0
        k_row = tl.where(cached, k_cache + slot.to(tl.int64) * k_cache_stride, k + (-1 - slot).to(tl.int64) * k_stride)
        v_row = tl.where(cached, v_cache + slot.to(tl.int64) * v_cache_stride, v + (-1 - slot).to(tl.int64) * v_stride)
        k_at, v_at = k_row[:, None] + column[None, :], v_row[:, None] + column[None, :]
        if MASKED:
            readable = (key < keys)[:, None] & (column < HEAD_DIM)[None, :]
            k_tile = tl.load(k_at, mask=readable, other=0.0)
            v_tile = tl.load(v_at, mask=readable, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            inside = (column < HEAD_DIM)[None, :]
            k_tile = tl.load(k_at, mask=inside, other=0.0)
            v_tile = tl.load(v_at, mask=inside, other=0.0)
        else:
            k_tile = tl.load(k_at)
            v_tile = tl.load(v_at)
        scores = _scores(q, k_tile, INTERPRETED)
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & mine[:, None]
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        maximum, total, acc = _softmax_step(scores, v_tile, maximum, total, acc, scale, MASKED, INTERPRETED)
    return maximum, total, acc


@triton.jit(do_not_specialize=["window"])
def _tree(
    q, k, v, k_cache, v_cache, out, programs, pieces, positions, slots, scale, window,
    q_stride, k_stride, v_stride, k_cache_stride, v_cache_stride, out_stride,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program of the plan, for PACK query heads of one key-value head. Row m holds head m % PACK of query m // PACK."""
    program = programs + tl.program_id(0) * _PROGRAM
    first_row, rows, context = tl.load(program), tl.load(program + 1), tl.load(program + 2)
    full_begin, full_end = tl.load(program + 3), tl.load(program + 4)
    piece_begin, piece_end = tl.load(program + 5), tl.load(program + 6)
    first_head = tl.program_id(1) * PACK
    kv_head = (first_head // GROUP).to(tl.int64) * HEAD_DIM
    k += kv_head
    v += kv_head
    k_cache += kv_head
    v_cache += kv_head

    m, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, head = m // PACK, first_head + m % PACK
    valid = row < rows
    inside = valid[:, None] & (column < HEAD_DIM)[None, :]
    place = (first_row + row).to(tl.int64)[:, None]
    q_tile = tl.load(q + place * q_stride + head[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
    position = tl.load(positions + first_row + row, mask=valid, other=0)
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOWED:
        piece = pieces + piece_begin * _PIECE
        maximum, total, acc = _tiles(
            q_tile, maximum, total, acc, k, v, k_cache, v_cache, slots + tl.load(piece), tl.load(piece + 1),
            tl.load(piece + 2), tl.load(piece + 3), position, valid, window,
            k_stride, v_stride, k_cache_stride, v_cache_stride, scale,
            HEAD_DIM, BLOCK_N, BLOCK_D, True, WINDOWED, INTERPRETED,
        )  # fmt: skip
    maximum, total, acc = _tiles(
        q_tile, maximum, total, acc, k, v, k_cache, v_cache, slots + context, full_begin,
        full_end, 0, position, valid, window,
        k_stride, v_stride, k_cache_stride, v_cache_stride, scale,
        HEAD_DIM, BLOCK_N, BLOCK_D, False, WINDOWED, INTERPRETED,
    )  # fmt: skip
    for index in range(piece_begin + 1, piece_end):
        piece = pieces + index * _PIECE
        mine = (row >= tl.load(piece + 4)) & (row < tl.load(piece + 5))
        maximum, total, acc = _tiles(
            q_tile, maximum, total, acc, k, v, k_cache, v_cache, slots + tl.load(piece), tl.load(piece + 1),
            tl.load(piece + 2), tl.load(piece + 3), position, mine, window,
            k_stride, v_stride, k_cache_stride, v_cache_stride, scale,
            HEAD_DIM, BLOCK_N, BLOCK_D, True, WINDOWED, INTERPRETED,
        )  # fmt: skip
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place * out_stride + head[:, None] * HEAD_DIM + column[None, :], result, mask=inside)


@triton.jit
def _one_split(
    q, k_cache, v_cache, part_acc, part_max, part_sum, block_table, sequence, split, length, scale, window, num_slots,
    table_width, splits, q_stride, k_cache_stride, v_cache_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WINDOWED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Positions SPLIT * split .. of one sequence for BLOCK_M query heads of one key-value head: a softmax not yet divided.

    A slot outside the cache is not read, and makes the sum NaN.
    """
    tiles_m: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(1) // tiles_m
    begin, end = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length)
    if WINDOWED:
        begin = tl.maximum(begin, (length - window) // BLOCK_N * BLOCK_N)
    if begin < end:
        m, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        member = tl.program_id(1) % tiles_m * BLOCK_M + m
        head = kv_head * GROUP + member
        inside = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        q_tile = tl.load(q + sequence * q_stride + head[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
        k_head, v_head = k_cache + kv_head * HEAD_DIM, v_cache + kv_head * HEAD_DIM
        table = block_table + sequence * table_width
        maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        lost = tl.zeros([BLOCK_N], tl.int1)
        for start in tl.range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            known = (key < end) & (key // BLOCK_SIZE < table_width)
            block = tl.load(table + key // BLOCK_SIZE, mask=known, other=-1)
            slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            good = (block >= 0) & (slot < num_slots)
            lost = lost | ((key < end) & (good == 0))
            readable = good[:, None] & (column < HEAD_DIM)[None, :]
            k_tile = tl.load(k_head + (slot * k_cache_stride)[:, None] + column[None, :], mask=readable, other=0.0)
            v_tile = tl.load(v_head + (slot * v_cache_stride)[:, None] + column[None, :], mask=readable, other=0.0)
            scores = _scores(q_tile, k_tile, INTERPRETED)
            seen = key < end
            if WINDOWED:
                seen = seen & (key >= length - window)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            maximum, total, acc = _softmax_step(scores, v_tile, maximum, total, acc, scale, False, INTERPRETED)
        total = tl.where(tl.max(lost.to(tl.int32), 0) > 0, float("nan"), total)
        part = (sequence * HEADS + head) * splits + split
        tl.store(part_max + part, maximum, mask=member < GROUP)
        tl.store(part_sum + part, total, mask=member < GROUP)
        tl.store(part_acc + part[:, None] * HEAD_DIM + column[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["window", "num_slots", "table_width", "splits"])
def _decode_split(
    q, k_cache, v_cache, part_acc, part_max, part_sum, block_table, context_lens, scale, window, num_slots, table_width, splits,
    q_stride, k_cache_stride, v_cache_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SHARED: tl.constexpr, WINDOWED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One split of one sequence a program; SHARED: there are fewer programs, which take the splits that its length has in turn."""
    sequence = tl.program_id(0).to(tl.int64)
    length = tl.load(context_lens + sequence)
    if SHARED:
        first = 0
        if WINDOWED:
            first = tl.maximum(length - window, 0) // SPLIT
        last = tl.minimum((length + SPLIT - 1) // SPLIT, splits)
        for split in tl.range(first + tl.program_id(2), last, tl.num_programs(2), disable_licm=True):
            _one_split(
                q, k_cache, v_cache, part_acc, part_max, part_sum, block_table, sequence, split, length, scale, window,
                num_slots, table_width, splits, q_stride, k_cache_stride, v_cache_stride,
                HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, SPLIT, BLOCK_M, BLOCK_N, BLOCK_D, WINDOWED, INTERPRETED,
            )  # fmt: skip
    else:
        _one_split(
            q, k_cache, v_cache, part_acc, part_max, part_sum, block_table, sequence, tl.program_id(2), length, scale, window,
            num_slots, table_width, splits, q_stride, k_cache_stride, v_cache_stride,
            HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, SPLIT, BLOCK_M, BLOCK_N, BLOCK_D, WINDOWED, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window", "splits"])
def _decode_join(
    part_acc, part_max, part_sum, context_lens, out, scale, window, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, JOINED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One query head's splits joined from the front, JOINED at a time. A sequence without context gives zeros."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    length = tl.load(context_lens + tl.program_id(0))
    column = tl.arange(0, BLOCK_D)
    first, last = 0, (length + SPLIT - 1) // SPLIT
    if WINDOWED:
        first = tl.maximum(length - window, 0) // SPLIT
    maximum = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(first // JOINED * JOINED, last, JOINED):
        split = start + tl.arange(0, JOINED)
        used = (split >= first) & (split < last)
        readable = used & (split < splits)  # a length beyond the block table: NaN, and no read outside
        part = row * splits + split
        part_m = tl.load(part_max + part, mask=readable, other=float("nan"))
        part_m = tl.where(used, part_m, -float("inf"))
        part_s = tl.load(part_sum + part, mask=readable, other=0.0)
        parts = tl.load(
            part_acc + part[:, None] * HEAD_DIM + column[None, :],
            mask=readable[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(part_m, 0))
        shrink = tl.exp2((maximum - new_maximum) * scale)
        weights = tl.exp2((part_m - new_maximum) * scale)
        total = total * shrink + tl.sum(weights * part_s, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * parts, 0)
        maximum = new_maximum
    result = tl.where(length > 0, acc / tl.where(length > 0, total, 1.0), 0.0).to(out.dtype.element_ty)
    tl.store(out + row * HEAD_DIM + column, result, mask=column < HEAD_DIM)


def tree_config(head_dim: int, dtype: torch.dtype, before_sm90: bool | None = None) -> Config:
    """`before_sm90`: None asks the current device."""
    if before_sm90 is None:
        before_sm90 = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
    if dtype == torch.float32 or interpreted():  # small tiles, whose products the interpreter multiplies out
        table = TREE_CONFIGS_FP32_BEFORE_SM90 if before_sm90 else TREE_CONFIGS_FP32
    else:
        table = TREE_CONFIGS_BEFORE_SM90 if before_sm90 else TREE_CONFIGS
    return table[_padded(head_dim)]


def decode_config(head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    table = DECODE_CONFIGS_FP32 if dtype == torch.float32 or interpreted() else DECODE_CONFIGS
    return table[_padded(head_dim)]


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    tokens, heads, head_dim = q.shape
    _check_scale(scale)
    batch.check_slots(k.shape[0], k_cache.shape[0])
    if tokens == 0:
        return
    config = config or tree_config(head_dim, q.dtype)
    group = heads // k_cache.shape[1]
    pack = group if group <= config.block_m else 1
    plan = batch.plan(q.device, config.block_m // pack, config.block_n, window)
    _tree[(plan.num_programs, heads // pack)](
        q, k, v, k_cache, v_cache, out, plan.programs, plan.pieces, plan.positions, plan.slots,
        scale * LOG2_E, window or 0,
        q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), v_cache.stride(0), out.stride(0),
        GROUP=group, PACK=pack, HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=_padded(head_dim), WINDOWED=window is not None, INTERPRETED=interpreted(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    config: DecodeConfig | None = None,
) -> None:
    sequences, heads, head_dim = q.shape
    _check_scale(scale)
    if sequences == 0:
        return
    num_slots, kv_heads, _ = k_cache.shape
    if readable(block_table):
        _check_blocks(block_table, context_lens, block_size, num_slots)
    config = config or decode_config(head_dim, q.dtype)
    width = block_table.shape[1]
    splits = max(1, -(-width * block_size // config.split))
    group = heads // kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    part_acc = torch.empty(sequences, heads, splits, head_dim, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, sequences, heads, splits, dtype=torch.float32, device=q.device)
    heads_m = kv_heads * triton.cdiv(group, block_m)
    # Programs that only find out that they have nothing to do cost 2 ns each, of which a graph for long contexts would have most.
    per_sequence = min(splits, max(1, DECODE_PROGRAMS // (sequences * heads_m)))
    _decode_split[(sequences, heads_m, per_sequence)](
        q, k_cache, v_cache, part_acc, part_max, part_sum, block_table, context_lens, scale * LOG2_E, window or 0,
        num_slots, width, splits, q.stride(0), k_cache.stride(0), v_cache.stride(0),
        HEADS=heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLIT=config.split,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=_padded(head_dim), SHARED=per_sequence < splits,
        WINDOWED=window is not None, INTERPRETED=interpreted(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _decode_join[(sequences, heads)](
        part_acc, part_max, part_sum, context_lens, out, scale * LOG2_E, window or 0, splits,
        HEADS=heads, HEAD_DIM=head_dim, SPLIT=config.split, BLOCK_D=_padded(head_dim), JOINED=JOINED,
        WINDOWED=window is not None, num_warps=4,
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"`scale` is {scale} but must be greater than 0")


def _check_blocks(block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int, num_slots: int) -> None:
    """Where values may be looked at: IndexError for what the kernels would answer with NaN or zeros."""
    tables = block_table.tolist()
    for b, length in enumerate(context_lens.tolist()):
        if not 1 <= length <= len(tables[b]) * block_size:
            raise IndexError(f"`context_lens[{b}]` is {length} but {len(tables[b])} blocks of {block_size} are given")
        blocks = tables[b][: -(-length // block_size)]
        ends = [block * block_size + block_size for block in blocks]
        ends[-1] -= -length % block_size  # the last block is used in part
        if min(blocks) < 0 or max(ends) > num_slots:
            raise IndexError(f"`block_table[{b}]` is {blocks} in a cache of {num_slots} slots")


def _aot_cases() -> list[AotCase]:
    pointers = ("q", "k", "v", "k_cache", "v_cache", "out", "part_acc", "part_max", "part_sum")
    cases = []
    for dtype, name in (("bf16", "bf16"), ("fp32", "fp32")):
        torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        for head_dim in (64, 128, 256) if dtype == "fp32" else (16, 64, 80, 128, 256):
            types = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(("part_acc", "part_max", "part_sum"), "*fp32")
            types |= dict.fromkeys(("programs", "pieces", "positions", "slots", "block_table", "context_lens"), "*i32")
            types |= {"scale": "fp32", "window": "i32", "num_slots": "i32", "table_width": "i32", "splits": "i32"}
            strides = ("q_stride", "k_stride", "v_stride", "k_cache_stride", "v_cache_stride", "out_stride")
            types |= dict.fromkeys(strides, "i32:16")
            common = {"HEAD_DIM": head_dim, "BLOCK_D": _padded(head_dim), "INTERPRETED": False}
            for windowed in (False, True) if head_dim == 128 else (False,):
                suffix = f"{name}-D{head_dim}" + ("-window" if windowed else "")
                shape = common | {"WINDOWED": windowed}
                for arch in (80, 90):
                    c = tree_config(head_dim, torch_dtype, arch < 90)
                    tiles = {"GROUP": 2, "PACK": 2, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
                    label, is_matmul = f"tree-{suffix}-sm{arch}", dtype != "fp32"
                    case = AotCase(label, _tree, types, shape | tiles, c.num_warps, c.num_stages, is_matmul, arch)
                    cases.append(case)
                d = decode_config(head_dim, torch_dtype)
                tiles = {
                    "HEADS": 16,
                    "GROUP": 2,
                    "BLOCK_SIZE": 16,
                    "SPLIT": d.split,
                    "BLOCK_M": 16,
                    "BLOCK_N": d.block_n,
                }
                cases += [
                    AotCase(
                        f"decode-{suffix}" + ("-shared" if shared else ""), _decode_split, types,
                        shape | tiles | {"SHARED": shared}, d.num_warps, d.num_stages,
                    )
                    for shared in (False, True)
                ]  # fmt: skip
            join = {"HEADS": 16, "HEAD_DIM": head_dim, "SPLIT": 256, "BLOCK_D": _padded(head_dim), "JOINED": JOINED}
            cases.append(AotCase(f"join-{name}-D{head_dim}", _decode_join, types, join | {"WINDOWED": False}))
    return cases


AOT_CASES = _aot_cases()
