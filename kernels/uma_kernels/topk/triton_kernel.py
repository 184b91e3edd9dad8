"""The k best rows on a GPU: scores never lie in memory, only the largest of every 16 rows does.

Knows tiles, formats and maxima; does not know what a row stands for.

Pass 1 streams the corpus and keeps maxima of groups of 16 rows, of 8 groups, and so on. The k best rows lie in the k groups
that come first by (maximum down, group up): each of these has a row that is as good and comes no later. So pass 2 walks down
from the few topmost maxima, k at each level, pass 3 scores the rows of k groups again, and pass 4 takes the k best of those.
Every step follows the same total order, so equal scores come by index whatever the machine does first. A score is one chain
of tensor-core instructions along the row in ascending order: its bits do not depend on how many queries there are.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.check import ShapeError
from uma_kernels.dispatch import interpreted
from uma_kernels.topk.corpus import Corpus

GROUP = 16  # rows
FAN = 8  # entries of a level under one of the next
TOP = 8192  # entries of the topmost level, at most
CHUNK = 8192  # entries that a program holds in registers
SCAN = 4096  # entries that it numbers at once
ORDERED = 128  # entries that a program puts in their places
SINGLE = 16  # columns of a tile that serves one query: the narrowest product there is


@dataclass(frozen=True)
class Tile:
    rows: int  # BLOCK_N, GROUP * FAN or more
    queries: int  # BLOCK_Q
    depth: int  # BLOCK_K, in elements
    warps: int
    stages: int


# By bytes of an element; few queries: the corpus must come as fast as memory gives it. All tiles of fp32 have one depth: three
# TF32 products are three chains for each step of it.
FEW = {4: Tile(128, 16, 32, 4, 4), 2: Tile(128, 16, 128, 4, 3), 1: Tile(128, 16, 128, 4, 3)}
SOME = {4: Tile(128, 64, 32, 8, 3), 2: Tile(128, 64, 64, 4, 4), 1: Tile(128, 64, 64, 4, 4)}
MANY = {4: Tile(128, 64, 32, 8, 3), 2: Tile(128, 128, 64, 8, 3), 1: Tile(128, 128, 64, 8, 4)}
EMULATED = Tile(128, 16, 64, 4, 2)


def plan(num_queries: int, itemsize: int) -> Tile:
    """The tile for a number of queries. It decides speed, never a bit of the result."""
    if interpreted():
        return EMULATED
    return (FEW if num_queries <= 16 else SOME if num_queries <= 64 else MANY)[itemsize]


@triton.jit
def _sum_products(
    data, queries, row, column, valid_columns, stride, query_stride, scores,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scores[n, q] + data[row[n]] . queries[column[q]]; columns that are not valid are zero."""
    for first in range(0, stride, BLOCK_K):
        offs = first + tl.arange(0, BLOCK_K)
        at = data + row[:, None] * stride + offs[None, :]
        from_queries = queries + column[None, :] * query_stride + offs[:, None]
        if EVEN:
            a = tl.load(at)
            b = tl.load(from_queries, valid_columns[None, :], 0.0)
        else:
            a = tl.load(at, (offs < stride)[None, :], 0.0)
            b = tl.load(from_queries, valid_columns[None, :] & (offs < stride)[:, None], 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        scores = tl.dot(a.to(b.dtype), b, scores, input_precision=PRECISION)
    return scores


@triton.jit
def _finish(scores, data_scales, filter, row, exists, SCALED: tl.constexpr, FILTERED: tl.constexpr):
    """Scores with their rows' scales; -inf where a row does not exist, is filtered out, or has no number for a score."""
    if SCALED:
        scores *= tl.load(data_scales + row, exists, 0.0)[:, None]
    if FILTERED:
        exists &= ((tl.load(filter + row // 32, exists, 0) >> (row % 32).to(tl.int32)) & 1) != 0
    return tl.where(exists[:, None] & (scores == scores), scores, float("-inf"))


@triton.jit
def maxima_kernel(
    data, data_scales, filter, queries, groups, tiles, N, Q, stride, query_stride, num_groups, num_tiles,
    GROUP: tl.constexpr, FAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, FILTERED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """groups [Q, num_groups]: the largest score of every GROUP rows; tiles [Q, num_tiles]: of every GROUP * FAN rows."""
    query_tiles = tl.cdiv(Q, BLOCK_Q)
    block = tl.program_id(0) // query_tiles
    column = (tl.program_id(0) % query_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    index = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(index, N - 1)
    scores = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    scores = _sum_products(
        data, queries, row, column, column < Q, stride, query_stride, scores, BLOCK_K, EVEN, PRECISION, UPCAST
    )
    scores = _finish(scores, data_scales, filter, row, index < N, SCALED, FILTERED)
    of_groups = tl.max(tl.reshape(scores, (BLOCK_N // GROUP, GROUP, BLOCK_Q)), 1)
    group = block * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    to = groups + column.to(tl.int64)[None, :] * num_groups + group[:, None]
    tl.store(to, of_groups, (group < num_groups)[:, None] & (column < Q)[None, :])
    of_tiles = tl.max(tl.reshape(of_groups, (BLOCK_N // GROUP // FAN, FAN, BLOCK_Q)), 1)
    tile = block * (BLOCK_N // GROUP // FAN) + tl.arange(0, BLOCK_N // GROUP // FAN)
    to = tiles + column.to(tl.int64)[None, :] * num_tiles + tile[:, None]
    tl.store(to, of_tiles, (tile < num_tiles)[:, None] & (column < Q)[None, :])


@triton.jit
def fold_kernel(level, above, count, above_count, FAN: tl.constexpr, BLOCK: tl.constexpr):
    """above[q, i]: the largest of the FAN entries of level [Q, count] that lie under it."""
    q = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    child = i[:, None] * FAN + tl.arange(0, FAN)[None, :]
    values = tl.load(level + q * count + child, child < count, float("-inf"))
    tl.store(above + q * above_count + i, tl.max(values, 1), i < above_count)


@triton.jit
def _key(value):
    """An integer in the order of floats, 0 and -0 alike; the least one for -inf: an entry that does not exist."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == float("-inf"), -(2**31), key)


@triton.jit
def _load_keys(values, parents, start, count, size, FAN: tl.constexpr, CHUNK: tl.constexpr):
    """Keys of the entries start .. start + CHUNK - 1 and their places in `values` [size]; under `parents` where there are any."""
    i = start + tl.arange(0, CHUNK)
    if parents is None:
        place = i
        exists = i < count
    else:
        parent = tl.load(parents + i // FAN, i < count, -1)
        place = parent * FAN + i % FAN
        exists = (parent >= 0) & (place < size)
    return _key(tl.load(values + place, exists, float("-inf"))), place


@triton.jit
def _threshold(values, parents, count, size, k, FAN: tl.constexpr, CHUNK: tl.constexpr, ONE: tl.constexpr):
    """The k-th largest key (the least one where there are fewer), and how many are larger. Two bits at a step: how many keys
    reach each of the three thresholds is one sum, of 21 bits for each."""
    threshold = tl.full((), 0, tl.uint32)  # in the order of unsigned numbers
    held = _unsigned(_load_keys(values, parents, 0, count, size, FAN, CHUNK)[0])
    for step in range(16):
        shift = 30 - 2 * step
        reached = _reached(held, threshold, shift)
        if not ONE:
            for start in range(CHUNK, count, CHUNK):
                keys = _unsigned(_load_keys(values, parents, start, count, size, FAN, CHUNK)[0])
                reached += _reached(keys, threshold, shift)
        counts = tl.sum(reached, 0)
        more = ((counts & 0x1FFFFF) >= k).to(tl.uint32) + (((counts >> 21) & 0x1FFFFF) >= k).to(tl.uint32)
        threshold += (more + ((counts >> 42) >= k).to(tl.uint32)) << shift
    larger = (held > threshold).to(tl.int32)
    if not ONE:
        for start in range(CHUNK, count, CHUNK):
            keys = _unsigned(_load_keys(values, parents, start, count, size, FAN, CHUNK)[0])
            larger += (keys > threshold).to(tl.int32)
    return (threshold ^ 0x80000000).to(tl.int32, bitcast=True), tl.sum(larger, 0)


@triton.jit
def _unsigned(keys):
    return keys.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _reached(keys, threshold, shift):
    """Which of threshold + 1, 2, 3 << shift each key reaches, as one number whose parts can be added up."""
    one = tl.full((), 1, tl.uint32) << shift
    first = (keys >= threshold + one).to(tl.int64)
    second = (keys >= threshold + 2 * one).to(tl.int64)
    third = (keys >= threshold + 3 * one).to(tl.int64)
    return first + (second << 21) + (third << 42)


@triton.jit
def _select(
    values,
    parents,
    chosen,
    count,
    size,
    k,
    FAN: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE: tl.constexpr,
    PART: tl.constexpr,
):
    """chosen [k]: places of the k largest entries, in ascending order, then -1; of equal ones the first."""
    threshold, larger = _threshold(values, parents, count, size, k, FAN, CHUNK, ONE)
    equal_before, before = 0, 0
    for start in range(0, count, PART):
        keys, place = _load_keys(values, parents, start, count, size, FAN, PART)
        equal = (keys == threshold) & (keys != -(2**31))
        rank = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        take = (keys > threshold) | (equal & (rank <= k - larger))
        tl.store(chosen + before + tl.cumsum(take.to(tl.int32), 0) - 1, place, take)
        equal_before += tl.sum(equal.to(tl.int32), 0)
        before += tl.sum(take.to(tl.int32), 0)
    for start in range(0, k, PART):
        i = start + tl.arange(0, PART)
        tl.store(chosen + i, tl.full((PART,), -1, tl.int32), (i >= before) & (i < k))


@triton.jit
def descend_kernel(
    values, parents, chosen, count, size, k, HAS_PARENTS: tl.constexpr, FAN: tl.constexpr, CHUNK: tl.constexpr,
    ONE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`_select` for each query: of the `count` = `size` entries of its level, or of those under parents [Q, k] (k * FAN)."""
    q = tl.program_id(0).to(tl.int64)
    if HAS_PARENTS:
        parents += q * k
    _select(values + q * size, parents, chosen + q * k, count, size, k, FAN, CHUNK, ONE, PART)


@triton.jit
def rescan_kernel(
    data, data_scales, filter, queries, chosen, out, N, k, stride, query_stride,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    SCALED: tl.constexpr, FILTERED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [Q, k * GROUP]: scores of the rows of the chosen groups, -inf for a row that does not count."""
    q = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.load(chosen + q * k + i // GROUP, i < k * GROUP, -1).to(tl.int64)
    index = group * GROUP + i % GROUP
    exists = (group >= 0) & (index < N)
    row = tl.where(exists, index, 0)
    column = tl.arange(0, BLOCK_Q)
    scores = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    scores = _sum_products(
        data, queries + q * query_stride, row, column, column < 1, stride, query_stride, scores, BLOCK_K, EVEN,
        PRECISION, UPCAST,
    )  # fmt: skip
    scores = _finish(scores, data_scales, filter, row, exists, SCALED, FILTERED)
    own = tl.max(tl.where((column == 0)[None, :], scores, float("-inf")), 1)
    tl.store(out + q * k * GROUP + i, own, i < k * GROUP)


@triton.jit
def _packed(values, parents, chosen, slot, k, GROUP: tl.constexpr):
    """Score and row of the candidates in some slots of `chosen` as one number in the order (score down, index up)."""
    candidate = tl.load(chosen + slot, slot < k, -1)
    keys = _key(tl.load(values + candidate, candidate >= 0, float("-inf")))
    parent = tl.load(parents + candidate // GROUP, candidate >= 0, 0).to(tl.int64)
    index = parent * GROUP + candidate % GROUP
    return tl.where(candidate >= 0, (keys.to(tl.int64) << 32) | (0xFFFFFFFF - index), -(2**63))


@triton.jit
def order_kernel(
    values,
    parents,
    chosen,
    scores,
    indices,
    count,
    parents_row,
    k,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Puts the candidates chosen [Q, k] of values [Q, count] in order: each counts those before it. All are different.

    Candidate i is row parents[i // GROUP] * GROUP + i % GROUP.
    """
    q = tl.program_id(1).to(tl.int64)
    values += q * count
    parents += q * parents_row
    chosen += q * k
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = _packed(values, parents, chosen, slot, k, GROUP)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, OTHERS):
        other = _packed(values, parents, chosen, start + tl.arange(0, OTHERS), k, GROUP)
        place += tl.sum((other[None, :] > own[:, None]).to(tl.int32), 1)
    found = own != -(2**63)
    place = tl.where(found, place, slot)  # what is missing lies at the end already
    key = (own >> 32).to(tl.int32)
    score = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    tl.store(scores + q * k + place, tl.where(found, score, float("-inf")), slot < k)
    tl.store(indices + q * k + place, tl.where(found, 0xFFFFFFFF - (own & 0xFFFFFFFF), -1), slot < k)


def _operand(queries: torch.Tensor, corpus: Corpus) -> torch.Tensor:
    """Queries in the type that is multiplied, padded as the rows are."""
    dtype = corpus.data.dtype if corpus.format in ("fp32", "fp16") else torch.bfloat16
    if corpus.data.shape[1] != corpus.width:
        queries = torch.nn.functional.pad(queries, (0, corpus.data.shape[1] - corpus.width))
    return queries.to(dtype)


def _check_device(corpus: Corpus) -> None:
    if corpus.format == "fp8" and not interpreted() and torch.cuda.get_device_capability(corpus.device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(corpus.device)))
        raise ShapeError(f"`corpus` is fp8, which needs a GPU of compute capability 8.9, but this one has {capability}")


def _constants(corpus: Corpus, filter: torch.Tensor | None, tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_N": tile.rows, "BLOCK_K": tile.depth, "EVEN": corpus.data.shape[1] % tile.depth == 0,
        "SCALED": corpus.scales is not None, "FILTERED": filter is not None,
        "PRECISION": "tf32x3" if corpus.format == "fp32" and not interpreted() else "ieee", "UPCAST": interpreted(),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _registers(count: int) -> dict[str, Any]:
    """How a program that selects from `count` entries holds them: at once where they fit."""
    chunk = min(CHUNK, max(64, triton.next_power_of_2(count)))
    warps = 1 if chunk <= 1024 else min(16, chunk // 512)  # warps that share a sum wait for each other
    return {"CHUNK": chunk, "ONE": count <= chunk, "PART": min(chunk, SCAN), "num_warps": warps}


def topk(
    queries: torch.Tensor, corpus: Corpus, k: int, filter: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_device(corpus)
    num_queries, count, device = queries.shape[0], corpus.count, queries.device
    scores = torch.empty(num_queries, k, dtype=torch.float32, device=device)
    indices = torch.empty(num_queries, k, dtype=torch.int64, device=device)
    if num_queries == 0:
        return scores, indices
    if count == 0:
        return scores.fill_(float("-inf")), indices.fill_(-1)
    operand = _operand(queries, corpus)
    tile = plan(num_queries, corpus.data.element_size())
    stride = corpus.data.shape[1]
    sizes = [triton.cdiv(count, GROUP)]
    sizes.append(triton.cdiv(sizes[0], FAN))
    while sizes[-1] > TOP:
        sizes.append(triton.cdiv(sizes[-1], FAN))
    levels = [torch.empty(num_queries, size, dtype=torch.float32, device=device) for size in sizes]
    maxima_kernel[(triton.cdiv(count, tile.rows) * triton.cdiv(num_queries, tile.queries),)](
        corpus.data, corpus.scales, filter, operand, levels[0], levels[1], count, num_queries, stride, stride, sizes[0], sizes[1],
        GROUP=GROUP, FAN=FAN, BLOCK_Q=tile.queries, **_constants(corpus, filter, tile),
    )  # fmt: skip
    for below in range(1, len(sizes) - 1):
        fold_kernel[(triton.cdiv(sizes[below + 1], 256), num_queries)](
            levels[below], levels[below + 1], sizes[below], sizes[below + 1], FAN=FAN, BLOCK=256
        )
    groups = None
    for level in range(len(sizes) - 1, -1, -1):
        chosen = torch.empty(num_queries, k, dtype=torch.int32, device=device)
        entries = sizes[level] if groups is None else k * FAN
        descend_kernel[(num_queries,)](
            levels[level], groups, chosen, entries, sizes[level], k,
            HAS_PARENTS=groups is not None, FAN=FAN, **_registers(entries),
        )  # fmt: skip
        groups = chosen
    assert groups is not None
    candidates = torch.empty(num_queries, k * GROUP, dtype=torch.float32, device=device)
    _rescan(corpus, filter, operand, groups, GROUP, candidates)
    _best(candidates, groups, GROUP, scores, indices)
    return scores, indices


def rescore(
    queries: torch.Tensor, originals: Corpus, k: int, survivors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, count = survivors.shape
    scores = torch.empty(num_queries, k, dtype=torch.float32, device=queries.device)
    indices = torch.empty(num_queries, k, dtype=torch.int64, device=queries.device)
    if num_queries == 0:
        return scores, indices
    ordered = survivors.sort(dim=1).values  # equal scores are taken in this order
    candidates = torch.empty(num_queries, count, dtype=torch.float32, device=queries.device)
    _rescan(originals, None, _operand(queries, originals), ordered, 1, candidates)
    _best(candidates, ordered, 1, scores, indices)
    return scores, indices


def _rescan(
    corpus: Corpus,
    filter: torch.Tensor | None,
    operand: torch.Tensor,
    chosen: torch.Tensor,
    group: int,
    out: torch.Tensor,
) -> None:
    if corpus.count == 0:
        out.fill_(float("-inf"))
        return
    tile = plan(1, corpus.data.element_size())
    stride = corpus.data.shape[1]
    rescan_kernel[(triton.cdiv(out.shape[1], tile.rows), out.shape[0])](
        corpus.data, corpus.scales, filter, operand, chosen, out, corpus.count, chosen.shape[1], stride, stride,
        GROUP=group, BLOCK_Q=SINGLE, **_constants(corpus, filter, tile),
    )  # fmt: skip


def _best(
    candidates: torch.Tensor, parents: torch.Tensor, group: int, scores: torch.Tensor, indices: torch.Tensor
) -> None:
    num_queries, k = scores.shape
    count = candidates.shape[1]
    chosen = torch.empty(num_queries, k, dtype=torch.int32, device=scores.device)
    descend_kernel[(num_queries,)](
        candidates, None, chosen, count, count, k, HAS_PARENTS=False, FAN=FAN, **_registers(count)
    )
    order_kernel[(triton.cdiv(k, ORDERED), num_queries)](
        candidates,
        parents,
        chosen,
        scores,
        indices,
        count,
        parents.shape[1],
        k,
        GROUP=group,
        BLOCK=ORDERED,
        OTHERS=ORDERED // 8,
    )


def _scan_cases() -> list[AotCase]:
    cases = []
    kinds = {"fp32": ("*fp32", "*fp32", 4), "bf16": ("*bf16", "*bf16", 2), "fp16": ("*fp16", "*fp16", 2),
             "int8": ("*i8", "*bf16", 1), "fp8": ("*fp8e4nv", "*bf16", 1)}  # fmt: skip
    for format, (data, queries, itemsize) in kinds.items():
        scaled = format in ("int8", "fp8")
        constants = {
            "GROUP": GROUP, "EVEN": True, "SCALED": scaled, "FILTERED": True, "UPCAST": False,
            "PRECISION": "tf32x3" if format == "fp32" else "ieee",
        } | ({} if scaled else {"data_scales": None})  # fmt: skip
        common = {
            "data": data, "data_scales": "*fp32", "filter": "*i32", "queries": queries, "N": "i32", "Q": "i32", "k": "i32",
            "stride": "i32:16", "query_stride": "i32:16",
        }  # fmt: skip
        only = 90 if format == "fp8" else None  # sm_80 has no such type
        for name, tile in (("few", FEW[itemsize]), ("some", SOME[itemsize]), ("many", MANY[itemsize])):
            blocks = {"BLOCK_N": tile.rows, "BLOCK_Q": tile.queries, "BLOCK_K": tile.depth}
            cases.append(AotCase(
                f"maxima-{format}-{name}", maxima_kernel,
                common | {"groups": "*fp32", "tiles": "*fp32", "num_groups": "i32", "num_tiles": "i32"},
                constants | blocks | {"FAN": FAN}, tile.warps, tile.stages, is_matmul=format != "fp32", only=only,
            ))  # fmt: skip
        tile = FEW[itemsize]
        blocks = {"BLOCK_N": tile.rows, "BLOCK_Q": SINGLE, "BLOCK_K": tile.depth}
        cases.append(AotCase(
            f"rescan-{format}", rescan_kernel, common | {"chosen": "*i32", "out": "*fp32"}, constants | blocks,
            tile.warps, tile.stages, is_matmul=format != "fp32", only=only,
        ))  # fmt: skip
    return cases


def _select_cases() -> list[AotCase]:
    cases = [
        AotCase(
            "fold", fold_kernel, {"level": "*fp32", "above": "*fp32", "count": "i32", "above_count": "i32"},
            {"FAN": FAN, "BLOCK": 256},
        )
    ]  # fmt: skip
    for parents, entries in ((False, TOP), (False, 4096 * GROUP), (True, 100 * FAN), (True, 4096 * FAN)):
        held = _registers(entries)
        warps = held.pop("num_warps")
        cases.append(AotCase(
            f"descend-{entries}", descend_kernel,
            {"values": "*fp32", "parents": "*i32", "chosen": "*i32", "count": "i32", "size": "i32", "k": "i32"},
            held | {"HAS_PARENTS": parents, "FAN": FAN} | ({} if parents else {"parents": None}), warps,
        ))  # fmt: skip
    cases.append(AotCase(
        "order", order_kernel,
        {"values": "*fp32", "parents": "*i32", "chosen": "*i32", "scores": "*fp32", "indices": "*i64", "count": "i32",
         "parents_row": "i32", "k": "i32"},
        {"GROUP": GROUP, "BLOCK": ORDERED, "OTHERS": ORDERED // 8},
    ))  # fmt: skip
    return cases


AOT_CASES = [*_scan_cases(), *_select_cases()]
