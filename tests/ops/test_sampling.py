"""Sampling: drawn tokens against their distribution, against the reference, and against themselves in another batch."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
import torch

from tests.conftest import skip_in_interpreter
from uma_kernels import dispatch
from uma_kernels.check import ShapeError
from uma_kernels.sampling import SamplingBatch, TokenCounts, sample
from uma_kernels.sampling.cases import CASES, SamplingCase
from uma_kernels.sampling.reference import uniform
from uma_kernels.testing import assert_exact

Value = float | list[float]


def batch_of(
    rows: int,
    temperature: Value = 1.0,
    top_k: int | list[int] = 0,
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
    top_ks = torch.tensor(top_k, dtype=torch.int32).expand(rows).contiguous()
    seeds = torch.arange(first_seed, first_seed + rows)
    return SamplingBatch(temperatures, top_ks, *rest, seeds, torch.full_like(seeds, step))


def of_case(case: SamplingCase, first_seed: int = 0) -> SamplingBatch:
    return batch_of(case.rows, case.temperature, case.top_k, case.top_p, case.min_p, first_seed=first_seed)


def kept_by(logits: torch.Tensor, **settings: Any) -> set[int]:
    """The tokens that 500 draws from one row of logits give; the interpreter has time for 25."""
    count = 25 if dispatch.forced_backend() == "triton" and dispatch.interpreted() else 500
    draws = sample(logits.expand(count, -1).contiguous(), batch_of(count, **settings))
    return set(draws.tolist())


def last_kept(logits: torch.Tensor, **settings: Any) -> int:
    """The last token, in index order, of those that stay: if they weigh about the same, one draw says it."""
    seed = next(seed for seed in count() if uniform(seed, 0) > 1 - 0.5 / logits.shape[0])
    return int(sample(logits[None].contiguous(), batch_of(1, first_seed=seed, **settings)))


# Rows of all kinds: temperature, top_k, top_p, min_p.
MIXED = [
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 1.0, 0.0), (0.8, 300, 1.0, 0.0), (1.2, 0, 0.9, 0.0),
    (0.7, 20, 0.95, 0.0), (1.0, 400, 0.9, 0.01), (1.0, 0, 1.0, 0.1), (1.0, 64, 1.0, 0.0), (1.0, 65, 1.0, 0.0),
    (1.0, 0, 0.999999, 0.0), (1.0, 0, 1e-6, 0.0), (9.0, 0, 0.5, 0.0), (0.1, 0, 0.99, 0.0),
]  # fmt: skip


def mixed(rows: list[int], first_seed: int = 0) -> SamplingBatch:
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*(MIXED[row] for row in rows), strict=True))
    return batch_of(len(rows), temperature, top_k, top_p, min_p, first_seed=first_seed)


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [1, 77, 9001])  # less than a chunk, and several with a rest
def test_rows_of_all_kinds_in_one_batch_draw_what_each_draws_alone(vocab: int, masked: bool, backend: str) -> None:
    rows = list(range(len(MIXED)))
    logits = torch.randn(len(rows), vocab) * 3
    mask = None
    if masked:
        mask = torch.rand(len(rows), vocab) < 0.3
        mask[:, vocab // 2] = True
    together = sample(logits, mixed(rows, first_seed=7), mask=mask)
    with dispatch.use_backend("reference"):
        assert_exact(together, sample(logits, mixed(rows, first_seed=7), mask=mask))
    for row in rows:
        own = None if mask is None else mask[row : row + 1].clone()
        alone = sample(logits[row : row + 1].clone(), mixed([row], first_seed=7 + row), mask=own)
        assert_exact(alone, together[row : row + 1])


def test_a_row_draws_the_same_token_however_many_programs_share_it(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(range(len(MIXED)))
    logits = torch.randn(len(rows), 9001) * 3
    before = sample(logits, mixed(rows))
    if backend == "triton":
        monkeypatch.setattr("uma_kernels.sampling.triton_cuts.RESIDENT", 1)
    assert_exact(sample(logits, mixed(rows)), before)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8), (1.0, 7, 0.9)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, backend: str) -> None:
    vocab, draws = 12, 4000
    skip_in_interpreter(backend, draws * vocab, 5000)
    logits = torch.randn(vocab)
    probabilities = (logits.double() / temperature).softmax(0)
    if top_k:
        probabilities[probabilities < probabilities.topk(top_k).values[-1]] = 0
        probabilities /= probabilities.sum()
    largest, order = probabilities.sort(descending=True)
    probabilities[order[largest.cumsum(0) - largest >= top_p]] = 0
    probabilities /= probabilities.sum()
    batch = batch_of(draws, temperature, top_k, top_p, first_seed=123)
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


@pytest.mark.parametrize("vocab", [300, 8269])
def test_all_equal_logits_are_cut_by_index(vocab: int, backend: str) -> None:
    logits = torch.full((vocab,), -3.5)
    for top_k in (1, 5, 64, 65, 150, vocab - 1):
        assert last_kept(logits, top_k=top_k) == top_k - 1
    assert last_kept(logits, top_k=vocab) == last_kept(logits, top_k=vocab + 1) == last_kept(logits) == vocab - 1
    assert last_kept(logits, top_p=0.5) == math.ceil(vocab * 0.5) - 1
    assert last_kept(logits, top_p=1e-6) == 0
    assert last_kept(logits, top_p=0.999999) == vocab - 1
    assert last_kept(logits, top_k=100, top_p=0.5) == 49
    assert last_kept(logits, top_k=40, top_p=0.5) == 19


@pytest.mark.parametrize("top_k", [30, 80])
def test_equal_logits_at_the_cut_stay_by_index_wherever_a_chunk_ends(top_k: int, backend: str) -> None:
    logits = torch.randn(8269).clamp(max=2.0) - 9
    logits[[70, 4000, 8268]] = 1.5
    logits[4096 - 50 : 4096 + 50] = 1.0  # around the first token of the second chunk
    logits[8190] = 1.0
    stay = sorted([70, 4000, *range(4046, 4046 + top_k - 3), 8268])
    assert last_kept(logits[:8268], top_k=top_k - 1) == stay[-2]
    assert last_kept(logits, top_k=top_k) == 8268
    assert last_kept(logits[:8268], top_k=top_k - 1, top_p=0.5) < 4096 - 50 + top_k // 2


def test_many_members_at_almost_one_distance_are_cut_exactly(backend: str) -> None:
    """More than a list holds: the whole row is read at each step."""
    settings = [(2000, 1.0), (0, 0.5), (9000, 0.3)]
    logits = torch.randn(len(settings), 17000) * 1e-5 - 3
    logits[:, 1234] = 0.0
    batch = batch_of(len(settings), 1.0, [k for k, _ in settings], [p for _, p in settings])
    with dispatch.use_backend("reference"):
        expected = sample(logits, batch)
    assert_exact(sample(logits, batch), expected)


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


@pytest.mark.parametrize("vocab", [40, 9001])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_refused_by_name(temperature: float, bad: float, vocab: int, backend: str) -> None:
    logits = torch.zeros(3, vocab)
    logits[1, vocab - 7] = bad
    with pytest.raises(ValueError, match=r"logits\[1\]"):
        sample(logits, batch_of(3, temperature))
    with pytest.raises(ValueError, match=r"logits\[1\]"):
        sample(logits, batch_of(3, temperature, top_k=20, top_p=0.9))


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
