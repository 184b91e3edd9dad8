"""Curves, missing facts and the aggregate: monotone to the last bit, neutral where nothing is known, and the weights that were declared."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.factors import Curve, Fact, Linear, Points, Saturating, curve_from
from uma_engine.ranking.ledger import AGGREGATES, Aggregate, aggregate


def some_number(rng: random.Random) -> float:
    """Of any size, often at a place where rounding matters."""
    kind = rng.randrange(5)
    if kind == 0:
        return float(rng.randint(-5, 100))
    if kind == 1:
        return rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300)
    if kind == 2:
        return rng.choice([0.0, 1.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3])
    return rng.uniform(0, 100)


def some_curve(rng: random.Random) -> Curve:
    kind = rng.randrange(3)
    if kind == 0:
        worst = rng.uniform(-100, 100)
        return Linear(worst, worst + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-12, 6))
    if kind == 1:
        return Saturating(10.0 ** rng.uniform(-12, 12), rng.random() < 0.5)
    n = rng.randint(2, 6)
    xs = sorted({rng.uniform(0, 100) for _ in range(n)})
    ys = sorted(rng.choice([0.0, 1.0, rng.random()]) for _ in xs)
    ys[-1] = max(ys[-1], ys[0] + (1 - ys[0]) / 2) if ys[-1] == ys[0] < 1 else ys[-1]
    ys[0] = 0.0 if ys[0] == ys[-1] else ys[0]
    return Points(tuple(zip(xs, ys if rng.random() < 0.5 else ys[::-1], strict=True)))


def test_ten_thousand_times_a_better_fact_or_read_never_lowers_the_score() -> None:
    rng = random.Random(20)
    raised = 0
    for trial in range(10_000):
        kind: Aggregate = rng.choice(AGGREGATES)
        facts = [
            Fact(f"f{i}", "x", some_curve(rng), rng.uniform(0.01, 0.99), against=rng.choice([None, "budget"]))
            for i in range(rng.randint(1, 6))
        ]
        reads = [rng.random() for _ in range(rng.randint(0, 4))]
        weights = [rng.uniform(1e-6, 1.0 if kind == "product" else 10.0) for _ in range(len(facts) + len(reads))]
        job = {"budget": 10.0 ** rng.uniform(-6, 6)}
        numbers = [some_number(rng) for _ in facts]

        def score(kind=kind, facts=facts, reads=reads, weights=weights, job=job, numbers=numbers) -> float:  # type: ignore[no-untyped-def]
            values = [f.measure({"x": x}, job, "c").value for f, x in zip(facts, numbers, strict=True)]
            assert all(0.0 <= v <= 1.0 for v in values)
            return aggregate(kind, [*values, *reads], weights)[0]

        before = score()
        place = rng.randrange(len(weights))
        step = rng.choice([1e-300, 1e-12, 1e-3, 1.0, 50.0, 1e300])
        if place < len(facts):
            rising = facts[place].curve.rising
            old = numbers[place]
            numbers[place] = max(-1.7e308, min(1.7e308, old + step if rising else old - step))
            if numbers[place] == old:  # the step was lost in rounding: the next double instead
                numbers[place] = max(-1.7e308, min(1.7e308, math.nextafter(old, math.inf if rising else -math.inf)))
        else:
            i = place - len(facts)
            reads[i] = min(1.0, reads[i] + step if rng.random() < 0.5 else math.nextafter(reads[i], 2))
        after = score()
        assert after >= before, (trial, kind, facts, weights, numbers)
        assert 0.0 <= after <= 1.0
        raised += after > before
    assert raised > 2000, "the trials must move scores, or they show nothing"


@pytest.mark.parametrize(
    ("curve", "at"),
    [
        (Linear(0, 30), {-5: 0.0, 0: 0.0, 15: 0.5, 30: 1.0, 99: 1.0}),
        (Linear(1.5, 1.0), {0.2: 1.0, 1.0: 1.0, 1.25: 0.5, 1.5: 0.0, 9: 0.0}),
        (Saturating(3), {-1: 0.0, 0: 0.0, 3: 0.5, 9: 0.75}),
        (Saturating(24, falling=True), {0: 1.0, 24: 0.5, 72: 0.25}),
        (Points(((60, 0.0), (80, 0.5), (90, 0.5), (98, 1.0))), {0: 0.0, 70: 0.25, 84: 0.5, 91: 0.5625, 100: 1.0}),
    ],
)
def test_curves_go_through_their_points_and_saturate(curve: Curve, at: dict[float, float]) -> None:
    assert {x: curve(x) for x in at} == at
    assert curve_from(curve.to_dict()) == curve


def test_a_missing_fact_is_the_declared_neutral_value_and_never_zero() -> None:
    fact = Fact("success", "job_success", Linear(0, 100), missing=0.7)
    for facts in ({}, {"job_success": None}):
        found = fact.measure(facts, {}, "newcomer")
        assert (found.value, found.missing, found.raw) == (0.7, True, None)
    zero = fact.measure({"job_success": 0}, {}, "c")
    assert (zero.value, zero.missing, zero.raw) == (0.0, False, 0.0)
    best, worst = (fact.measure({"job_success": x}, {}, "c").value for x in (100, 0))
    assert worst < 0.7 < best, "a newcomer stands between the worst and the best"
    for missing in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(SurfaceError, match="`missing` is"):
            Fact("success", "job_success", Linear(0, 100), missing=missing)


def test_a_fact_against_one_of_the_job_is_missing_where_the_job_is_silent() -> None:
    fact = Fact("rate", "rate", Linear(1.5, 1.0), missing=0.5, against="budget")
    assert fact.measure({"rate": 50}, {"budget": 40}, "c").raw == 1.25
    assert fact.measure({"rate": 50}, {}, "c").missing
    assert fact.measure({}, {"budget": 40}, "c").missing
    assert fact.source == "rate/job.budget"
    with pytest.raises(InvalidRequest, match=r"job fact `budget` is `0\.0`"):
        fact.measure({"rate": 50}, {"budget": 0}, "c")


@pytest.mark.parametrize("value", ["90", math.nan, math.inf, [90], 10**400, {}])
def test_a_fact_that_is_no_finite_number_is_refused_with_its_place(value: Any) -> None:
    fact = Fact("success", "job_success", Linear(0, 100), missing=0.5)
    with pytest.raises(InvalidRequest, match="fact `job_success` of candidate `c7` is"):
        fact.measure({"job_success": value}, {}, "c7")


def test_a_number_beyond_the_domain_is_refused_and_not_clamped() -> None:
    fact = Fact("success", "job_success", Linear(0, 100), missing=0.5, domain=(0, 100))
    assert fact.measure({"job_success": 100}, {}, "c").value == 1.0
    with pytest.raises(InvalidRequest, match=r"is `101.0` but its domain is \[0, 100\]"):
        fact.measure({"job_success": 101}, {}, "c")


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"worst": 1, "best": 1}, "no slope"),
        ({"worst": -1e308, "best": 1e308}, "no slope"),
        ({"worst": "1", "best": 2}, "`worst` is `'1'`"),
        ({"half": 0}, "must be positive"),
        ({"half": 1, "falling": 1}, "true or false"),
        ({"half": 1, "best": 1}, "declare"),
        ({"points": [[0, 0.5]]}, "needs two"),
        ({"points": [[0, 0.5], [1, 0.2], [2, 0.9]]}, "rises and falls"),
        ({"points": [[1, 0.5], [0, 0.7]]}, "rising order"),
        ({"points": [[0, 0.5], [1, 0.5]]}, "flat"),
        ({"points": [[0, 0.5], [1, 1.5]]}, "from 0 to 1"),
        ({"points": [0, 1]}, "pairs"),
        ("linear", "declare"),
    ],
)
def test_a_curve_that_is_not_monotone_or_not_a_curve_is_refused(declared: Any, says: str) -> None:
    with pytest.raises(SurfaceError, match=says):
        curve_from(declared)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [[sorted(x).index(v) for v in x] for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(*ranks, strict=True)) / (n * (n * n - 1))


def test_a_full_factorial_experiment_over_all_factors_recovers_the_weights() -> None:
    """Every combination of the lowest and the highest value of eight factors; the mean change of the score is the weight."""
    weights = [4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.25]
    scores = {v: aggregate("mean", v, weights)[0] for v in itertools.product((0.0, 1.0), repeat=8)}
    effects = [sum(s if v[i] else -s for v, s in scores.items()) / (len(scores) / 2) for i in range(len(weights))]
    assert spearman(effects, weights) == 1.0
    assert effects == pytest.approx([w / sum(weights) for w in weights])


def test_a_product_lets_a_factor_of_weight_one_rule_out() -> None:
    score, parts = aggregate("product", [0.0, 0.9], [1.0, 0.5])
    assert (score, parts) == (0.0, [0.0, 0.95])
    assert aggregate("product", [0.0, 0.5], [0.5, 1.0])[0] == 0.25
