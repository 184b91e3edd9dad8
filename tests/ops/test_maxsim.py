"""Late interaction over ragged tokens: against fp64, and bitwise independent of what else is scored."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.check import ShapeError
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels
from uma_kernels.topk import maxsim, reference
from uma_kernels.topk.cases import MAXSIM_CASES, MaxsimCase

ALL = [*BACKENDS, "numba"] if dispatch.numba_error() is None else BACKENDS
every_backend = pytest.mark.parametrize("backend", ALL, indirect=True)
invariant_backend = pytest.mark.parametrize("backend", [b for b in ALL if b != "reference"], indirect=True)


def ends(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    """Random tokens between margins: reading outside of them would show."""
    with with_sentinels((sum(lengths), width)) as values:
        values.copy_(torch.randn(sum(lengths), width))
    return values


@every_backend
@pytest.mark.parametrize("case", MAXSIM_CASES, ids=lambda c: c.id)
def test_scores_match_fp64(case: MaxsimCase, backend: str) -> None:
    queries, docs = tokens(case.query_tokens, case.width), tokens(case.doc_tokens, case.width)
    q_ends, d_ends = ends(case.query_tokens), ends(case.doc_tokens)
    scores = maxsim(queries, q_ends, docs, d_ends)
    plain = reference.maxsim(queries, q_ends, docs, d_ends)
    true = torch.zeros(plain.shape, dtype=torch.float64)
    for q, length in enumerate(case.query_tokens):
        for d, doc_length in enumerate(case.doc_tokens):
            a = queries[q_ends[q] : q_ends[q] + length].double()
            b = docs[d_ends[d] : d_ends[d] + doc_length].double()
            if doc_length:
                true[q, d] = (a @ b.T).amax(dim=1).sum()
            elif length:
                true[q, d] = float("-inf")
    finite = true.isfinite()
    assert_exact(scores[~finite], true[~finite].float())
    assert_reduction(scores[finite], plain[finite], true[finite])


@invariant_backend
def test_a_score_has_the_same_bits_beside_any_other(backend: str) -> None:
    case = MaxsimCase((5, 33, 16), (40, 7, 65), 96)
    queries, docs = tokens(case.query_tokens, case.width), tokens(case.doc_tokens, case.width)
    q_ends, d_ends = ends(case.query_tokens), ends(case.doc_tokens)
    together = maxsim(queries, q_ends, docs, d_ends)
    for q in range(3):
        for d in range(3):
            a, b = queries[q_ends[q] : q_ends[q + 1]].clone(), docs[d_ends[d] : d_ends[d + 1]].clone()
            alone = maxsim(a, ends((a.shape[0],)), b, ends((b.shape[0],)))
            assert_invariant(alone[0, 0], together[q, d])


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_document_that_is_not_finite_scores_nan_alone(bad: float, backend: str) -> None:
    queries, docs = torch.randn(4, 8), torch.randn(9, 8)
    q_ends, d_ends = ends((4,)), ends((3, 3, 3))
    before = maxsim(queries, q_ends, docs, d_ends)
    docs[4, 7] = bad
    after = maxsim(queries, q_ends, docs, d_ends)
    assert_exact(after.isnan(), torch.tensor([[False, True, False]]))
    assert_exact(after[:, [0, 2]], before[:, [0, 2]])


def test_bad_input_is_refused(backend: str) -> None:
    queries, docs = torch.randn(4, 8), torch.randn(6, 8)
    good_q, good_d = ends((4,)), ends((2, 4))
    for wrong in (
        torch.tensor([0, 7]),
        torch.tensor([1, 6]),
        torch.tensor([0, 5, 4, 6]),
        torch.tensor([], dtype=torch.int64),
    ):
        with pytest.raises(ShapeError, match="doc_ends"):
            maxsim(queries, good_q, docs, wrong)
    with pytest.raises(ShapeError, match="docs"):
        maxsim(queries, good_q, docs[:, :4].clone(), good_d)
    with pytest.raises(ShapeError, match="query_ends"):
        maxsim(queries, good_q.int(), docs, good_d)
    queries[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"queries\[2, 5\]"):
        maxsim(queries, good_q, docs, good_d)
