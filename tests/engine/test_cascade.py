"""Two depths: the same top as without, for less; and what a deadline or a budget leaves out is said."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL
from uma_engine import AsyncEngine, Candidate, Engine
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.bounds import Bounds, margin
from uma_engine.tasks.cascade import recorded_cascade
from uma_engine.tasks.records import differences, read_record, write_json

JOB = "We need a Rust engineer who knows Linux and databases."
WORDS = "rust linux nurse tax postgres cloud paint violin kernel sales excel design music care law".split()  # noqa: SIM905
PREFIX = 16


def people(count: int, seed: int = 0, least: int = 40) -> list[Candidate]:
    rng = random.Random(seed)
    return [Candidate(f"p{n}", " ".join(rng.choices(WORDS, k=least + rng.randrange(40)))) for n in range(count)]


def perfect(engine: Engine, pool: list[Candidate]) -> Bounds:
    """Bounds that hold for everybody in the pool."""
    whole = engine.rank(JOB, pool).all_results
    cheap = engine.rank(JOB, pool, max_tokens_per_candidate=PREFIX).all_results
    differences = [margin(w.logits) - margin(c.logits) for w, c in zip(whole, cheap, strict=True)]
    return Bounds(PREFIX, min(differences), max(differences), 0.99, len(pool))


def test_bounds_that_hold_give_the_same_top(engine: Engine) -> None:
    pool = people(90)
    plain = engine.rank(JOB, pool)
    answer = engine.rank(JOB, pool, top_n=5, cascade=perfect(engine, pool))
    assert [r.id for r in answer.results] == [r.id for r in plain.results[:5]]
    report = answer.cascade
    assert report is not None
    assert sorted([*report.whole, *report.eliminated]) == list(range(90))
    assert report.not_looked_at == ()
    assert report.eliminated, "nobody was left out"
    for index in report.whole:
        assert answer.all_results[index].logits == plain.all_results[index].logits, "the bits of a whole score"
    names = [s.name for s in answer.usage.stages if s.computed_tokens]
    assert names == ["cheap", *["whole"] * report.waves]
    assert "truncated" not in " ".join(answer.warnings)


def test_the_first_tokens_are_not_computed_again(make_engine: object) -> None:
    pool = people(40)
    engine = make_engine(kv_cache_bytes=32 * 2**20)  # type: ignore[operator]
    alone = engine.rank(JOB, pool, top_n=5).usage.computed_tokens
    engine._stack.forget_cached()
    wide = Bounds(PREFIX, -1e9, 1e9, 0.99, 40)
    answer = engine.rank(JOB, pool, top_n=5, cascade=wide)
    assert len(answer.cascade.whole) == 40
    tails = 40 * len(engine._rank_prompt("x").after_candidate)
    assert answer.usage.computed_tokens <= alone + 2 * tails + 40 * 16 + 600, (
        "twice the tails, blocks begun, and the job"
    )
    assert [r.id for r in answer.results] == [r.id for r in engine.rank(JOB, pool, top_n=5).results]


def test_a_deadline_and_a_budget_give_the_best_so_far(engine: Engine) -> None:
    pool = people(200)
    wide = Bounds(PREFIX, -1e9, 1e9, 0.99, 40)
    for options, reason in (({"deadline": 0.02}, "deadline"), ({"budget": 3000}, "budget")):
        answer = engine.rank(JOB, pool, top_n=5, cascade=wide, **options)
        report = answer.cascade
        assert report is not None
        assert report.stopped_by == reason
        assert sorted([*report.whole, *report.eliminated, *report.not_looked_at]) == list(range(200))
        assert report.not_looked_at or report.eliminated
        assert len(answer.results) == 5
        assert len(answer.all_results) == 200 - len(report.not_looked_at)
        assert answer.record["not_looked_at"] == [pool[i].id for i in report.not_looked_at]
        assert any(w.startswith(f"the {reason} ended the ranking") for w in answer.warnings)
    assert answer.usage.computed_tokens <= 3000 + 1500, "a step goes over by less than a step"
    with pytest.raises(InvalidRequest, match="without `cascade`"):
        engine.rank(JOB, pool, budget=10)


def test_a_record_replays_whatever_ended_it(engine: Engine, tmp_path: Path) -> None:
    pool = people(120)
    bounds = perfect(engine, pool)
    for options in ({}, {"budget": 4000}):
        answer = engine.rank(JOB, pool, top_n=6, cascade=bounds, **options)
        write_json(tmp_path / "record.json", answer.record)
        record = read_record(tmp_path / "record.json")
        looked_at = [Candidate(c["id"], c["text"]) for c in record["candidates"]]
        again = engine.rank(record["query"], looked_at, **recorded_cascade(record["options"]))
        assert differences(record, json.loads(json.dumps(again.record))) == []


def test_fitted_bounds_leave_people_out_and_know_their_stack(engine: Engine, tiny_dir: Path, tmp_path: Path) -> None:
    jobs = [(f"{JOB} {n}", people(25, seed=n)) for n in range(4)]
    bounds = engine.fit_cascade(jobs, prefix_tokens=PREFIX, confidence=0.9, save_to=tmp_path / "cascade.json")
    assert bounds.num_pairs == 100
    answer = engine.rank(JOB, people(60, seed=9), top_n=5, cascade=tmp_path / "cascade.json")
    assert answer.cascade is not None
    assert answer.cascade.bounds == bounds

    async def ask() -> list[str]:
        async with AsyncEngine(tiny_dir, **SMALL) as other:
            assert await other.fit_cascade(jobs, prefix_tokens=PREFIX, confidence=0.9) == bounds
            found = await other.rank(JOB, people(60, seed=9), top_n=5, cascade=bounds)
            return [r.id for r in found.results]

    assert asyncio.run(ask()) == [r.id for r in answer.results]
    foreign = Bounds(PREFIX, bounds.low, bounds.high, 0.9, 100, "another base")
    with pytest.raises(InvalidRequest, match="another base or adapter"):
        engine.rank(JOB, people(5), cascade=foreign)


def test_what_does_not_go_together_is_refused(engine: Engine) -> None:
    wide = Bounds(PREFIX, -1.0, 1.0, 0.9, 40)
    for options, words in (
        ({"surface": {"name": "s"}}, "surface"),
        ({"deliberate": 4}, "words or notes"),
        ({"budget": 0}, "`budget`"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            engine.rank(JOB, people(5), cascade=wide, **options)  # type: ignore[arg-type]
    assert engine.rank(JOB, [], cascade=wide).results == ()
    short = engine.rank(JOB, ["Rust", "Nurse"], cascade=wide)
    assert short.cascade is not None
    assert short.cascade.whole == (0, 1), "what fits into the few tokens is read to the end"
    assert short.cascade.waves == 0
