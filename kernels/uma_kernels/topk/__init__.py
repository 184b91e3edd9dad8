"""Candidate scoring: the k best rows of a corpus for each query, and late interaction over token embeddings.

Knows embeddings, formats and a bitmask of the rows that take part; does not know what a row stands for, nor how queries are
embedded.
"""

from __future__ import annotations

from typing import Any

import torch

from uma_kernels.check import FLOATS, ShapeError, check, readable
from uma_kernels.dispatch import choose
from uma_kernels.topk import cpp, reference
from uma_kernels.topk.corpus import FORMATS, Corpus, pack_corpus, pack_filter

__all__ = ["FORMATS", "MOST_K", "Corpus", "maxsim", "pack_corpus", "pack_filter", "topk"]

MOST_K = 4096


def topk(
    queries: torch.Tensor, corpus: Corpus, k: int, filter: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Semantics:  of all rows i of `corpus` that `filter` allows, the k with the largest queries[q] . rows[i], by score down; of
                equal scores the lower index comes first (0 equals -0). Fewer than k: index -1 and score -inf at the end.
                filter: bit i % 32 of word i // 32 (`pack_filter`); None: all rows.
                A corpus with `originals` is scanned for the `survivors(k)` best rows, which are then scored by those
    Shapes:     queries [Q, D] fp32 . corpus [N, D] . filter [ceil(N / 32)] int32 . scores [Q, k] fp32 . indices [Q, k] int64
    Numerics:   sums in fp32. A query's result does not depend on other queries, nor on threads (reference: but for rounding).
                int8 rows (cpp, triton): by queries of up to 16 bits, exact integer sums. triton: queries are rounded to the
                corpus' type for bf16 and fp16, to fp16 for fp8; fp32 products in three TF32 ones.
                A score that overflows to NaN or -inf is never among the best
    Errors:     ShapeError when shapes, dtypes or devices do not fit, k is not in 1 .. 4096, or int8 rows are wider than
                131,071 (triton) . ValueError when a query is not finite (on a GPU: where values are `readable`; else its
                result is undefined)
    Source:     selection by group maxima (triton): a group of rows is scored again only if its largest score is among the
                k largest of all groups
    """
    check("queries", queries, (None, corpus.width))
    if queries.device != corpus.device:
        raise ShapeError(f"`queries` is on {queries.device} but the corpus is on {corpus.device}")
    if filter is not None:
        check("filter", filter, (-(-corpus.count // 32),), torch.int32)
        if filter.device != corpus.device:
            raise ShapeError(f"`filter` is on {filter.device} but the corpus is on {corpus.device}")
    if not 1 <= k <= MOST_K:
        raise ShapeError(f"`k` is {k} but must be in 1 .. {MOST_K}")
    _check_finite("queries", queries)
    back_end = _scanner(corpus, choose("topk", corpus.device.type))
    if corpus.originals is None:
        return back_end.topk(queries, corpus, k, filter)
    _, found = back_end.topk(queries, corpus, survivors(k), filter)
    return _scanner(corpus.originals, choose("topk", corpus.device.type)).rescore(queries, corpus.originals, k, found)


def survivors(k: int) -> int:
    """Rows that a scan in a coarse format keeps for exact scoring."""
    return min(MOST_K, 2 * k + 32)


def maxsim(queries: torch.Tensor, query_ends: torch.Tensor, docs: torch.Tensor, doc_ends: torch.Tensor) -> torch.Tensor:
    """
    Semantics:  out[q, d] = sum over the tokens s of query q of max over the tokens t of document d of queries[s] . docs[t].
                A query without tokens scores 0; a document without tokens -inf (0 for such a query)
    Shapes:     queries [Tq, D], docs [Td, D], both fp32 (triton: or both bf16 or fp16) . query_ends [Qn + 1], doc_ends
                [Dn + 1] int64: query q has the tokens query_ends[q] .. query_ends[q + 1] - 1 . out [Qn, Dn] fp32
    Numerics:   fp32; a score does not depend on other queries or documents (reference: but for rounding). A document that
                holds a NaN or an infinity scores NaN
    Errors:     ShapeError when shapes, dtypes or ends do not fit . ValueError when a query is not finite (on a GPU both:
                where values are `readable`; else the result is undefined)
    Source:     Khattab and Zaharia 2020, arXiv 2004.12832
    """
    check("queries", queries, (None, None), FLOATS)
    check("docs", docs, (None, queries.shape[1]), queries.dtype)
    if queries.shape[1] == 0:
        raise ShapeError("`queries` has width 0 but must have at least 1")
    for name, ends, tokens in (("query_ends", query_ends, queries), ("doc_ends", doc_ends, docs)):
        check(name, ends, (None,), torch.int64)
        if ends.device != queries.device or tokens.device != queries.device:
            raise ShapeError(f"`{name}` is on {ends.device} and its tokens on {tokens.device}, not on {queries.device}")
        if ends.shape[0] == 0:
            raise ShapeError(f"`{name}` is empty but must begin with 0")
        if readable(ends) and (int(ends[0]) != 0 or int(ends[-1]) != tokens.shape[0] or bool((ends.diff() < 0).any())):
            raise ShapeError(f"`{name}` must rise from 0 to the number of tokens, {tokens.shape[0]}")
    _check_finite("queries", queries)
    name = choose("topk.maxsim", docs.device.type)
    if name == "triton":
        from uma_kernels.topk import triton_maxsim

        return triton_maxsim.maxsim(queries, query_ends, docs, doc_ends)
    if name == "numba" and docs.dtype is torch.float32:
        from uma_kernels.topk import numba_kernel

        return numba_kernel.maxsim(queries, query_ends, docs, doc_ends)
    if name == "cpp" and docs.dtype is torch.float32:
        return cpp.maxsim(queries, query_ends, docs, doc_ends)
    return reference.maxsim(queries, query_ends, docs, doc_ends)


def _scanner(corpus: Corpus, name: str) -> Any:
    """The module that scans a corpus of this format: compiled CPU kernels have no bf16 and no fp8."""
    if name == "triton":
        from uma_kernels.topk import triton_kernel

        return triton_kernel
    if corpus.format in ("bf16", "fp8"):
        return reference
    if name == "numba":
        from uma_kernels.topk import numba_kernel

        return numba_kernel
    return cpp if name == "cpp" else reference


def _check_finite(name: str, values: torch.Tensor) -> None:
    if readable(values) and not torch.isfinite(values).all():
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(f"`{name}[{bad[0]}, {bad[1]}]` is {float(values[bad[0], bad[1]])}, not a finite number")
