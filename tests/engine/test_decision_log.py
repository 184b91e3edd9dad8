"""The decision log of an engine: every ranking is in it, with and without a surface, and forgetting reaches the caches."""

from __future__ import annotations

import asyncio

import pytest

from uma_engine import AsyncEngine, Candidate
from uma_engine.errors import EngineUnavailable, InvalidRequest
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks.decision_log import DecisionLog
from uma_engine.tasks.records import differences

from .conftest import SMALL

PEOPLE = [Candidate(f"person-number-{i}", f"A distinctive life of {i} in some trade", {"years": i}) for i in range(4)]
SURFACE = Surface(
    "test", reads=(Read("fit", "Answer {labels}: does it fit?"), Read("tone", "Answer {labels}: is it kind?"))
)


@pytest.fixture
def logged(make_engine, tmp_path):
    return make_engine(decision_log=tmp_path / "log")


def test_every_ranking_is_logged(logged):
    answers = [
        logged.rank("A job", PEOPLE),
        logged.rank("A job", PEOPLE, surface=SURFACE, top_n=2),
        logged.rank("B", []),
    ]
    log = logged.decision_log
    assert [e.id for e in log.entries()] == [a.receipt.id for a in answers]
    assert log.verify([a.receipt for a in answers]).ok
    for answer in answers:
        stored = log.record(answer.receipt.id)
        assert differences(answer.record, stored) == []
        assert answer.to_dict()["receipt"]["chain"] == answer.receipt.chain


def test_without_a_log_there_is_no_receipt(engine):
    assert engine.rank("A job", PEOPLE).receipt is None
    with pytest.raises(InvalidRequest, match="no decision log"):
        engine.forget("person-number-1")


def test_a_decision_that_cannot_be_logged_is_not_given(logged):
    logged.decision_log._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(EngineUnavailable, match="cannot be written"):
        logged.rank("A job", PEOPLE)
    logged.decision_log._connection.execute("PRAGMA query_only = OFF")
    assert logged.rank("A job", PEOPLE).receipt.sequence == 1


def test_forgetting_empties_the_prefix_cache_and_changes_no_score(logged, tmp_path):
    before = logged.rank("A job", PEOPLE, surface=SURFACE)
    warm = logged.rank("A job", PEOPLE[:2], surface=SURFACE).usage.cached_tokens
    logged.forget("person-number-2")
    assert logged._stack.block_pool.num_cached == 0
    again = logged.rank("A job", PEOPLE[:2], surface=SURFACE)
    assert again.usage.cached_tokens < warm // 2  # siblings that begin alike share a block within the call
    assert [r.logits for r in again.all_results] == [r.logits for r in before.all_results[:2]]
    data = b"".join(f.read_bytes() for f in tmp_path.glob("log*"))
    assert b"A distinctive life of 2" not in data
    assert b"A distinctive life of 1" in data


def test_what_is_left_after_forgetting_is_recomputed_bit_for_bit(logged):
    answer = logged.rank("A job", PEOPLE, surface=SURFACE)
    logged.forget("person-number-0")
    record = logged.decision_log.record(answer.receipt.id)
    people = [Candidate(c["id"], c["text"], c["facts"]) for c in record["candidates"]]
    again = logged.rank(record["query"], people, surface=record["options"]["surface"], job_facts={}).record
    assert differences(record, again, alone=True) == []


def test_the_asynchronous_face_logs_too(tiny_dir, tmp_path):
    async def go() -> None:
        async with await AsyncEngine.create(tiny_dir, decision_log=tmp_path / "log", **SMALL) as engine:
            answers = await asyncio.gather(*(engine.rank(f"Job {i}", PEOPLE) for i in range(5)))
            assert engine.decision_log.verify([a.receipt for a in answers]).ok

    asyncio.run(go())
    log = DecisionLog(tmp_path / "log", create=False)
    assert len(list(log.entries())) == 5
    log.close()


def test_a_bad_log_stops_the_engine_from_starting(make_engine, tmp_path):
    (tmp_path / "log").write_text("not a database" * 100)
    with pytest.raises(InvalidRequest, match="cannot be used as a decision log"):
        make_engine(decision_log=tmp_path / "log")
    with pytest.raises(InvalidRequest, match="must be a path"):
        make_engine(decision_log=3)
