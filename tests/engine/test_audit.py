"""Audits through the live scorer: no flips with redaction on, flips found where a scorer sees names, stability under rewrites."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uma_engine import Candidate, Engine
from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.calibration import read_calibrations
from uma_engine.ranking.factors import Fact, Linear
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks.candidates import read_candidates

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOB = "We need a Rust engineer.\n\n- Rust\n- Linux\n- databases\n\nWe build tools. Remote work is fine. Start in May."
PEOPLE = [
    Candidate(p.id, p.text[:300], p.facts) for p in read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)
]
SURFACE = Surface(
    "audited",
    facts=(Fact("success", "job_success", Linear(60, 100), missing=0.5),),
    reads=(Read("skills", "Answer {labels}: do the skills match?", weight=3),),
    resolution=0.01,
)


@pytest.fixture
def roomy(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(kv_cache_bytes=16 * 2**20, max_num_batched_tokens=1024)


def test_with_redaction_six_hundred_pairs_flip_nobody_and_without_it_some_do(roomy: Engine) -> None:
    on = roomy.audit.counterfactual(JOB, PEOPLE, surface=SURFACE, pairs=200, top_k=10)
    assert [a.axis for a in on.axes] == ["names", "pronouns", "schools"]
    for axis in on.axes:
        assert (axis.pairs, axis.same_input, axis.flips_in, axis.flips_out) == (200, 200, 0, 0)
        assert axis.largest_change == 0.0, "by construction: the model gets the same tokens"
        assert axis.upper_95 < 0.015
    assert on.flips == ()
    off = roomy.audit.counterfactual(JOB, PEOPLE, surface=SURFACE, pairs=60, top_k=10, redact=False)
    assert off.redact == ()
    for axis in off.axes:
        assert axis.same_input == 0
        assert axis.largest_change > 0.0, "an audit that cannot see a difference shows nothing"
    assert len(off.flips) == sum(a.flips_in + a.flips_out for a in off.axes) > 0
    for flip in off.flips:
        assert (flip.place_first <= 10) != (flip.place_second <= 10)
    assert off == roomy.audit.counterfactual(JOB, PEOPLE, surface=SURFACE, pairs=60, top_k=10, redact=False)
    json.dumps(off.to_dict())


def test_places_of_twins_are_those_that_rank_gives_them(roomy: Engine) -> None:
    """A flip is replayed by hand: the same pool with the one candidate changed."""
    from uma_engine.ranking.identities import Identity, dress

    off = roomy.audit.counterfactual(JOB, PEOPLE, surface=SURFACE, top_k=10, redact=False)
    assert off.flips
    for flip in off.flips[:3]:
        for value, place in ((flip.first, flip.place_first), (flip.second, flip.place_second)):
            changed = [
                Candidate(p.id, *dress(p.text, p.facts, Identity(flip.axis, value, ""))) if p.id == flip.id else p
                for p in PEOPLE
            ]
            order = [r.id for r in roomy.rank(JOB, changed, surface=SURFACE.without_redaction()).results]
            assert order.index(flip.id) + 1 == place


def test_without_a_surface_nothing_is_redacted(roomy: Engine) -> None:
    report = roomy.audit.counterfactual(JOB, PEOPLE[:10], axes=("names",), top_k=3)
    (axis,) = report.axes
    assert (report.redact, axis.same_input, axis.pairs) == ((), 0, 10)
    assert axis.largest_change > 0
    assert sum(axis.mean_change.values()) != 0
    assert all(" -> " in contrast for contrast in axis.mean_change)


def test_rewrites_are_ranked_and_compared(roomy: Engine) -> None:
    report = roomy.audit.paraphrase(
        JOB, PEOPLE, 6, surface=SURFACE, top_k=5, synonyms={"rust engineer": ["Rust developer"]}
    )
    assert len(report.rewrites) == 6
    assert any("synonyms" in r.rules for r in report.rewrites)
    first = report.rewrites[0]
    before, after = (roomy.rank(job, PEOPLE, surface=SURFACE) for job in (JOB, first.text))
    scores = [[r.score for r in answer.all_results] for answer in (before, after)]
    assert first.largest_change == max(abs(a - b) for a, b in zip(*scores, strict=True)) > 0
    assert -1 <= report.lowest_tau <= report.mean_tau < 1
    assert report.flip_rate == pytest.approx(1 - report.mean_overlap)
    assert all(len(r.entered) == len(r.left) for r in report.rewrites)
    assert report == roomy.audit.paraphrase(
        JOB, PEOPLE, 6, surface=SURFACE, top_k=5, synonyms={"rust engineer": ["Rust developer"]}
    )
    facts_only = Surface("facts", facts=SURFACE.facts)
    steady = roomy.audit.paraphrase(JOB, PEOPLE, 4, surface=facts_only)
    assert (steady.lowest_tau, steady.mean_overlap, steady.flip_rate) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "`top_k` is `0`"),
        ({"top_k": 10}, "must be from 1 to 9"),
        ({"pairs": 0}, "`pairs` is `0`"),
        ({"axes": ("age",)}, "`axes` holds `age`"),
        ({"surface": {"name": "x"}}, "has 0 factors"),
    ],
)
def test_bad_arguments_are_typed_errors(engine: Engine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        engine.audit.counterfactual(JOB, PEOPLE[:10], **options)
    with pytest.raises(InvalidRequest, match="gives no rewrites"):
        engine.audit.paraphrase("Rust", PEOPLE[:10])


def test_a_calibration_fitted_through_the_engine_lowers_the_error_and_is_found(roomy: Engine, tmp_path: Path) -> None:
    surface = Surface("s", facts=SURFACE.facts, reads=(Read("skills", weight=2),))
    examples = [(job, p, i % 4 == 0) for job in (JOB, JOB + " Now.") for i, p in enumerate(PEOPLE)]
    found = roomy.calibrate(surface, "skills", examples, method="isotonic", save_to=tmp_path / "c.json")
    assert found.num_examples == 96
    assert found.ece_after < found.ece_before, "a random model is not right by chance"
    assert read_calibrations(tmp_path / "c.json") == [found]
    raw = roomy.rank(JOB, PEOPLE, surface=surface)
    data = surface.to_dict()
    data["reads"][0]["calibration"] = str(tmp_path / "c.json")
    calibrated = roomy.rank(JOB, PEOPLE, surface=data)
    for before, after in zip(raw.all_results, calibrated.all_results, strict=True):
        assert after.ledger[1].value == found(before.ledger[1].logits)  # type: ignore[attr-defined]
    with pytest.raises(SurfaceError, match="no read `skill`"):
        roomy.calibrate(surface, "skill", examples)
    with pytest.raises(InvalidRequest, match="`method` is `platt`"):
        roomy.calibrate(surface, "skills", examples, method="platt")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_examples_run(tiny_dir: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout

    out = run(str(EXAMPLES / "audit.py"), str(tiny_dir)).splitlines()
    assert len([line for line in out if line.startswith("redaction on") and "12 pairs, 0 flips in, 0 out" in line]) == 3
    assert len([line for line in out if line.startswith("redaction off")]) == 3
    assert len([line for line in out if line.startswith("tau ")]) == 8
    assert "48 examples: calibration error" in run(
        str(EXAMPLES / "calibrate.py"), str(tmp_path / "c.json"), str(tiny_dir)
    )
    assert len(read_calibrations(tmp_path / "c.json")) == 1
