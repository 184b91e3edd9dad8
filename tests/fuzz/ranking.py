"""Cases of candidate scoring: the k best rows of a corpus, and late interaction.

Knows what these ops are specified to compute; does not know how a case came to be drawn.
"""

from __future__ import annotations

import torch

from tests.fuzz.draw import Draw
from uma_kernels.testing import NEAR, assert_best, assert_exact, assert_invariant, assert_reduction, reduction_bound
from uma_kernels.topk import Corpus, maxsim, pack_corpus, pack_filter, reference, topk
from uma_kernels.topk.corpus import padded_width

COMPILED = ("fp32", "fp16", "int8")  # formats that have a compiled kernel


def check_topk(draw: Draw) -> None:
    count, width = draw.size("N", 0, 1500), draw.size("D", 1, 200)
    num_queries = draw.size("Q", 0, max(1, min(110, 60_000_000 // (max(1, count) * width * 8))))
    k = draw.size("k", 1, draw.pick("deepest", (20, 400, 1600)))
    weight_format = draw.pick("format", COMPILED)
    queries, rows = torch.randn(num_queries, width), torch.randn(count, width)
    if draw.flag("equals", 0.3):
        queries, rows = queries.round(), rows.round()
    corpus = _draw_corpus(draw, rows, weight_format)
    allowed = torch.rand(count) < draw.pick("share", (1.0, 1.0, 0.5, 0.02, 0.0))
    words = None if draw.drawn["share"] == 1.0 and draw.random.random() < 0.7 else draw.place(pack_filter(allowed))
    if words is None:
        allowed.fill_(True)
    queries = draw.place(queries)
    scores, indices = topk(queries, corpus, k, words)
    values = (corpus.originals or corpus).rows().double()
    true = queries.double() @ values.T
    if corpus.originals is None:
        assert_best(scores, indices, true, allowed, k, _error(queries, corpus, true))
    else:  # which rows survive the coarse scan is its own to say: here, that they are scored by the originals
        assert_exact(indices >= 0, torch.arange(k)[None, :] < allowed.sum().clamp(max=k).expand(num_queries, 1))
        for q in range(num_queries):
            found = indices[q][indices[q] >= 0]
            assert_best(
                scores[q : q + 1],
                torch.where(indices[q] >= 0, torch.searchsorted(found.sort().values, indices[q]), -1)[None],
                true[q : q + 1, found.sort().values],
                torch.ones(len(found), dtype=torch.bool),
                k,
                _error(queries, corpus.originals, true),
            )
    some = draw.some_of(num_queries)
    again_scores, again_indices = topk(queries[some], corpus, k, words)
    assert_invariant(again_scores, scores[some])
    assert_exact(again_indices, indices[some])


def _draw_corpus(draw: Draw, rows: torch.Tensor, name: str) -> Corpus:
    """Packed, or packed and grown, so that buffers hold more rows than there are."""
    kept = draw.pick("originals", ("fp32", "fp16", None)) if name == "int8" else None
    if not draw.flag("grown", 0.3):
        return pack_corpus(rows, name, kept)
    first = draw.random.randint(0, len(rows))
    corpus = pack_corpus(rows[:first], name, kept)
    corpus.append(rows[first:])
    if corpus.data.shape[0] > corpus.count and name != "int8":  # what lies behind the last row must not matter
        corpus.data[corpus.count :, : padded_width(corpus.width, name)] = float("nan")
    return corpus


def _error(queries: torch.Tensor, corpus: Corpus, true: torch.Tensor) -> float:
    """Largest error of a score: REDUCTION, NEAR where queries are rounded to 16 bits."""
    if true.numel() == 0:
        return 0.0
    rows = corpus.rows()
    terms = queries.double().abs() @ rows.double().abs().T
    if corpus.format == "int8":
        return NEAR * float(terms.max())
    return reduction_bound(queries @ rows.T, true, terms=terms)


def check_maxsim(draw: Draw) -> None:
    width = draw.size("D", 1, 150)
    query_lengths = [draw.size(f"q{i}", 0, 40) for i in range(draw.size("Qn", 0, 4))]
    doc_lengths = [draw.size(f"d{i}", 0, 90) for i in range(draw.size("Dn", 0, 6))]
    queries, docs = (draw.place(torch.randn(sum(lengths), width)) for lengths in (query_lengths, doc_lengths))
    q_ends, d_ends = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, doc_lengths))
    scores = maxsim(queries, q_ends, docs, d_ends)
    plain = reference.maxsim(queries, q_ends, docs, d_ends)
    true = torch.zeros(plain.shape, dtype=torch.float64)
    terms = true.clone()
    for q, length in enumerate(query_lengths):
        for d, doc_length in enumerate(doc_lengths):
            a, b = queries[q_ends[q] : q_ends[q + 1]].double(), docs[d_ends[d] : d_ends[d + 1]].double()
            if doc_length:
                true[q, d] = (a @ b.T).amax(dim=1).sum()
                terms[q, d] = (a.abs() @ b.abs().T).amax(dim=1).sum()
            elif length:
                true[q, d] = float("-inf")
    finite = true.isfinite()
    assert_exact(scores[~finite], true[~finite].float())
    assert_reduction(scores[finite], plain[finite], true[finite], terms=terms[finite])
    if query_lengths and doc_lengths:
        q, d = draw.random.randrange(len(query_lengths)), draw.random.randrange(len(doc_lengths))
        a, b = queries[q_ends[q] : q_ends[q + 1]].clone(), docs[d_ends[d] : d_ends[d + 1]].clone()
        alone = maxsim(a, torch.tensor([0, len(a)]), b, torch.tensor([0, len(b)]))
        assert_exact(alone[0, 0], scores[q, d])
