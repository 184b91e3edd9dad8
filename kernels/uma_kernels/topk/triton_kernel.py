"""The k best rows on a GPU: scores never lie in memory, only the largest of every 16 rows does.

Knows tiles, formats and maxima; does not know what a row stands for.

Pass 1 streams the corpus and keeps maxima of groups of 16 rows, of 8 groups, and so on. The k best rows lie in the k groups
that come first by (maximum down, group up): each of these has a row that is as good and comes no later. So pass 2 walks down
from the few topmost maxima, k at each level, pass 3 scores the rows of k groups again, and pass 4 takes the k best of those.
Every step follows the same total order, so equal scores come by index whatever the machine does first. A score is one chain
of tensor-core instructions along the row, in an order that only the format decides, or an exact sum: its bits do not depend on
how many queries there are.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.check import ShapeError
from uma_kernels.dispatch import interpreted
from uma_kernels.topk.corpus import SCALED, Corpus
from uma_kernels.topk.triton_bytes import fp8_products, int8_products, prepare
from uma_kernels.topk.triton_select import FAN, TOP_COUNTED, best_candidates, best_groups, counted

GROUP = 16  # rows
SINGLE = 16  # columns of a tile that serves one query: the narrowest product there is
RESCANNED = 64  # rows of a tile that scores chosen rows again: many programs, which only wait for memory


@dataclass(frozen=True)
class Tile:
    rows: int  # BLOCK_N, GROUP * FAN or more
    queries: int  # BLOCK_Q
    depth: int  # BLOCK_K, in elements; fp8: in words
    warps: int
    stages: int


# Few queries: the corpus must come as fast as memory gives it. Where products are chains whose order the depth decides, all
# tiles have one depth: fp32 (three TF32 products are three chains for each step of it) and fp8 (the bytes of its words).
FEW = {
    "fp32": Tile(128, 16, 32, 4, 4),
    "bf16": Tile(128, 16, 128, 4, 3),
    "fp16": Tile(128, 16, 128, 4, 3),
    "int8": Tile(256, 16, 128, 8, 3),
    "fp8": Tile(128, 16, 32, 4, 4),
}
SOME = {
    "fp32": Tile(128, 64, 32, 8, 3),
    "bf16": Tile(128, 64, 64, 4, 4),
    "fp16": Tile(128, 64, 64, 4, 4),
    "int8": Tile(128, 64, 128, 8, 3),
    "fp8": Tile(128, 64, 32, 8, 3),
}
MANY = SOME | {"bf16": Tile(128, 128, 64, 8, 3), "fp16": Tile(128, 128, 64, 8, 3)}


def plan(num_queries: int, format: str) -> Tile:
    """The tile for a number of queries. It decides speed, never a bit of the result."""
    if interpreted():
        return replace(FEW[format], rows=GROUP * FAN)
    return (FEW if num_queries <= 16 else SOME if num_queries <= 64 else MANY)[format]


@triton.jit
def _products(
    data, queries, row, first_query, num_queries, stride, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[n, q]: data[row[n]] . queries[first_query + q], 0 from num_queries on."""
    queries += first_query * stride
    column = tl.arange(0, BLOCK_Q)
    valid = column < num_queries
    scores = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    for first in range(0, stride, BLOCK_K):
        offs = first + tl.arange(0, BLOCK_K)
        at = data + row[:, None] * stride + offs[None, :]
        from_queries = queries + column[None, :] * stride + offs[:, None]
        if EVEN:
            a = tl.load(at)
            b = tl.load(from_queries, valid[None, :], 0.0)
        else:
            a = tl.load(at, (offs < stride)[None, :], 0.0)
            b = tl.load(from_queries, valid[None, :] & (offs < stride)[:, None], 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        scores = tl.dot(a, b, scores, input_precision=PRECISION)
    return scores


@triton.jit
def _scores(
    data, data_scales, filter, queries, query_scales, row, exists, first_query, num_queries, stride, BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of rows for queries from first_query on; -inf where a row does not exist, is filtered out, or has no number for a
    score."""
    if data_scales is not None:  # here: nothing waits for them after the products
        scales = tl.load(data_scales + row, exists, 0.0)
    if filter is not None:
        exists &= ((tl.load(filter + row // 32, exists, 0) >> (row % 32).to(tl.int32)) & 1) != 0
    if FORMAT == "int8":
        scores = int8_products(
            data, queries, query_scales, row, first_query, num_queries, stride, BLOCK_N, BLOCK_Q, BLOCK_K, EVEN
        )
    elif FORMAT == "fp8":
        scores = fp8_products(
            data, queries, query_scales, row, first_query, num_queries, stride, BLOCK_N, BLOCK_Q, BLOCK_K, EVEN, UPCAST
        )
    else:
        scores = _products(
            data, queries, row, first_query, num_queries, stride, BLOCK_N, BLOCK_Q, BLOCK_K, EVEN, PRECISION, UPCAST
        )
    if data_scales is not None:
        scores *= scales[:, None]
    return tl.where(exists[:, None] & (scores == scores), scores, float("-inf"))


@triton.jit
def maxima_kernel(
    data, data_scales, filter, queries, query_scales, groups, tiles, N, Q, stride, num_groups, num_tiles,
    GROUP: tl.constexpr, FAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """groups [Q, num_groups]: the largest score of every GROUP rows; tiles [Q, num_tiles]: of every GROUP * FAN rows."""
    query_tiles = tl.cdiv(Q, BLOCK_Q)
    block = tl.program_id(0) // query_tiles
    first_query = (tl.program_id(0) % query_tiles).to(tl.int64) * BLOCK_Q
    index = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _scores(
        data, data_scales, filter, queries, query_scales, tl.minimum(index, N - 1), index < N, first_query, Q - first_query,
        stride, BLOCK_N, BLOCK_Q, BLOCK_K, EVEN, FORMAT, PRECISION, UPCAST,
    )  # fmt: skip
    query = first_query + tl.arange(0, BLOCK_Q)
    of_groups = tl.max(tl.reshape(scores, (BLOCK_N // GROUP, GROUP, BLOCK_Q)), 1)
    group = block * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    to = groups + query[None, :] * num_groups + group[:, None]
    tl.store(to, of_groups, (group < num_groups)[:, None] & (query < Q)[None, :])
    of_tiles = tl.max(tl.reshape(of_groups, (BLOCK_N // GROUP // FAN, FAN, BLOCK_Q)), 1)
    tile = block * (BLOCK_N // GROUP // FAN) + tl.arange(0, BLOCK_N // GROUP // FAN)
    to = tiles + query[None, :] * num_tiles + tile[:, None]
    tl.store(to, of_tiles, (tile < num_tiles)[:, None] & (query < Q)[None, :])


@triton.jit
def rescan_kernel(
    data, data_scales, filter, queries, query_scales, chosen, out, N, k, stride,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    FORMAT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [Q, k * GROUP]: scores of the rows of the chosen groups, -inf for a row that does not count."""
    q = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.load(chosen + q * k + i // GROUP, i < k * GROUP, -1).to(tl.int64)
    index = group * GROUP + i % GROUP
    exists = (group >= 0) & (index < N)
    scores = _scores(
        data, data_scales, filter, queries, query_scales, tl.where(exists, index, 0), exists, q, 1, stride, BLOCK_N, BLOCK_Q,
        BLOCK_K, EVEN, FORMAT, PRECISION, UPCAST,
    )  # fmt: skip
    own = tl.max(tl.where((tl.arange(0, BLOCK_Q) == 0)[None, :], scores, float("-inf")), 1)
    tl.store(out + q * k * GROUP + i, own, i < k * GROUP)


@dataclass(frozen=True)
class _Scan:
    """A corpus and queries as kernels read them."""

    corpus: Corpus
    data: torch.Tensor
    queries: torch.Tensor
    query_scales: torch.Tensor | None

    @property
    def stride(self) -> int:
        return self.data.shape[1]

    def constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "BLOCK_N": tile.rows, "BLOCK_K": tile.depth, "EVEN": self.stride % tile.depth == 0, "FORMAT": self.corpus.format,
            "PRECISION": "tf32x3" if self.corpus.format == "fp32" and not interpreted() else "ieee", "UPCAST": interpreted(),
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


def _scan(queries: torch.Tensor, corpus: Corpus) -> _Scan:
    data = corpus.data
    if corpus.format in SCALED:
        parts, scales = prepare(queries, data.shape[1], corpus.format == "int8")
        return _Scan(corpus, data if corpus.format == "int8" else data.view(torch.int32), parts, scales)
    if data.shape[1] != corpus.width:
        queries = torch.nn.functional.pad(queries, (0, data.shape[1] - corpus.width))
    return _Scan(corpus, data, queries.to(data.dtype), None)


def _check_device(corpus: Corpus) -> None:
    if corpus.format == "fp8" and not interpreted() and torch.cuda.get_device_capability(corpus.device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(corpus.device)))
        raise ShapeError(f"`corpus` is fp8, which needs a GPU of compute capability 8.9, but this one has {capability}")


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
    scan = _scan(queries, corpus)
    tile = plan(num_queries, corpus.format)
    num_groups = triton.cdiv(count, GROUP)
    groups = torch.empty(num_queries, num_groups, dtype=torch.float32, device=device)
    tiles = torch.empty(num_queries, triton.cdiv(num_groups, FAN), dtype=torch.float32, device=device)
    maxima_kernel[(triton.cdiv(count, tile.rows) * triton.cdiv(num_queries, tile.queries),)](
        scan.data, corpus.scales, filter, scan.queries, scan.query_scales, groups, tiles, count, num_queries, scan.stride,
        num_groups, tiles.shape[1], GROUP=GROUP, FAN=FAN, BLOCK_Q=tile.queries, **scan.constants(tile),
    )  # fmt: skip
    by_count = counted(num_queries, max(k * GROUP, TOP_COUNTED))
    chosen = best_groups(groups, tiles, k, by_count)
    candidates = torch.empty(num_queries, k * GROUP, dtype=torch.float32, device=device)
    _rescan(scan, filter, chosen, GROUP, candidates)
    best_candidates(candidates, chosen, GROUP, scores, indices, by_count)
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
    _rescan(_scan(queries, originals), None, ordered, 1, candidates)
    best_candidates(candidates, ordered, 1, scores, indices, counted(num_queries, count))
    return scores, indices


def _rescan(scan: _Scan, filter: torch.Tensor | None, chosen: torch.Tensor, group: int, out: torch.Tensor) -> None:
    if scan.corpus.count == 0:
        out.fill_(float("-inf"))
        return
    tile = replace(plan(1, scan.corpus.format), rows=RESCANNED, warps=4)
    rescan_kernel[(triton.cdiv(out.shape[1], tile.rows), out.shape[0])](
        scan.data, scan.corpus.scales, filter, scan.queries, scan.query_scales, chosen, out, scan.corpus.count, chosen.shape[1],
        scan.stride, GROUP=group, BLOCK_Q=SINGLE, **scan.constants(tile),
    )  # fmt: skip


def _aot_cases() -> list[AotCase]:
    cases = []
    kinds = {"fp32": ("*fp32", "*fp32"), "bf16": ("*bf16", "*bf16"), "fp16": ("*fp16", "*fp16"), "int8": ("*i8", "*i8"),
             "fp8": ("*i32", "*fp16")}  # fmt: skip
    for format, (data, queries) in kinds.items():
        constants = {
            "GROUP": GROUP, "EVEN": True, "FORMAT": format, "UPCAST": False,
            "PRECISION": "tf32x3" if format == "fp32" else "ieee",
        } | ({} if format in SCALED else {"data_scales": None, "query_scales": None})  # fmt: skip
        common = {
            "data": data, "data_scales": "*fp32", "filter": "*i32", "queries": queries, "query_scales": "*fp32", "N": "i32",
            "Q": "i32", "k": "i32", "stride": "i32:16",
        }  # fmt: skip
        only = 90 if format == "fp8" else None  # sm_80 has no such type
        for name, tile in (("few", FEW[format]), ("some", SOME[format]), ("many", MANY[format])):
            blocks = {"BLOCK_N": tile.rows, "BLOCK_Q": tile.queries, "BLOCK_K": tile.depth}
            cases.append(AotCase(
                f"maxima-{format}-{name}", maxima_kernel,
                common | {"groups": "*fp32", "tiles": "*fp32", "num_groups": "i32", "num_tiles": "i32"},
                constants | blocks | {"FAN": FAN}, tile.warps, tile.stages, is_matmul=format != "fp32", only=only,
            ))  # fmt: skip
        tile = FEW[format]
        blocks = {"BLOCK_N": RESCANNED, "BLOCK_Q": SINGLE, "BLOCK_K": tile.depth}
        cases.append(AotCase(
            f"rescan-{format}", rescan_kernel, common | {"chosen": "*i32", "out": "*fp32"}, constants | blocks,
            4, tile.stages, is_matmul=format != "fp32", only=only,
        ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
