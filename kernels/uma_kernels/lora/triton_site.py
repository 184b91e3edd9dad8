"""A whole site on a GPU: the product with the base weight and the low-rank update together.

Knows a weight [N, K] beside a pool and a routing; does not check shapes. Two forms:

- `site_decode`: one launch. The first programs shrink; the others each sum a tile of x W^T, and add B s before they round.
  What the shrink costs in time hides behind the weight's bytes. Programs start in the order of their ids, and those that
  wait come after those they wait for.
- `AugmentedWeight`: weight and B side by side in memory, [W | B], and x beside s, [x | s]: one library product gives base and
  update, at the cost of every resident adapter's columns. Benches race it; layers take `triton_augmented`, which multiplies the
  blocks of a tile's own adapters alone.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.linear.triton_kernel import device_limits
from uma_kernels.lora.plans import PairPlan, SitePlan, site_plan
from uma_kernels.lora.pool import RANK_BLOCK, LoraPool
from uma_kernels.lora.triton_kernel import (
    STORED,
    constants,
    leave,
    run_pair,
    shrink_tiles,
    wait_for_shrink,
)
from uma_kernels.lora.triton_update import add_updates, begin_updates, product, slots_at_once

if TYPE_CHECKING:
    from uma_kernels.lora.routing import DeviceRouting


@triton.jit
def site_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    bias_ptr,
    out_ptr,
    out_stride,
    num_tokens,
    a_ptr,
    b_ptr,
    row_scale_ptr,
    table_ptr,
    row_tiles_ptr,
    columns_ptr,
    slice_facts_ptr,
    order_ptr,
    slots_ptr,
    chunks_ptr,
    count_ptr,
    max_chunks,
    s_ptr,
    s_stride,
    partials_ptr,
    arrivals_ptr,
    ready_ptr,
    num_slots,
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
    STORED_AS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHRINKERS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BASE_K: tl.constexpr,
    EVEN_BASE: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[T, N] = x W^T + B s + bias, with ADD plus what it holds, T <= ROWS; a tile of BN columns lies in one slice, and
    `columns` lists them."""
    pid = tl.program_id(0)
    if pid < SHRINKERS:
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
            pid,
            SHRINKERS,
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
            False,
            True,
            INTERPRETED,
        )
    else:
        DTYPE: tl.constexpr = out_ptr.dtype.element_ty
        tile = pid - SHRINKERS
        which = tl.load(columns_ptr + tile)
        n0 = tl.load(columns_ptr + COLUMN_TILES + tile)
        width = tl.load(slice_facts_ptr + which * 3)
        out_column = tl.load(slice_facts_ptr + which * 3 + 1)
        b_start = tl.load(slice_facts_ptr + which * 3 + 2)
        if EVEN_N:
            n0 = tl.multiple_of(n0, 16)
            width = tl.multiple_of(width, 16)
            out_column = tl.multiple_of(out_column, 16)
            b_start = tl.multiple_of(b_start, 16)
        n = n0 + tl.arange(0, BN)
        n_ok = n < width
        t = tl.arange(0, ROWS)
        t_ok = t < num_tokens
        slots = tl.load(slots_ptr + t, mask=t_ok, other=-1)
        of, last, first, end, stored = begin_updates(
            slots,
            -1,
            b_ptr,
            b_start,
            table_ptr,
            which,
            n0,
            width,
            num_slots,
            TABLE,
            RANK_BLOCKS,
            SLICES,
            AT_ONCE,
            BN,
            STORED_AS,
        )
        acc = tl.zeros([BN, ROWS], tl.float32)
        w_rows = (out_column + n).to(tl.int64) * w_stride
        for k in range(0, K, BASE_K):
            columns = k + tl.arange(0, BASE_K)
            if EVEN_BASE:
                w_mask = n_ok[:, None]
                x_mask = t_ok[:, None]
            else:
                w_mask = n_ok[:, None] & (columns < K)[None, :]
                x_mask = t_ok[:, None] & (columns < K)[None, :]
            w = tl.load(w_ptr + w_rows[:, None] + columns[None, :], mask=w_mask, other=0.0)
            x = tl.load(x_ptr + t[:, None] * x_stride + columns[None, :], mask=x_mask, other=0.0)
            acc = product(w, tl.trans(x), acc, INTERPRETED)

        wait_for_shrink(ready_ptr, tl.load(count_ptr) * tl.load(row_tiles_ptr))
        acc = add_updates(
            acc, slots, t, of, last, first, end, stored, s_ptr, s_stride, b_ptr, b_start, table_ptr, which, n0, width, num_slots,
            TABLE, RANK_BLOCKS, SLICES, AT_ONCE, BN, STORED_AS, DTYPE, True, INTERPRETED,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + out_column + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        to = out_ptr + t[None, :].to(tl.int64) * out_stride + (out_column + n)[:, None]
        inside = n_ok[:, None] & t_ok[None, :]
        if ADD:
            acc += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, acc.to(DTYPE), mask=inside)
        leave(ready_ptr, COLUMN_TILES)


def site_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pool: LoraPool,
    routing: DeviceRouting,
    plan: SitePlan,
    add: bool = False,
) -> None:
    """One launch."""
    columns = pool.column_tiles(plan.block_n)
    shared = constants(pool, x.shape[0], PairPlan(True, block_k=plan.block_k))
    del shared["BM"]
    tiles = columns.shape[1]
    site_kernel[(plan.shrinkers + tiles,)](
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        bias,
        out,
        out.stride(0),
        x.shape[0],
        pool.a,
        pool.b,
        pool.row_scale,
        pool.table,
        pool.row_tiles,
        columns,
        pool.slice_facts,
        routing.order,
        routing.slots,
        routing.chunks,
        routing.count,
        routing.max_chunks,
        routing.shrunk,
        routing.shrunk.stride(0),
        routing.partials,
        routing.arrivals,
        routing.ready,
        routing.num_slots,
        **shared
        | {
            "COLUMN_TILES": tiles,
            "SHRINKERS": plan.shrinkers,
            "AT_ONCE": slots_at_once(plan.block_n, device_limits(x.device)[1]),
            "ROWS": max(16, triton.next_power_of_2(x.shape[0])),
            "BN": plan.block_n,
            "BASE_K": plan.base_k,
            "EVEN_BASE": pool.in_features % plan.base_k == 0,
            "HAS_BIAS": bias is not None,
            "ADD": add,
        },
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


class AugmentedWeight:
    """A base weight and room beside it for the B of every block of a pool: [N, K + 16 * blocks].

    `load` after the pool's own `load` of the slot. A row of `x_aug` is [x | s], s in the columns of its slot's blocks and 0
    elsewhere, so that the other adapters add exactly nothing.
    """

    def __init__(self, weight: torch.Tensor, pool: LoraPool) -> None:
        if pool.storage != "dense":
            raise ValueError(f"an augmented weight needs dense factors, not {pool.storage}")
        self.pool = pool
        self.spare = RANK_BLOCK * pool.a.shape[0]
        self.data = torch.zeros(weight.shape[0], weight.shape[1] + self.spare, dtype=weight.dtype, device=weight.device)
        self.data[:, : weight.shape[1]] = weight

    def load(self) -> None:
        """Copy the B of every resident block beside the weight."""
        k, first = self.pool.in_features, 0
        for index, columns in enumerate(self.pool.slices):
            b = self.pool.b_of(index)
            for slot in self.pool.resident:
                for block in self.pool.blocks_of(slot)[index]:
                    target = self.data[first : first + columns, k + RANK_BLOCK * block : k + RANK_BLOCK * (block + 1)]
                    target.copy_(b[block - index * self.pool.rank_blocks].T)
            first += columns

    def run(self, x_aug: torch.Tensor, out: torch.Tensor, routing: DeviceRouting, plan: PairPlan) -> None:
        """x_aug [T, K + spare], x in its first K columns; out [T, N] is written. A clear, a shrink and a product."""
        k = self.pool.in_features
        spare = x_aug[:, k:]
        spare.zero_()
        run_pair(x_aug[:, :k], out, self.pool, routing, plan, shrink=True, expand=False, shrunk=spare, by_block=True)
        torch.mm(x_aug, self.data.T, out=out)


def _aot_cases() -> list[AotCase]:
    i32 = ["table", "row_tiles", "columns", "order", "slots", "chunks", "count", "arrivals", "ready"]
    signature = {f"{name}_ptr": "*i32" for name in i32}
    signature |= {f"{name}_ptr": "*bf16" for name in ("x", "w", "out", "a", "b", "s")}
    signature |= {"slice_facts_ptr": "*i64", "row_scale_ptr": "*fp32", "partials_ptr": "*fp32"}
    signature |= {f"{name}_stride": "i32:16" for name in ("x", "w", "out", "s")}
    signature |= {
        "K": "i32:16",
        "TABLE": "i32",
        "COLUMN_TILES": "i32",
        "RANK_BLOCKS": "i32",
        "max_chunks": "i32",
        "num_tokens": "i32",
        "num_slots": "i32",
    }
    cases = []
    for rows, slices, width in ((16, 3, 6144), (16, 2, 28672), (16, 1, 4096), (64, 3, 6144), (64, 2, 28672)):
        plan = site_plan(rows, 4096, width)
        assert plan is not None
        constexprs = {
            "SLICES": slices,
            "SPLIT": 512,
            "MAX_SPLIT_TILES": 96,
            "BR": 16 * triton.next_power_of_2(slices),
            "BT": 16,
            "BK": plan.block_k,
            "STORED_AS": STORED["dense"],
            "SHRINKERS": plan.shrinkers,
            "ROWS": rows,
            "BN": plan.block_n,
            "BASE_K": plan.base_k,
            "EVEN_K": True,
            "EVEN_BASE": True,
            "EVEN_N": True,
            "HAS_BIAS": False,
            "ADD": slices == 1,  # as the projections that end at the residual
            "bias_ptr": None,
            "INTERPRETED": False,
        }
        for arch in (80, 90):
            name = f"lora_site-bf16-T{rows}-slices{slices}-sm{arch}"
            at_once = {"AT_ONCE": slots_at_once(plan.block_n, arch // 10)}
            cases.append(
                AotCase(name, site_kernel, signature, constexprs | at_once, plan.num_warps, plan.num_stages, only=arch)
            )
    return cases


AOT_CASES = _aot_cases()
