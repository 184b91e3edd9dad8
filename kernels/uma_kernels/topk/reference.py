"""The k best rows and late interaction in plain torch: the specification."""

from __future__ import annotations

import torch

from uma_kernels.topk.corpus import Corpus, unpack_filter


def topk(
    queries: torch.Tensor, corpus: Corpus, k: int, filter: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = queries @ corpus.rows().T
    if filter is not None:
        scores = scores.masked_fill(~unpack_filter(filter, corpus.count), float("-inf"))
    indices = torch.arange(corpus.count, device=queries.device).expand(scores.shape)
    return best(scores, indices, k)


def rescore(
    queries: torch.Tensor, originals: Corpus, k: int, survivors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the rows `survivors` [Q, S], -1 for none."""
    ordered = survivors.sort(dim=1).values
    rows = originals.data[ordered.clamp(min=0), : originals.width].float()
    scores = torch.einsum("qsd,qd->qs", rows, queries).masked_fill(ordered < 0, float("-inf"))
    return best(scores, ordered, k)


def best(scores: torch.Tensor, indices: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of rows whose indices rise. A stable sort keeps the lower index first."""
    scores = scores.masked_fill(scores.isnan(), float("-inf")) + 0.0
    ordered, at = scores.sort(dim=1, descending=True, stable=True)
    found = indices.gather(1, at)[:, :k]
    ordered = ordered[:, :k]
    found = found.masked_fill(ordered.isneginf(), -1)
    missing = (0, k - ordered.shape[1])
    return torch.nn.functional.pad(ordered, missing, value=float("-inf")), torch.nn.functional.pad(
        found, missing, value=-1
    )


def maxsim(queries: torch.Tensor, query_ends: torch.Tensor, docs: torch.Tensor, doc_ends: torch.Tensor) -> torch.Tensor:
    num_queries, num_docs = query_ends.shape[0] - 1, doc_ends.shape[0] - 1
    out = torch.zeros(num_queries, num_docs, dtype=torch.float32, device=docs.device)
    starts, ends = doc_ends.tolist(), query_ends.tolist()
    for d in range(num_docs):
        doc = docs[starts[d] : starts[d + 1]].float()
        bad = not bool(torch.isfinite(doc).all())
        best = torch.full((queries.shape[0],), float("-inf"), device=docs.device)
        if doc.shape[0]:
            best = (queries.float() @ doc.T).amax(dim=1)
        for q in range(num_queries):
            out[q, d] = float("nan") if bad else best[ends[q] : ends[q + 1]].sum()
    return out
