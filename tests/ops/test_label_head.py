"""Logits of label tokens: against fp64 for dense and quantised vocabularies, and bitwise independent of the batch."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import BACKENDS, skip_in_interpreter
from uma_kernels.check import ShapeError
from uma_kernels.label_head import label_head
from uma_kernels.label_head.cases import CASES, LabelHeadCase
from uma_kernels.linear import gather_rows, pack
from uma_kernels.linear.cases import FORMATS, WeightFormat
from uma_kernels.testing import assert_invariant, assert_reduction

# Bitwise promises hold for our own kernels: torch's own products depend on the batch.
invariant = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"], indirect=True)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.id)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_label_logits_match_fp64(case: LabelHeadCase, weight_format: WeightFormat, backend: str) -> None:
    if weight_format.bits != 32:
        skip_in_interpreter(backend, case.rows * case.labels * case.width, 1000)
    weight = pack(weight_format.random(case.vocabulary, case.width))
    hidden = torch.randn(case.tokens, case.width)
    rows = torch.randint(case.tokens, (case.rows,))
    ids = torch.randint(case.vocabulary, (case.labels,))
    x, w = hidden[rows], gather_rows(weight, ids)
    assert_reduction(label_head(hidden, rows, weight, ids), x @ w.T, x.double() @ w.double().T)


@invariant
def test_a_logit_has_the_same_bits_in_every_batch(backend: str) -> None:
    weight = pack(torch.randn(50, 583))
    hidden, rows, ids = torch.randn(40, 583), torch.randperm(40)[:33], torch.randperm(50)[:7]
    together = label_head(hidden, rows, weight, ids)
    for r in range(len(rows)):
        alone = label_head(hidden[rows[r]][None].clone(), torch.zeros(1, dtype=torch.int64), weight, ids[3:4])
        assert_invariant(alone[0, 0], together[r, 3])


def test_rows_and_tokens_out_of_range_are_refused(backend: str) -> None:
    weight, hidden = pack(torch.randn(5, 8)), torch.randn(3, 8)
    good = torch.tensor([0])
    for bad_rows, bad_ids in (
        (torch.tensor([3]), good),
        (torch.tensor([-1]), good),
        (good, torch.tensor([5])),
        (good, torch.tensor([-1])),
    ):
        with pytest.raises(IndexError):
            label_head(hidden, bad_rows, weight, bad_ids)
    with pytest.raises(ShapeError):
        label_head(hidden[:, :4].clone(), good, weight, good)
