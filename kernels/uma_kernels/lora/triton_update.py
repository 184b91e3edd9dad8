"""The low-rank update of one tile of a product on a GPU: s @ B added to sums that hold x W^T.

Knows a tile's rows, their slots and a pool's tables; does not know the product or who wrote s.

The slots that have rows in the tile are taken lowest first, several at a step: each has 16 columns of a product whose other
operand holds, for each row, s in the columns of its own slot and zeros elsewhere, which add nothing. A row's sum is one chain
over the blocks of its own adapter, whatever else is in the tile and however many slots a step takes: a tensor core adds 16
columns at a time. What a step needs is found by loads that wait for each other, so the first one's begin before the product.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_updates", "begin_updates", "product", "slots_at_once", "unpacked"]


def slots_at_once(columns: int, capability: int = 9) -> int:
    """Slots of a step, for a tile of so many columns: B of all of them is in registers."""
    if capability < 9:
        return 1 if columns > 32 else 4
    return 1 if columns > 128 else 2 if columns > 64 else 4 if columns > 32 else 8


@triton.jit
def unpacked(stored, STORED_AS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """What a loaded tile [HEIGHT, WIDTH] stands for, before its row's scale; int4 holds two columns a byte."""
    if STORED_AS == 2:
        low = (stored & 15).to(tl.int32) - 8
        high = (stored >> 4).to(tl.int32) - 8
        return tl.join(low, high).reshape(HEIGHT, WIDTH).to(tl.float32).to(DTYPE)
    else:
        return stored.to(DTYPE)


@triton.jit
def product(left, right, total, INTERPRETED: tl.constexpr):
    """total + left @ right in fp32."""
    if (
        INTERPRETED
    ):  # its `dot` is the library's: wrong for bf16, and an element's order depends on its place in the tile
        return total + tl.sum(left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :], axis=1)
    else:
        return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _next_slots(slots, last, num_slots, AT_ONCE: tl.constexpr):
    """The slot of each of 16 * AT_ONCE columns: the lowest of `slots` above `last`, `num_slots` where there are no more; and the
    last of them."""
    member = tl.arange(0, 16 * AT_ONCE) // 16
    of = member * 0 + num_slots
    for g in tl.static_range(AT_ONCE):
        last = tl.min(tl.where(slots <= last, num_slots, slots), 0)
        of = tl.where(member == g, last, of)
    return of, last


@triton.jit
def begin_updates(
    slots, last, b_ptr, b_start, table_ptr, which, n0, width, num_slots, TABLE, RANK_BLOCKS, SLICES: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr, STORED_AS: tl.constexpr,
):  # fmt: skip
    """The first step after slot `last` (-1: of all): its slots, the last of them, where their blocks begin and end in the table, and
    the first of these blocks' B [16 * AT_ONCE, BLOCK_N] as stored."""
    PER: tl.constexpr = 2 if STORED_AS == 2 else 1
    NOTHING: tl.constexpr = 0 if STORED_AS == 2 else 0.0
    of, last = _next_slots(slots, last, num_slots, AT_ONCE)
    row = table_ptr + of * TABLE
    first = tl.load(row + which, of < num_slots, 0)
    end = tl.load(row + which + 1, of < num_slots, 0)
    block = tl.load(row + SLICES + 1 + first, first < end, 0) - which * RANK_BLOCKS
    packed = n0 // PER + tl.arange(0, BLOCK_N // PER)
    rows = b_ptr + b_start + (block.to(tl.int64) * 16 + tl.arange(0, 16 * AT_ONCE) % 16) * (width // PER)
    stored = tl.load(
        rows[:, None] + packed[None, :], (first < end)[:, None] & (packed < width // PER)[None, :], NOTHING
    )
    return of, last, first, end, stored


@triton.jit
def add_updates(
    sums, slots, offs_m, of, last, first, end, stored, s_ptr, s_stride, b_ptr, b_start, table_ptr, which, n0, width, num_slots,
    TABLE, RANK_BLOCKS, SLICES: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr, STORED_AS: tl.constexpr,
    DTYPE: tl.constexpr, ROWS_RIGHT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums [rows, BLOCK_N] (ROWS_RIGHT: [BLOCK_N, rows]) with every row's update, from the step that `begin_updates` gave on.

    `slots` of the rows, -1 for the base; `offs_m`: their places in s. A program of another multiprocessor may have written s."""
    PER: tl.constexpr = 2 if STORED_AS == 2 else 1
    HEIGHT: tl.constexpr = 16 * AT_ONCE
    r = tl.arange(0, HEIGHT) % 16
    packed = n0 // PER + tl.arange(0, BLOCK_N // PER)
    in_b = (packed < width // PER)[None, :]
    s_rows = offs_m.to(tl.int64) * s_stride
    while tl.min(of, 0) < num_slots:
        for j in range(tl.max(end - first, 0)):
            has = first + j < end
            # The first block's B is here already: it was loaded before anything else was waited for.
            later = has & (j > 0)
            block = tl.load(table_ptr + of * TABLE + SLICES + 1 + first + j, later, 0) - which * RANK_BLOCKS
            rows = b_ptr + b_start + (block.to(tl.int64) * 16 + r) * (width // PER)
            stored = tl.load(rows[:, None] + packed[None, :], later[:, None] & in_b, stored)
            column = (first + j) * 16 + r
            b = unpacked(stored, STORED_AS, HEIGHT, BLOCK_N, DTYPE)
            if ROWS_RIGHT:
                own = (of[:, None] == slots[None, :]) & has[:, None]
                s = tl.load((s_ptr + s_rows)[None, :] + column[:, None], own, 0.0, cache_modifier=".cg")
                sums = product(tl.trans(b), s, sums, INTERPRETED)
            else:
                own = (slots[:, None] == of[None, :]) & has[None, :]
                s = tl.load((s_ptr + s_rows)[:, None] + column[None, :], own, 0.0, cache_modifier=".cg")
                sums = product(s, b, sums, INTERPRETED)
        of, last, first, end, stored = begin_updates(
            slots, last, b_ptr, b_start, table_ptr, which, n0, width, num_slots, TABLE, RANK_BLOCKS, SLICES, AT_ONCE, BLOCK_N,
            STORED_AS,
        )  # fmt: skip
    return sums
