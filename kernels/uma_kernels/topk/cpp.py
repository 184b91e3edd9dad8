"""The k best rows and late interaction in C++ (csrc/cpu/topk.cpp, topk_maxsim.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.check import ptr
from uma_kernels.dispatch import extension
from uma_kernels.topk.corpus import Corpus

_FORMATS = {"fp32": 0, "fp16": 1, "int8": 2}
_STRIDE = 64  # elements: a multiple of every format's padding


def _scan(corpus: Corpus, queries: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """The first arguments of a scan, and the padded queries, which must outlive it."""
    padded = torch.nn.functional.pad(queries, (0, -corpus.width % _STRIDE)).contiguous()
    view = (ptr(corpus.data), ptr(corpus.scales), corpus.count, corpus.data.shape[1], _FORMATS[corpus.format])
    return (*view, ptr(padded), padded.shape[0], padded.shape[1]), padded


def _out(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = queries.shape[0], k
    return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)


def topk(
    queries: torch.Tensor, corpus: Corpus, k: int, filter: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments, _padded = _scan(corpus, queries)
    scores, indices = _out(queries, k)
    extension().topk(*arguments, k, ptr(filter), ptr(scores), ptr(indices))
    return scores, indices


def rescore(
    queries: torch.Tensor, originals: Corpus, k: int, survivors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments, _padded = _scan(originals, queries)
    scores, indices = _out(queries, k)
    extension().topk_rescore(*arguments, k, ptr(survivors), survivors.shape[1], ptr(scores), ptr(indices))
    return scores, indices


def maxsim(queries: torch.Tensor, query_ends: torch.Tensor, docs: torch.Tensor, doc_ends: torch.Tensor) -> torch.Tensor:
    num_queries, num_docs = query_ends.shape[0] - 1, doc_ends.shape[0] - 1
    out = torch.empty(num_queries, num_docs, dtype=torch.float32)
    extension().maxsim(
        ptr(queries), ptr(query_ends), num_queries, ptr(docs), ptr(doc_ends), num_docs, docs.shape[1], ptr(out)
    )
    return out
