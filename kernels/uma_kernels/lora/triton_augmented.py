"""A site on a GPU as one product over an augmented K: x W^T, then in the same sums the low-rank update of each tile's adapters.

Knows a weight beside a pool and a routing; does not check shapes. A shrink has written s = x A^T before. A tile of the
product goes on from K into the rank blocks of those adapters that have rows in it (`triton_update`). So a row's sum is one chain
over K and then over the blocks of its own adapter, whatever else is in its tile and however tall that is, and a row of the base
has the bits of the plain product. It is rounded once. That needs finite B: 0 * inf is NaN (`pool` sees to it).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted
from uma_kernels.linear.triton_kernel import (
    AMPERE,
    EMULATED,
    FP32,
    NARROW,
    WIDE,
    Tile,
    constants,
    device_limits,
    finished,
    operand_types,
    operands,
    place,
    plan,
    products,
    quantize_rows,
)
from uma_kernels.lora.triton_kernel import STORED
from uma_kernels.lora.triton_update import add_updates, begin_updates, slots_at_once

if TYPE_CHECKING:
    from uma_kernels.linear import PackedLinear
    from uma_kernels.lora.pool import LoraPool
    from uma_kernels.lora.routing import DeviceRouting


@triton.jit(do_not_specialize=["T"])
def augmented_kernel(
    x, w, bias, x_scales, w_scales, out, T, K, stride_x, stride_w, stride_out,
    s_ptr, s_stride, b_ptr, slots_ptr, table_ptr, columns_ptr, slice_facts_ptr, num_slots, TABLE, COLUMN_TILES, RANK_BLOCKS,
    SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    FLUSH: tl.constexpr, TMA_X: tl.constexpr, TMA_W: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    STORED_AS: tl.constexpr, AT_ONCE: tl.constexpr,
    EVEN_N: tl.constexpr, ADD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = (x @ w.T) * x_scales * w_scales + s @ B + bias, with ADD added to what `out` holds. Tiles are taken in the order of
    `matmul_kernel`; one lies in one slice, and `columns` lists them."""
    tiles_m = tl.cdiv(T, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * COLUMN_TILES, tl.num_programs(0)):
        row_tile, column_tile = place(tile, tiles_m, COLUMN_TILES, GROUP)
        first_m = row_tile * BLOCK_M
        which = tl.load(columns_ptr + column_tile)
        n0 = tl.load(columns_ptr + COLUMN_TILES + column_tile)
        width = tl.load(slice_facts_ptr + which * 3).to(tl.int32)
        start = tl.load(slice_facts_ptr + which * 3 + 1).to(tl.int32)
        b_start = tl.load(slice_facts_ptr + which * 3 + 2)
        if EVEN_N:
            n0 = tl.multiple_of(n0, 16)
            width = tl.multiple_of(width, 16)
            start = tl.multiple_of(start, 16)
            b_start = tl.multiple_of(b_start, 16)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < T
        slots = tl.load(slots_ptr + offs_m, in_m, -1)
        of, last, first, end, stored = begin_updates(
            slots, -1, b_ptr, b_start, table_ptr, which, n0, width, num_slots, TABLE, RANK_BLOCKS, SLICES, AT_ONCE, BLOCK_N,
            STORED_AS,
        )  # fmt: skip
        n = n0 + tl.arange(0, BLOCK_N)
        in_n = n < width
        offs_n = start + n
        sums = products(
            x, w, first_m, start + n0, T, start + width, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, FLUSH, TMA_X,
            TMA_W, INTERPRETED,
        )  # fmt: skip
        sums = finished(sums, x_scales, w_scales, bias, offs_m, offs_n, in_m, in_n, SCALED, False)
        sums = add_updates(
            sums, slots, offs_m, of, last, first, end, stored, s_ptr, s_stride, b_ptr, b_start, table_ptr, which, n0, width,
            num_slots, TABLE, RANK_BLOCKS, SLICES, AT_ONCE, BLOCK_N, STORED_AS, out.dtype.element_ty, False, INTERPRETED,
        )  # fmt: skip
        sums = finished(sums, x_scales, w_scales, bias, offs_m, offs_n, in_m, in_n, False, HAS_BIAS)
        to = out + offs_m.to(tl.int64)[:, None] * stride_out + offs_n[None, :]
        inside_out = in_m[:, None] & in_n[None, :]
        if ADD:
            sums += tl.load(to, inside_out, 0.0).to(tl.float32)
        tl.store(to, sums.to(out.dtype.element_ty), inside_out)


def tile_for(tokens: int, x: torch.Tensor, pool: LoraPool, add: bool) -> Tile:
    """That of the plain product. It decides speed, never a bit of the result."""
    sms, capability = device_limits(x.device)
    tile = EMULATED if interpreted() else plan(tokens, pool.out_features, x.dtype, sms, capability)
    return WIDE[1] if add and tile is WIDE[0] else tile  # the largest has no registers left for what it adds to


def augmented(
    x: torch.Tensor,
    weight: PackedLinear,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pool: LoraPool,
    routing: DeviceRouting,
    add: bool = False,
    tile: Tile | None = None,
) -> None:
    """One launch, after a shrink of the same rows into the routing's scratch. `tile` is for benches."""
    tokens, width = x.shape
    data, scales = weight.data, weight.scales
    x_scales = None
    if scales is not None:
        x, x_scales = quantize_rows(x)
    sms, capability = device_limits(x.device)
    tile = tile or tile_for(tokens, x, pool, add)
    depth = max(16, tile.depth // data.element_size())
    a, b, how = operands(x, data, tile, depth)
    columns = pool.column_tiles(tile.columns)
    tiles = -(-tokens // tile.rows) * columns.shape[1]
    persistent = tile.persistent and how["TMA_W"]
    augmented_kernel[(min(tiles, sms) if persistent else tiles,)](
        a, b, bias, x_scales, scales, out, tokens, width, x.stride(0), data.stride(0), out.stride(0),
        routing.shrunk, routing.shrunk.stride(0), pool.b, routing.slots, pool.table, columns, pool.slice_facts,
        pool.num_slots, pool.table.shape[1], columns.shape[1], pool.rank_blocks,
        SLICES=len(pool.slices), GROUP=8, HAS_BIAS=bias is not None, SCALED=scales is not None,
        STORED_AS=STORED[pool.storage], AT_ONCE=slots_at_once(tile.columns, capability),
        EVEN_N=all(n % 32 == 0 for n in pool.slices), ADD=add, **how,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _case(
    name: str, tile: Tile, dtype: str, tma: bool, storage: str = "dense", slices: int = 3, add: bool = False
) -> AotCase:
    scaled = dtype == "fp8e4nv"
    depth = max(16, tile.depth // {"fp32": 4, "fp8e4nv": 1}.get(dtype, 2))
    plain = "bf16" if scaled else dtype
    stored = {"dense": plain, "fp8": "fp8e4nv", "int4": "u8"}[storage]
    signature = operand_types(dtype, tile, depth, tma, tma) | {
        f"{name}_ptr": "*i32" for name in ("slots", "table", "columns")
    }
    signature |= {"bias": f"*{plain}", "out": f"*{plain}", "s_ptr": f"*{plain}", "b_ptr": f"*{stored}"}
    signature |= {"x_scales": "*fp32", "w_scales": "*fp32", "slice_facts_ptr": "*i64", "T": "i32", "K": "i32:16"}
    signature |= dict.fromkeys(("stride_x", "stride_w", "stride_out", "s_stride"), "i32:16")
    signature |= dict.fromkeys(("num_slots", "TABLE", "COLUMN_TILES", "RANK_BLOCKS"), "i32")
    constexprs = constants(tile, depth, dtype == "fp32", tma, tma) | {
        "SLICES": slices, "GROUP": 8, "HAS_BIAS": False, "SCALED": scaled, "STORED_AS": STORED[storage], "EVEN_N": True,
        "AT_ONCE": slots_at_once(tile.columns, 9 if tma else 8),
        "ADD": add, "bias": None,
    }  # fmt: skip
    constexprs |= {} if scaled else {"x_scales": None, "w_scales": None}
    return AotCase(
        f"augmented-{name}-{dtype}-{storage}" + ("-tma" if tma else "") + ("-add" if add else ""),
        augmented_kernel,
        signature,
        constexprs,
        tile.warps,
        tile.stages,
        is_matmul=dtype != "fp32",
        only=90 if tma or storage == "fp8" else None,
    )


AOT_CASES = [
    *(_case(f"{t.rows}x{t.columns}", t, "bf16", True) for t in WIDE),
    *(_case(f"narrow-{t.rows}x{t.columns}", t, "bf16", True) for t in NARROW),
    _case("128x128", WIDE[1], "bf16", True, slices=1, add=True),
    _case("narrow-64x32", NARROW[2], "bf16", True, slices=1, add=True),
    _case("128x256", WIDE[0], "fp16", True, slices=1),
    _case("128x256", WIDE[0], "fp8e4nv", True),
    _case("128x256", WIDE[0], "bf16", True, "fp8"),
    _case("128x256", WIDE[0], "bf16", True, "int4"),
    *(_case(f"{t.rows}x{t.columns}", t, "bf16", False, slices=1, add=True) for t in AMPERE),
    _case("32x128", FP32, "fp32", False),
]
