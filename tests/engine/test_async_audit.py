"""Audits and calibration on the asynchronous face: the same reports as on the other, and nothing left when a task is cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL, assert_idle
from uma_engine import AsyncEngine, Candidate, Engine
from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.calibration import read_calibrations
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks.candidates import read_candidates

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOB = "We need a Rust engineer.\n\n- Rust\n- Linux\n- databases\n\nWe build tools. Remote work is fine. Start in May."
PEOPLE = [
    Candidate(p.id, p.text[:200], p.facts) for p in read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)
][:12]
SURFACE = Surface("audited", reads=(Read("skills", "Answer {labels}: do the skills match?"),), resolution=0.01)
JUDGED = [(JOB, person, index % 3 == 0) for index, person in enumerate(PEOPLE * 3)]


def test_both_faces_give_the_same_reports(engine: Engine, tiny_dir: Path, tmp_path: Path) -> None:
    plan = {"surface": SURFACE, "top_k": 3}
    expected = (
        engine.audit.counterfactual(JOB, PEOPLE, redact=False, pairs=8, **plan),
        engine.audit.paraphrase(JOB, PEOPLE, 4, **plan),
        engine.calibrate(SURFACE, "skills", JUDGED, method="isotonic"),
    )

    async def ask() -> None:
        async with await AsyncEngine.create(tiny_dir, **SMALL) as aengine:
            found = await asyncio.gather(
                aengine.audit.counterfactual(JOB, PEOPLE, redact=False, pairs=8, **plan),
                aengine.audit.paraphrase(JOB, PEOPLE, 4, **plan),
                aengine.calibrate(SURFACE, "skills", JUDGED, method="isotonic", save_to=tmp_path / "c.json"),
            )
            assert tuple(found) == expected
            assert read_calibrations(tmp_path / "c.json") == [expected[2]]
            assert_idle(aengine)

    asyncio.run(ask())


def test_errors_come_through_and_options_go_to_rank(engine: Engine, tiny_dir: Path) -> None:
    async def ask() -> None:
        async with await AsyncEngine.create(tiny_dir, **SMALL) as aengine:
            with pytest.raises(InvalidRequest, match="gives no rewrites"):
                await aengine.audit.paraphrase("Rust", PEOPLE)
            with pytest.raises(InvalidRequest, match="`top_k`"):
                await aengine.audit.counterfactual(JOB, PEOPLE, top_k=12)
            with pytest.raises(SurfaceError, match="has no read `x`"):
                await aengine.calibrate(SURFACE, "x", JUDGED)
            with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
                await aengine.audit.paraphrase(JOB, PEOPLE, no_such=1)
            short = await aengine.audit.paraphrase(JOB, PEOPLE, 2, max_tokens_per_candidate=5)
            assert short == engine.audit.paraphrase(JOB, PEOPLE, 2, max_tokens_per_candidate=5)
            assert short != engine.audit.paraphrase(JOB, PEOPLE, 2)
            assert_idle(aengine)

    asyncio.run(ask())
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        engine.audit.counterfactual(JOB, PEOPLE, no_such=1)


def test_a_cancelled_audit_leaves_nothing_behind_and_the_loop_was_free_meanwhile(tiny_dir: Path) -> None:
    async def ask() -> None:
        async with await AsyncEngine.create(tiny_dir, **SMALL) as aengine:
            ticks = 0
            task = asyncio.create_task(aengine.audit.counterfactual(JOB, PEOPLE, pairs=2000, surface=SURFACE, top_k=3))
            while ticks < 10:
                await asyncio.sleep(0.01)
                ticks += 1
            assert not task.done(), "else there is nothing to cancel"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(500):
                if not aengine._stack.scheduler.has_unfinished() and not aengine._stack.block_pool.num_used:
                    break
                await asyncio.sleep(0.01)
            assert_idle(aengine)
            assert len((await aengine.rank(JOB, PEOPLE)).results) == 12

    asyncio.run(ask())
