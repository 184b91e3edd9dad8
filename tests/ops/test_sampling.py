"""Sampling: drawn tokens against their distribution, against the reference, and against themselves in another batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.conftest import skip_in_interpreter
from uma_kernels import dispatch
from uma_kernels.check import ShapeError
from uma_kernels.sampling import SamplingBatch, TokenCounts, sample
from uma_kernels.sampling.cases import CASES, SamplingCase
from uma_kernels.testing import assert_exact

Value = float | list[float]


def batch_of(
    rows: int,
    temperature: Value = 1.0,
    top_k: int = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
    repetition_penalty: Value = 1.0,
    presence_penalty: Value = 0.0,
    frequency_penalty: Value = 0.0,
    first_seed: int = 0,
    step: int = 0,
) -> SamplingBatch:
    floats = (temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    temperatures, *rest = (torch.tensor(x, dtype=torch.float32).expand(rows).contiguous() for x in floats)
    seeds = torch.arange(first_seed, first_seed + rows)
    return SamplingBatch(
        temperatures, torch.full((rows,), top_k, dtype=torch.int32), *rest, seeds, torch.full_like(seeds, step)
    )


def of_case(case: SamplingCase, first_seed: int = 0) -> SamplingBatch:
    return batch_of(case.rows, case.temperature, case.top_k, case.top_p, case.min_p, first_seed=first_seed)


def kept_by(logits: torch.Tensor, **settings: Any) -> set[int]:
    """The tokens that 500 draws from one row of logits give; the interpreter has time for 25."""
    count = 25 if dispatch.forced_backend() == "triton" and dispatch.interpreted() else 500
    draws = sample(logits.expand(count, -1).contiguous(), batch_of(count, **settings))
    return set(draws.tolist())


def counts_of(*pairs: tuple[int, int]) -> TokenCounts:
    return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs], dtype=torch.int32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_back_end_draws_what_the_reference_draws(case: SamplingCase, backend: str) -> None:
    skip_in_interpreter(backend, case.rows * case.vocab)
    logits = torch.randn(case.rows, case.vocab) * 3
    before = logits.clone()
    mask = torch.rand(case.rows, case.vocab) < 0.9
    mask[:, :1] = True
    draws = [sample(logits, of_case(case)), sample(logits, of_case(case, first_seed=1 << 40), mask=mask)]
    with dispatch.use_backend("reference"):
        expected = [sample(logits, of_case(case)), sample(logits, of_case(case, first_seed=1 << 40), mask=mask)]
    for ours, theirs in zip(draws, expected, strict=True):
        assert_exact(ours, theirs)
    assert_exact(logits, before)
    assert mask.gather(1, draws[1][:, None]).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_row_draws_the_same_token_alone_and_in_any_batch(case: SamplingCase, backend: str) -> None:
    skip_in_interpreter(backend, case.rows * case.vocab)
    logits = torch.randn(case.rows, case.vocab) * 3
    together = sample(logits, of_case(case))
    for row in range(case.rows):
        alone = batch_of(1, case.temperature, case.top_k, case.top_p, case.min_p, first_seed=row)
        assert_exact(sample(logits[row : row + 1].clone(), alone), together[row : row + 1])


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 5)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, backend: str) -> None:
    vocab, draws = 12, 4000
    skip_in_interpreter(backend, draws * vocab * (31 if top_k else 1), 5000)
    logits = torch.randn(vocab)
    probabilities = (logits.double() / temperature).softmax(0)
    if top_k:
        probabilities[probabilities < probabilities.topk(top_k).values[-1]] = 0
        probabilities /= probabilities.sum()
    batch = batch_of(draws, temperature, top_k, first_seed=123)
    seen = torch.bincount(sample(logits.expand(draws, -1).contiguous(), batch), minlength=vocab).double()
    assert (seen[probabilities == 0] == 0).all()
    expected = draws * probabilities[probabilities > 0]
    chi_square = ((seen[probabilities > 0] - expected) ** 2 / expected).sum().item()
    freedom = expected.numel() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations above the mean


def test_draws_of_one_seed_at_successive_steps_follow_the_distribution(backend: str) -> None:
    draws = 4000
    skip_in_interpreter(backend, draws * 2, 5000)
    batch = batch_of(draws)
    steps = SamplingBatch(
        *(getattr(batch, name) for name in SamplingBatch.__slots__[:7]), batch.seeds * 0 + 7, batch.seeds
    )
    ones = sample(torch.zeros(draws, 2), steps).double()
    assert abs(ones.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(draws)
    same_as_before = (ones[1:] == ones[:-1]).double().mean().item()
    assert abs(same_as_before - 0.5) < 4 * 0.5 / math.sqrt(draws)


def test_temperature_zero_takes_the_largest_and_of_equals_the_lowest_index(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-5.0, -6.0, -5.0, -7.0]])
    assert sample(logits, batch_of(2, temperature=0.0)).tolist() == [1, 0]
    mask = torch.tensor([[True, False, False, True], [True] * 4])
    assert sample(logits, batch_of(2, temperature=0.0), mask=mask).tolist() == [3, 0]


def test_top_k_keeps_exactly_k_and_of_equals_the_lowest_indices(backend: str) -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.5, 0.5])
    assert kept_by(logits, top_k=1) == {1}
    assert kept_by(logits, top_k=3) == {1, 2, 3}
    assert kept_by(logits, top_k=4) == {1, 2, 3, 4}
    assert kept_by(logits, top_k=99) == set(range(6))


def test_top_p_keeps_the_fewest_that_reach_it_and_at_least_one(backend: str) -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept_by(logits, top_p=0.05) == {1}
    assert kept_by(logits, top_p=0.45) == {1, 3}
    assert kept_by(logits, top_p=0.75) == {1, 2, 3}
    assert kept_by(logits, top_p=0.95) == set(range(4))
    assert kept_by(logits, top_k=2, top_p=0.6) == {1, 3}  # 0.4 / 0.7 of what top_k left is below 0.6
    assert kept_by(logits, top_k=2, top_p=0.55) == {1}


def test_min_p_keeps_tokens_by_their_share_of_the_largest(backend: str) -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept_by(logits, min_p=0.3) == {1, 2, 3}
    assert kept_by(logits, min_p=0.7) == {1, 3}
    assert kept_by(logits, min_p=1.0) == {1}


def test_penalties_move_the_logits_as_said(backend: str) -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 1.0]])

    def drawn(counts: TokenCounts | None, **settings: Any) -> int:
        return int(sample(logits, batch_of(1, temperature=0.0, **settings), [counts]))

    assert drawn(None, presence_penalty=9.0) == 0
    assert drawn(counts_of((0, 1)), presence_penalty=0.2) == 1
    assert drawn(counts_of((0, 1)), presence_penalty=0.05) == 0
    assert drawn(counts_of((0, 1), (1, 3)), frequency_penalty=0.2) == 0  # 1.8 against 1.3
    assert drawn(counts_of((0, 5), (1, 1)), frequency_penalty=0.2) == 1  # 1.0 against 1.7
    assert drawn(counts_of((0, 1)), repetition_penalty=1.1) == 1
    assert drawn(counts_of((0, 0)), repetition_penalty=1.1) == 1  # an id of the prompt
    assert drawn(counts_of((0, 0)), presence_penalty=9.0, frequency_penalty=9.0) == 0
    logits = torch.tensor([[-2.0, -1.9]])
    assert drawn(counts_of((1, 1)), repetition_penalty=1.1) == 0  # a negative logit is multiplied


def test_a_masked_token_is_never_drawn_however_penalised(backend: str) -> None:
    mask = torch.tensor([[True, False, True]]).expand(100, 3).contiguous()
    counts: list[TokenCounts | None] = [counts_of((1, 1))] * 100
    drawn = sample(torch.zeros(100, 3), batch_of(100, repetition_penalty=0.5, frequency_penalty=-9.0), counts, mask)
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_refused_by_name(bad: float, temperature: float, backend: str) -> None:
    logits = torch.zeros(3, 40)
    logits[1, 33] = bad
    with pytest.raises(ValueError, match=r"logits\[1\]"):
        sample(logits, batch_of(3, temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_is_refused_by_name(temperature: float, backend: str) -> None:
    logits = torch.zeros(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"logits\[1\].*no token left"):
        sample(logits, batch_of(2, temperature), mask=mask)
    logits[0] = float("-inf")
    with pytest.raises(ValueError, match=r"logits\[0\].*no token left"):
        sample(logits, batch_of(2, temperature))


def test_extreme_temperatures_and_logits_still_draw(backend: str) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30]])
    assert sample(logits, batch_of(2, temperature=1e-30)).tolist()[0] == 0
    assert sample(logits, batch_of(2, temperature=1e30, top_k=2, top_p=0.9)).tolist()[0] in (0, 2)


def test_ids_outside_the_vocabulary_are_refused(backend: str) -> None:
    for bad in (5, -1):
        with pytest.raises(IndexError):
            sample(torch.zeros(1, 5), batch_of(1), [counts_of((bad, 1))])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1},
        {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        batch_of(2, **settings)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        sample(torch.zeros(2, 5), batch_of(3))
    with pytest.raises(ShapeError):
        sample(torch.zeros(2, 5), batch_of(2), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError):
        sample(torch.zeros(2, 5), batch_of(2), [None])
