"""The k best rows and late interaction compiled by numba: for machines with no C++ compiler. Shapes are checked by the caller.

Knows arrays; does not know packing. Queries are taken four at a time, always, so that a product is the same code, and has the
same bits, whatever stands beside it. Each task owns a range of rows and keeps the k best of each query; merging them in the
total order (score down, index up) makes the result independent of the number of tasks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from uma_kernels import dispatch
from uma_kernels.topk import reference
from uma_kernels.topk.corpus import Corpus, unpack_filter

_FOUR = 4
_FAST = {"reassoc", "contract"}  # sums may be vectorised


@numba.njit(fastmath=_FAST, inline="always")
def _four_dots(row: Any, queries: Any, first: int, width: int) -> Any:
    a = b = c = d = np.float32(0.0)
    for i in range(width):
        x = row[i]
        a += x * queries[first, i]
        b += x * queries[first + 1, i]
        c += x * queries[first + 2, i]
        d += x * queries[first + 3, i]
    return a, b, c, d


@numba.njit
def _sift_down(scores: Any, ids: Any, at: int, count: int) -> None:
    """Heap whose top is the last in the order (score down, index up)."""
    score, index = scores[at], ids[at]
    child = 2 * at + 1
    while child < count:
        right = child + 1
        if right < count and (
            scores[right] < scores[child] or (scores[right] == scores[child] and ids[right] > ids[child])
        ):
            child = right
        if score < scores[child] or (score == scores[child] and index > ids[child]):
            break
        scores[at], ids[at] = scores[child], ids[child]
        at = child
        child = 2 * at + 1
    scores[at], ids[at] = score, index


@numba.njit
def _offer(score: Any, index: int, scores: Any, ids: Any, count: int) -> int:
    """Rows come in ascending order: one with a score equal to the least kept comes too late."""
    if count < scores.shape[0]:
        if score > -np.inf:
            scores[count], ids[count] = score, index
            count += 1
            if count == scores.shape[0]:
                for at in range(count // 2 - 1, -1, -1):
                    _sift_down(scores, ids, at, count)
        return count
    if score > scores[0]:
        scores[0], ids[0] = score, index
        _sift_down(scores, ids, 0, count)
    return count


@numba.njit(parallel=True, nogil=True)
def _scan(
    data: Any, kind: int, scales: Any, allowed: Any, queries: Any, width: int, first: int, count: int, tasks: int,
    scores: Any, ids: Any, kept: Any,
) -> None:  # fmt: skip
    """Rows first .. first + count - 1 into scores, ids [tasks, Q, k] with kept [tasks, Q] entries.

    kind: 0 fp32, 1 fp16 as uint16, 2 int8. `allowed` is empty where every row takes part.
    """
    share = (count + tasks - 1) // tasks
    num_queries = kept.shape[1]
    for task in numba.prange(tasks):
        row = np.empty(width, np.float32)
        bits = row.view(np.int32)
        for n in range(first + task * share, first + min(count, (task + 1) * share)):
            if allowed.shape[0] and not allowed[n]:
                continue
            if kind == 0:
                for i in range(width):
                    row[i] = data[n, i]
            elif kind == 1:
                for i in range(width):  # exponent and fraction moved into place are the value times 2^-112
                    half = np.int32(data[n, i])
                    bits[i] = ((half & 0x8000) << 16) | ((half & 0x7FFF) << 13)
                for i in range(width):
                    row[i] *= np.float32(2.0**112)
            else:
                for i in range(width):
                    row[i] = np.float32(data[n, i])
            scale = scales[n] if kind == 2 else np.float32(1.0)
            for q in range(0, num_queries, 4):
                four = _four_dots(row, queries, q, width)
                for j in range(min(4, num_queries - q)):
                    score = four[j] * scale + np.float32(0.0)
                    kept[task, q + j] = _offer(score, n, scores[task, q + j], ids[task, q + j], kept[task, q + j])


@numba.njit(parallel=True, nogil=True)
def _maxsim(queries: Any, query_ends: Any, docs: Any, doc_ends: Any, out: Any) -> None:
    width = docs.shape[1]
    tokens = query_ends[-1]
    for d in numba.prange(doc_ends.shape[0] - 1):
        best = np.full(queries.shape[0], -np.inf, np.float32)
        poison = np.float32(0.0)
        for t in range(doc_ends[d], doc_ends[d + 1]):
            for i in range(width):
                poison += docs[t, i] * np.float32(0.0)
            for q in range(0, tokens, 4):
                a, b, c, e = _four_dots(docs[t], queries, q, width)
                best[q], best[q + 1] = max(best[q], a), max(best[q + 1], b)
                best[q + 2], best[q + 3] = max(best[q + 2], c), max(best[q + 3], e)
        for q in range(query_ends.shape[0] - 1):
            total = poison
            for s in range(query_ends[q], query_ends[q + 1]):
                total += best[s]
            out[q, d] = total


def _in_fours(queries: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.pad(queries, (0, 0, 0, -queries.shape[0] % _FOUR)).contiguous().numpy()


def _tasks() -> int:
    return min(dispatch.num_threads(), int(getattr(numba.config, "NUMBA_NUM_THREADS", 1)))


def topk(
    queries: torch.Tensor, corpus: Corpus, k: int, filter: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    tasks, num_queries = _tasks(), queries.shape[0]
    data = corpus.data.view(torch.uint16).numpy() if corpus.format == "fp16" else corpus.data.numpy()
    scales = corpus.scales.numpy() if corpus.scales is not None else np.empty(0, np.float32)
    allowed = unpack_filter(filter, corpus.count).numpy() if filter is not None else np.empty(0, np.bool_)
    scores, ids = np.empty((tasks, num_queries, k), np.float32), np.empty((tasks, num_queries, k), np.int64)
    kept = np.zeros((tasks, num_queries), np.int64)
    kind = {"fp32": 0, "fp16": 1, "int8": 2}[corpus.format]
    before = numba.get_num_threads()
    numba.set_num_threads(tasks)
    try:
        _scan(data, kind, scales, allowed, _in_fours(queries), corpus.width, 0, corpus.count, tasks, scores, ids, kept)
    finally:
        numba.set_num_threads(before)
    empty = np.arange(k)[None, None, :] >= kept[:, :, None]
    scores[empty], ids[empty] = -np.inf, np.iinfo(np.int64).max
    # [Q, tasks * k] with rising indices, as `best` wants them
    flat_ids = torch.from_numpy(ids).transpose(0, 1).reshape(num_queries, tasks * k)
    flat_scores = torch.from_numpy(scores).transpose(0, 1).reshape(num_queries, tasks * k)
    ordered, at = flat_ids.sort(dim=1)
    return reference.best(flat_scores.gather(1, at), ordered, k)


rescore = reference.rescore


def maxsim(queries: torch.Tensor, query_ends: torch.Tensor, docs: torch.Tensor, doc_ends: torch.Tensor) -> torch.Tensor:
    out = torch.empty(query_ends.shape[0] - 1, doc_ends.shape[0] - 1, dtype=torch.float32)
    before = numba.get_num_threads()
    numba.set_num_threads(_tasks())
    try:
        _maxsim(_in_fours(queries), query_ends.numpy(), docs.numpy(), doc_ends.numpy(), out.numpy())
    finally:
        numba.set_num_threads(before)
    return out
