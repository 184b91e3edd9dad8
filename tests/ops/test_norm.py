"""Norms: every back end against fp64, in poisoned memory, in place, and row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import skip_in_interpreter
from uma_kernels.check import ShapeError
from uma_kernels.norm import add_rms_norm, rms_norm
from uma_kernels.norm.cases import CASES, NormCase
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels

EPS = 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_rms_norm_matches_fp64_and_each_row_stands_alone(case: NormCase, backend: str) -> None:
    skip_in_interpreter(backend, case.tokens * case.width, 30_000)
    x, weight = torch.randn(case.tokens, case.width) * 3, torch.randn(case.width)
    with with_sentinels(x.shape) as out:
        rms_norm(x, weight, EPS, out)
        assert_reduction(
            out, F.rms_norm(x, (case.width,), weight, EPS), F.rms_norm(x.double(), (case.width,), weight.double(), EPS)
        )
    if backend != "reference":
        for row in {0, case.tokens // 2, case.tokens - 1} & set(range(case.tokens)):
            assert_invariant(rms_norm(x[row : row + 1], weight, EPS), out[row : row + 1])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_add_rms_norm_is_the_addition_and_then_the_norm(case: NormCase, backend: str) -> None:
    skip_in_interpreter(backend, case.tokens * case.width, 30_000)
    x, residual = torch.randn(2, case.tokens, case.width)
    weight = torch.randn(case.width)
    summed = x + residual
    expected = rms_norm(summed, weight, EPS)
    with with_sentinels(x.shape) as stream, with_sentinels(x.shape) as out:
        stream.copy_(residual)
        add_rms_norm(x, stream, weight, EPS, out)
        assert_exact(stream, summed)
        assert_invariant(out, expected)
    in_place = x.clone()
    add_rms_norm(in_place, residual.clone(), weight, EPS, in_place)
    assert_invariant(in_place, expected)


def test_rms_norm_takes_any_number_of_dimensions_and_may_write_in_place(backend: str) -> None:
    x, weight = torch.randn(5, 3, 64), torch.randn(64)
    flat = rms_norm(x.view(15, 64), weight, EPS)
    assert_invariant(rms_norm(x, weight, EPS), flat.view(5, 3, 64))
    assert_invariant(rms_norm(x[0, 0].clone(), weight, EPS), flat[0])
    assert_invariant(rms_norm(x, weight, EPS, x), flat.view(5, 3, 64))


def test_tiny_huge_and_zero_rows_stay_finite(backend: str) -> None:
    x = torch.randn(3, 65) * torch.tensor([[1e-18], [1e17], [0.0]])
    weight = torch.ones(65)
    assert_reduction(
        rms_norm(x, weight, EPS), F.rms_norm(x, (65,), weight, EPS), F.rms_norm(x.double(), (65,), weight.double(), EPS)
    )


def test_wrong_shapes_are_refused() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    for call in (
        lambda: rms_norm(x, torch.zeros(2), EPS),
        lambda: rms_norm(x.double(), weight, EPS),
        lambda: rms_norm(torch.zeros(()), weight, EPS),
        lambda: rms_norm(x, weight, EPS, torch.zeros(3, 2)),
        lambda: add_rms_norm(x, torch.zeros(3, 2), weight, EPS),
    ):
        with pytest.raises(ShapeError):
            call()
