"""Low-rank updates of mixed batches on a GPU: the shrink and expand of a site.

Knows buffers of a pool and a routing; does not check shapes (the caller does) and never reads the device back.

A pair runs as two launches (shrink, expand), or as one in which programs that have done their share of the shrink wait for
the rest. In both a tile's K is cut into parts of `split_size`, each summed on its own; the parts are added in order, by the
program itself or, where programs share a tile, by the last of them to arrive. No float is added atomically. The same
instructions run for every batch size, so a row's bits depend on its adapter and on K alone.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted
from uma_kernels.lora.plans import PairPlan, pair_plan
from uma_kernels.lora.pool import split_size
from uma_kernels.lora.routing import SPLIT_TILES, chunk_rows
from uma_kernels.lora.triton_update import product, unpacked

if TYPE_CHECKING:
    from uma_kernels.lora.pool import LoraPool
    from uma_kernels.lora.routing import DeviceRouting

DENSE, FP8, INT4 = 0, 1, 2
STORED = {"dense": DENSE, "fp8": FP8, "int4": INT4}


@triton.jit
def sum_parts(
    x_rows, a_rows, row_ok, token_ok, begin, end, K, SPLIT: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, STORED_AS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A . x over columns `begin` .. `end` of K [BR, BT]: parts of SPLIT, each summed on its own, added in order."""
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    PER: tl.constexpr = 2 if STORED_AS == 2 else 1
    NOTHING: tl.constexpr = 0 if STORED_AS == 2 else 0.0
    total = tl.zeros([BR, BT], tl.float32)
    acc = tl.zeros([BR, BT], tl.float32)
    for k in range(begin, end, BK):
        columns = k + tl.arange(0, BK)
        packed = k // PER + tl.arange(0, BK // PER)
        if EVEN_K:
            a_mask = row_ok[:, None]
            x_mask = token_ok[:, None]
        else:
            a_mask = row_ok[:, None] & (packed < K // PER)[None, :]
            x_mask = token_ok[:, None] & (columns < K)[None, :]
        stored = tl.load(a_rows[:, None] + packed[None, :], mask=a_mask, other=NOTHING)
        x = tl.load(x_rows[:, None] + columns[None, :], mask=x_mask, other=0.0)
        acc = product(unpacked(stored, STORED_AS, BR, BK, DTYPE), tl.trans(x), acc, INTERPRETED)
        part_ends = (k + BK) % SPLIT == 0
        total = tl.where(part_ends, total + acc, total)
        acc = tl.where(part_ends, 0.0, acc)
    return total + acc


@triton.jit
def shrink_tiles(
    x_ptr,
    x_stride,
    a_ptr,
    row_scale_ptr,
    table_ptr,
    row_tiles_ptr,
    order_ptr,
    chunks_ptr,
    count_ptr,
    max_chunks,
    s_ptr,
    s_stride,
    partials_ptr,
    arrivals_ptr,
    ready_ptr,
    first,
    step,
    K,
    SLICES: tl.constexpr,
    TABLE,
    SPLIT: tl.constexpr,
    MAX_SPLIT_TILES: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    STORED_AS: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    SIGNAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Items first, first + step, ... of the shrink: s[token, stacked rank row] = row_scale * x . A, rounded once.

    BY_BLOCK: s has 16 columns for each block of the pool rather than for each stacked row of a slot.
    """
    # Programs share a tile's parts where there are few tiles, each a run of parts so long that all programs have one.
    SPLITS = (K + SPLIT - 1) // SPLIT
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PER: tl.constexpr = 2 if STORED_AS == 2 else 1
    row_tiles = tl.load(row_tiles_ptr)
    num_tiles = tl.load(count_ptr) * row_tiles
    each = tl.minimum(tl.cdiv(SPLITS * num_tiles, step), SPLITS)  # parts of a run
    each = tl.where(num_tiles <= MAX_SPLIT_TILES, tl.maximum(each, 1), SPLITS)
    runs = (SPLITS + each - 1) // each
    shared = runs > 1
    for item in range(first, num_tiles * runs, step):
        tile = item // runs
        part = item % runs * each
        chunk = tile // row_tiles
        slot = tl.load(chunks_ptr + chunk)
        begin = tl.load(chunks_ptr + max_chunks + chunk)
        length = tl.load(chunks_ptr + 2 * max_chunks + chunk)
        num_blocks = tl.load(table_ptr + slot * TABLE + SLICES)
        rows = (tile % row_tiles) * BR + tl.arange(0, BR)
        row_ok = rows < num_blocks * 16
        finished = part == 0
        if (tile % row_tiles) * BR < num_blocks * 16:
            block = tl.load(table_ptr + slot * TABLE + SLICES + 1 + rows // 16, mask=row_ok, other=0)
            a_rows = (block * 16 + rows % 16).to(tl.int64) * (K // PER)
            t = tl.arange(0, BT)
            token_ok = t < length
            token = tl.load(order_ptr + begin + t, mask=token_ok, other=0)
            x_rows = token.to(tl.int64) * x_stride
            total = tl.zeros([BR, BT], tl.float32)
            inside = tl.arange(0, BR)[:, None] * BT + t[None, :]
            partials = partials_ptr + tile * SPLITS * (BR * BT) + inside
            if shared:
                for p in range(part, tl.minimum(part + each, SPLITS)):
                    end = tl.minimum(p * SPLIT + SPLIT, K)
                    one = sum_parts(
                        x_ptr + x_rows, a_ptr + a_rows, row_ok, token_ok, p * SPLIT, end, K, SPLIT, BR, BT, BK, EVEN_K,
                        STORED_AS, INTERPRETED,
                    )  # fmt: skip
                    tl.store(partials + p * (BR * BT), one)
            else:
                total = sum_parts(
                    x_ptr + x_rows, a_ptr + a_rows, row_ok, token_ok, 0, K, K, SPLIT, BR, BT, BK, EVEN_K, STORED_AS, INTERPRETED
                )  # fmt: skip
            if shared:
                tl.debug_barrier()
                arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
                finished = arrived == runs - 1
                if finished:
                    tl.debug_barrier()
                    tl.store(arrivals_ptr + tile, 0)
                    total = tl.zeros([BR, BT], tl.float32)
                    for i in range(0, SPLITS, 2):  # two at a time are on their way
                        one = tl.load(partials + i * (BR * BT), cache_modifier=".cg")
                        two = i + 1 < SPLITS
                        other = tl.load(partials + (i + 1) * (BR * BT), mask=two, other=0.0, cache_modifier=".cg")
                        total = tl.where(two, total + one + other, total + one)
            if finished:
                scale = tl.load(row_scale_ptr + block * 16 + rows % 16, mask=row_ok, other=0.0)
                column = rows
                if BY_BLOCK:
                    column = block * 16 + rows % 16
                tl.store(
                    s_ptr + token.to(tl.int64)[None, :] * s_stride + column[:, None],
                    (total * scale[:, None]).to(DTYPE),
                    mask=row_ok[:, None] & token_ok[None, :],
                )
        if SIGNAL and finished:
            tl.debug_barrier()
            tl.atomic_add(ready_ptr, 1, sem="release")


@triton.jit
def wait_for_shrink(ready_ptr, num_tiles):
    """Until every tile of the shrink has been written, by whatever program."""
    while tl.atomic_add(ready_ptr, 0, sem="acquire") < num_tiles:
        pass
    tl.debug_barrier()


@triton.jit
def leave(ready_ptr, programs):
    """The last of `programs` programs that will read no more puts the counters back for the next launch."""
    tl.debug_barrier()
    if tl.atomic_add(ready_ptr + 1, 1, sem="acq_rel") == programs - 1:
        tl.store(ready_ptr, 0)
        tl.store(ready_ptr + 1, 0)


@triton.jit
def expand_tiles(
    out_ptr,
    out_stride,
    b_ptr,
    table_ptr,
    row_tiles_ptr,
    columns_ptr,
    slice_facts_ptr,
    order_ptr,
    chunks_ptr,
    count_ptr,
    max_chunks,
    s_ptr,
    s_stride,
    ready_ptr,
    first,
    step,
    SLICES: tl.constexpr,
    TABLE,
    COLUMN_TILES,
    RANK_BLOCKS,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STORED_AS: tl.constexpr,
    EVEN_N: tl.constexpr,
    WAIT: tl.constexpr,
    ADD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Items first, first + step, ... of the expand: out[token, columns] += s . B^T of the token's slot, rounded once."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    PER: tl.constexpr = 2 if STORED_AS == 2 else 1
    NOTHING: tl.constexpr = 0 if STORED_AS == 2 else 0.0
    num_chunks = tl.load(count_ptr)
    seen = first * 0  # whether this program knows that the shrink is done
    for item in range(first, num_chunks * COLUMN_TILES, step):
        chunk = item // COLUMN_TILES
        column_tile = item % COLUMN_TILES
        slot = tl.load(chunks_ptr + chunk)
        begin = tl.load(chunks_ptr + max_chunks + chunk)
        length = tl.load(chunks_ptr + 2 * max_chunks + chunk)
        which = tl.load(columns_ptr + column_tile)
        n0 = tl.load(columns_ptr + COLUMN_TILES + column_tile)
        width = tl.load(slice_facts_ptr + which * 3)
        out_column = tl.load(slice_facts_ptr + which * 3 + 1)
        b_start = tl.load(slice_facts_ptr + which * 3 + 2)
        if EVEN_N:  # every width and start is a multiple of the tile, which loads of 16 bytes need to know
            width = tl.multiple_of(width, 16)
            out_column = tl.multiple_of(out_column, 16)
            b_start = tl.multiple_of(b_start, 16)
            n0 = tl.multiple_of(n0, 16)
        first_block = tl.load(table_ptr + slot * TABLE + which)
        end_block = tl.load(table_ptr + slot * TABLE + which + 1)
        if first_block < end_block:
            r = tl.arange(0, 16)
            n = n0 + tl.arange(0, BN)
            packed = n0 // PER + tl.arange(0, BN // PER)
            b_mask = (packed < width // PER)[None, :]
            y_mask = n < width
            b_tile = b_ptr + b_start + (r[:, None] * (width // PER) + packed[None, :])
            block_size = 16 * (width // PER)
            # The first block's B and y travel while the shrink is not yet done.
            block = tl.load(table_ptr + slot * TABLE + SLICES + 1 + first_block) - which * RANK_BLOCKS
            stored = tl.load(b_tile + block * block_size, mask=b_mask, other=NOTHING)
            for sub in tl.static_range(BT // BM):
                t = sub * BM + tl.arange(0, BM)
                token_ok = t < length
                token = tl.load(order_ptr + begin + t, mask=token_ok, other=0).to(tl.int64)
                y_ptrs = out_ptr + token[:, None] * out_stride + (out_column + n)[None, :]
                mask = token_ok[:, None] & y_mask[None, :]
                acc = tl.zeros([BM, BN], tl.float32)
                if sub > 0:
                    block = tl.load(table_ptr + slot * TABLE + SLICES + 1 + first_block) - which * RANK_BLOCKS
                    stored = tl.load(b_tile + block * block_size, mask=b_mask, other=NOTHING)
                y = tl.zeros([BM, BN], DTYPE)
                if ADD:
                    y = tl.load(y_ptrs, mask=mask, other=0.0)
                if WAIT and seen == 0:
                    wait_for_shrink(ready_ptr, num_chunks * tl.load(row_tiles_ptr))
                    seen += 1
                for j in range(first_block, end_block):
                    s = tl.load(
                        s_ptr + token[:, None] * s_stride + (j * 16 + r)[None, :],
                        mask=token_ok[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    acc = product(s, unpacked(stored, STORED_AS, 16, BN, DTYPE), acc, INTERPRETED)
                    more = j + 1 < end_block
                    block = tl.load(table_ptr + slot * TABLE + SLICES + 2 + j, mask=more, other=0)
                    block -= which * RANK_BLOCKS
                    stored = tl.load(b_tile + block * block_size, mask=b_mask & more, other=NOTHING)
                tl.store(y_ptrs, (y.to(tl.float32) + acc).to(DTYPE), mask=mask)


@triton.jit
def pair_kernel(
    x_ptr,
    x_stride,
    out_ptr,
    out_stride,
    a_ptr,
    b_ptr,
    row_scale_ptr,
    table_ptr,
    row_tiles_ptr,
    columns_ptr,
    slice_facts_ptr,
    order_ptr,
    chunks_ptr,
    count_ptr,
    max_chunks,
    s_ptr,
    s_stride,
    partials_ptr,
    arrivals_ptr,
    ready_ptr,
    K,
    SLICES: tl.constexpr,
    TABLE,
    COLUMN_TILES,
    RANK_BLOCKS,
    SPLIT: tl.constexpr,
    MAX_SPLIT_TILES: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STORED_AS: tl.constexpr,
    EVEN_N: tl.constexpr,
    SHRINK: tl.constexpr,
    EXPAND: tl.constexpr,
    ADD: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The shrink, the expand, or both; persistent: the counts are on the device and the grid depends on none of them."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SHRINK:
        shrink_tiles(
            x_ptr,
            x_stride,
            a_ptr,
            row_scale_ptr,
            table_ptr,
            row_tiles_ptr,
            order_ptr,
            chunks_ptr,
            count_ptr,
            max_chunks,
            s_ptr,
            s_stride,
            partials_ptr,
            arrivals_ptr,
            ready_ptr,
            tl.program_id(0),
            tl.num_programs(0),
            K,
            SLICES,
            TABLE,
            SPLIT,
            MAX_SPLIT_TILES,
            BR,
            BT,
            BK,
            EVEN_K,
            STORED_AS,
            BY_BLOCK,
            EXPAND,
            INTERPRETED,
        )
    if EXPAND:
        expand_tiles(
            out_ptr,
            out_stride,
            b_ptr,
            table_ptr,
            row_tiles_ptr,
            columns_ptr,
            slice_facts_ptr,
            order_ptr,
            chunks_ptr,
            count_ptr,
            max_chunks,
            s_ptr,
            s_stride,
            ready_ptr,
            tl.program_id(0),
            tl.num_programs(0),
            SLICES,
            TABLE,
            COLUMN_TILES,
            RANK_BLOCKS,
            BT,
            BM,
            BN,
            STORED_AS,
            EVEN_N,
            SHRINK,
            ADD,
            INTERPRETED,
        )
    if SHRINK and EXPAND:
        leave(ready_ptr, tl.num_programs(0))


@functools.cache
def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs that run at the same time for certain, so that they may wait for each other."""
    if interpreted():
        return 1  # the interpreter runs one after another
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor


def constants(pool: LoraPool, num_tokens: int, plan: PairPlan) -> dict[str, Any]:
    """Constexprs that the kernels of a site share."""
    rows = chunk_rows(num_tokens)
    return {
        "K": pool.in_features,
        "SLICES": len(pool.slices),
        "TABLE": pool.table.shape[1],
        "COLUMN_TILES": pool.columns.shape[1],
        "RANK_BLOCKS": pool.rank_blocks,
        "SPLIT": split_size(pool.in_features),
        "MAX_SPLIT_TILES": SPLIT_TILES,
        "BR": pool.rank_tile,
        "BT": rows,
        "BK": plan.block_k,
        "EVEN_K": pool.in_features % plan.block_k == 0,
        "BM": min(32, rows),
        "BN": pool.column_tile,
        "STORED_AS": STORED[pool.storage],
        "EVEN_N": all(n % 32 == 0 for n in pool.slices),
        "INTERPRETED": interpreted(),
    }


def run_pair(
    x: torch.Tensor,
    out: torch.Tensor,
    pool: LoraPool,
    routing: DeviceRouting,
    plan: PairPlan,
    *,
    shrink: bool,
    expand: bool,
    shrunk: torch.Tensor | None = None,
    add: bool = True,
    by_block: bool = False,
) -> None:
    """One launch. `shrunk` [T, any] takes s instead of the routing's scratch."""
    s = routing.shrunk if shrunk is None else shrunk
    pdl = plan.pdl and not interpreted()
    pair_kernel[(num_programs(x.device, plan.programs),)](
        x,
        x.stride(0),
        out,
        out.stride(0),
        pool.a,
        pool.b,
        pool.row_scale,
        pool.table,
        pool.row_tiles,
        pool.columns,
        pool.slice_facts,
        routing.order,
        routing.chunks,
        routing.count,
        routing.max_chunks,
        s,
        s.stride(0),
        routing.partials,
        routing.arrivals,
        routing.ready,
        **constants(pool, x.shape[0], plan),
        SHRINK=shrink,
        EXPAND=expand,
        ADD=add,
        BY_BLOCK=by_block,
        PDL=pdl,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **({"launch_pdl": True} if pdl else {}),
    )


def lora_merged(x: torch.Tensor, out: torch.Tensor, pool: LoraPool, routing: DeviceRouting, plan: PairPlan) -> None:
    if plan.one_launch:
        run_pair(x, out, pool, routing, plan, shrink=True, expand=True)
    else:
        run_pair(x, out, pool, routing, plan, shrink=True, expand=False)
        run_pair(x, out, pool, routing, plan, shrink=False, expand=True)


def _aot_cases() -> list[AotCase]:
    i32 = ("table", "row_tiles", "columns", "order", "chunks", "count", "arrivals", "ready")
    pointers = {f"{name}_ptr": "*i32" for name in i32}
    pointers |= {"slice_facts_ptr": "*i64", "row_scale_ptr": "*fp32", "partials_ptr": "*fp32", "max_chunks": "i32"}
    pointers |= {"K": "i32:16", "TABLE": "i32", "COLUMN_TILES": "i32", "RANK_BLOCKS": "i32"}
    pointers |= {"x_stride": "i32:16", "out_stride": "i32:16", "s_stride": "i32:16"}
    cases = []
    for dtype, storage, rows, slices, both in (
        ("bf16", "dense", 16, (4096, 1024, 1024), True),
        ("bf16", "dense", 16, (4096,), True),
        ("bf16", "dense", 64, (4096, 1024, 1024), False),
        ("bf16", "dense", 64, (14336, 14336), False),
        ("fp16", "dense", 16, (14336, 14336), True),
        ("fp32", "dense", 16, (4096, 1024, 1024), True),
        ("bf16", "fp8", 16, (4096, 1024, 1024), True),
        ("bf16", "int4", 16, (4096, 1024, 1024), True),
    ):
        stored = {"dense": dtype, "fp8": "fp8e4nv", "int4": "u8"}[storage]
        signature = pointers | {f"{name}_ptr": f"*{dtype}" for name in ("x", "out", "s")}
        signature |= {"a_ptr": f"*{stored}", "b_ptr": f"*{stored}"}
        plan = pair_plan(rows, 4 if dtype == "fp32" else 2)
        constexprs = {
            "SLICES": len(slices),
            "SPLIT": 512,
            "MAX_SPLIT_TILES": SPLIT_TILES,
            "BR": 16 * triton.next_power_of_2(len(slices)),
            "BT": rows,
            "BK": plan.block_k,
            "EVEN_K": True,
            "BM": min(32, rows),
            "BN": 64 if dtype == "fp32" else 256,
            "STORED_AS": STORED[storage],
            "EVEN_N": True,
            "ADD": True,
            "BY_BLOCK": False,
            "PDL": False,
            "INTERPRETED": False,
        }
        for name, shrink, expand in (
            [("pair", True, True)] if both else [("shrink", True, False), ("expand", False, True)]
        ):
            cases.append(
                AotCase(
                    f"lora_{name}-{dtype}-{storage}-T{rows}-slices{len(slices)}",
                    pair_kernel,
                    signature,
                    constexprs | {"SHRINK": shrink, "EXPAND": expand},
                    plan.num_warps,
                    plan.num_stages,
                    only=90 if storage == "fp8" else None,
                )
            )
    return cases


AOT_CASES = _aot_cases()
