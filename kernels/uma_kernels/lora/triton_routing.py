"""The routing of a step on a GPU: a counting sort of rows by slot, cut into chunks.

Knows a mapping of rows to slots and the routing's buffers; does not know adapters. Never reads the device back.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.lora.routing import SORT_ROWS, chunk_rows

if TYPE_CHECKING:
    from uma_kernels.lora.routing import DeviceRouting


@triton.jit
def histogram_kernel(mapping_ptr, histogram_ptr, num_tokens, num_slots, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Rows of each slot in each block of ROWS rows."""
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    slot = tl.load(mapping_ptr + rows, mask=rows < num_tokens, other=-1)
    counted = (slot >= 0) & (slot < num_slots)
    counts = tl.histogram(tl.where(counted, slot, 0), SLOTS)
    # A masked row counts for slot 0 above: some Triton versions have no mask there.
    counts -= tl.where(tl.arange(0, SLOTS) == 0, tl.sum(tl.where(counted, 0, 1)), 0)
    tl.store(histogram_ptr + block * SLOTS + tl.arange(0, SLOTS), counts)


@triton.jit
def place_kernel(
    mapping_ptr,
    histogram_ptr,
    order_ptr,
    slots_ptr,
    chunks_ptr,
    count_ptr,
    num_tokens,
    num_slots,
    num_blocks,
    max_chunks,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_TILE: tl.constexpr,
):
    """Stable counting sort: each program places its ROWS rows, and lists its part of the chunks."""
    block = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    blocks = tl.arange(0, BLOCKS)
    counts = tl.load(
        histogram_ptr + blocks[:, None] * SLOTS + slots[None, :], mask=(blocks < num_blocks)[:, None], other=0
    )
    total = tl.sum(counts, axis=0)
    begin = tl.cumsum(total, 0).to(tl.int32) - total  # of the slot's rows in the order
    mine = begin + tl.sum(tl.where((blocks < block)[:, None], counts, 0), axis=0)

    rows = block * ROWS + tl.arange(0, ROWS)
    slot = tl.load(mapping_ptr + rows, mask=rows < num_tokens, other=-1)
    placed = (slot >= 0) & (slot < num_slots)
    other_rows = block * ROWS + tl.arange(0, ROWS)
    other = tl.load(mapping_ptr + other_rows, mask=other_rows < num_tokens, other=-1)
    earlier = tl.sum(((slot[:, None] == other[None, :]) & (other_rows[None, :] < rows[:, None])).to(tl.int32), axis=1)
    start = tl.sum(tl.where(slot[:, None] == slots[None, :], mine[None, :], 0), axis=1)
    tl.store(order_ptr + start + earlier, rows, mask=placed)
    tl.store(slots_ptr + rows, tl.where(placed, slot, -1), mask=rows < num_tokens)

    chunks = (total + CHUNK - 1) // CHUNK
    ends = tl.cumsum(chunks, 0).to(tl.int32)
    num_chunks = tl.sum(chunks)
    if block == 0:
        tl.store(count_ptr, num_chunks)
    for first in range(block * CHUNK_TILE, num_chunks, tl.num_programs(0) * CHUNK_TILE):
        chunk = first + tl.arange(0, CHUNK_TILE)
        of = tl.sum((ends[None, :] <= chunk[:, None]).to(tl.int32), axis=1)
        own = of[:, None] == slots[None, :]
        nth = chunk - tl.sum(tl.where(own, (ends - chunks)[None, :], 0), axis=1)
        left = tl.sum(tl.where(own, total[None, :], 0), axis=1) - nth * CHUNK
        ok = chunk < num_chunks
        tl.store(chunks_ptr + chunk, of, mask=ok)
        tl.store(
            chunks_ptr + max_chunks + chunk, tl.sum(tl.where(own, begin[None, :], 0), axis=1) + nth * CHUNK, mask=ok
        )
        tl.store(chunks_ptr + 2 * max_chunks + chunk, tl.minimum(left, CHUNK), mask=ok)


def build_routing(routing: DeviceRouting, mapping: torch.Tensor) -> None:
    num_tokens = mapping.shape[0]
    blocks = max(1, triton.cdiv(num_tokens, SORT_ROWS))
    slots = routing.histogram.shape[1]
    histogram_kernel[(blocks,)](mapping, routing.histogram, num_tokens, routing.num_slots, SORT_ROWS, slots)
    place_kernel[(blocks,)](
        mapping,
        routing.histogram,
        routing.order,
        routing.slots,
        routing.chunks,
        routing.count,
        num_tokens,
        routing.num_slots,
        blocks,
        routing.max_chunks,
        SORT_ROWS,
        slots,
        triton.next_power_of_2(blocks),
        chunk_rows(num_tokens),
        64,
        num_warps=8,
    )


_SORT = {"mapping_ptr": "*i32", "histogram_ptr": "*i32", "num_tokens": "i32", "num_slots": "i32"}
_PLACE = {f"{name}_ptr": "*i32" for name in ("order", "slots", "chunks", "count")} | {
    "num_blocks": "i32",
    "max_chunks": "i32",
}
AOT_CASES = [
    AotCase("lora_histogram", histogram_kernel, _SORT, {"ROWS": SORT_ROWS, "SLOTS": 64}),
    AotCase(
        "lora_place",
        place_kernel,
        _SORT | _PLACE,
        {"ROWS": SORT_ROWS, "SLOTS": 64, "BLOCKS": 32, "CHUNK": 64, "CHUNK_TILE": 64},
        8,
    ),
]
