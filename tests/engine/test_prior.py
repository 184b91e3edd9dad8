"""Priors: what is known before reading is added to what the model reads, shown, recorded and asked again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from uma_engine import Candidate, Engine
from uma_engine.cli.main import main
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.candidates import read_candidates

JOB = "Somebody who knows Rust."
TEXTS = ("Ten years of Rust.", "A careful nurse.", "Paints walls.", "Databases and Rust.")
PRIORS = (-1.5, 0.25, 3.0, 0.0)


def people(priors: tuple[float, ...] = PRIORS) -> list[Candidate]:
    return [Candidate(str(i), text, prior=p) for i, (text, p) in enumerate(zip(TEXTS, priors, strict=True))]


def test_the_score_is_the_odds_of_both(engine: Engine) -> None:
    plain = engine.rank(JOB, people((0.0,) * 4))
    answer = engine.rank(JOB, people())
    for before, after, prior in zip(plain.all_results, answer.all_results, PRIORS, strict=True):
        assert before.logits == after.logits, "the model reads the same"
        odds = after.logits[0] - after.logits[1] + prior
        assert after.score == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-12)
        assert after.score == before.score if prior == 0 else after.score != before.score
        assert sum(f.contribution for f in after.ledger) == after.score, "what the ledger adds up to"
        assert [f.name for f in after.ledger] == ["read:yes", "prior"][: 1 + bool(prior)]
    by_odds = sorted(
        range(4), key=lambda i: -(plain.all_results[i].logits[0] - plain.all_results[i].logits[1] + PRIORS[i])
    )
    assert [r.index for r in answer.results] == by_odds


def test_a_higher_prior_never_lowers_a_score(engine: Engine) -> None:
    low, high = engine.rank(JOB, people()), engine.rank(JOB, people(tuple(p + 0.5 for p in PRIORS)))
    assert all(a.score < b.score for a, b in zip(low.all_results, high.all_results, strict=True))
    extreme = engine.rank(JOB, people((-1e6, 1e6, 800.0, -800.0)))
    assert [r.score for r in extreme.all_results] == pytest.approx([0.0, 1.0, 1.0, 0.0])


def test_what_a_prior_may_be(engine: Engine) -> None:
    for bad in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(InvalidRequest, match="prior"):
            Candidate("a", "text", prior=bad)  # type: ignore[arg-type]
    surface = {"name": "s", "redact": [], "reads": [{"name": "fit", "probe": "Answer {labels}: does it fit?"}]}
    with pytest.raises(InvalidRequest, match="beside a surface"):
        engine.rank(JOB, people(), surface=surface)


def test_files_have_priors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "prior": -1.5}\n{"text": "y", "prior": null}\n')
    (tmp_path / "a.csv").write_text("text,prior\nx,-1.5\ny,\n")
    for name in ("a.jsonl", "a.csv"):
        found = read_candidates(tmp_path / name)
        assert [c.prior for c in found] == [-1.5, 0.0]
        assert "prior" not in found[0].facts
    for bad in ('"high"', "true", "[1]"):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "prior": {bad}}}\n')
        with pytest.raises(InvalidRequest, match="prior"):
            read_candidates(tmp_path / "a.jsonl")


def test_a_record_replays_with_them(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": c.id, "text": c.text, "prior": c.prior} for c in people()]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "job.md").write_text(JOB)
    files = [str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")]
    model = ["--model", str(tiny_dir)]
    assert main(["rank", *files, *model, "--record", str(tmp_path / "r.json")]) == 0
    assert main(["replay", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert [c.get("prior", 0.0) for c in record["candidates"]] == list(PRIORS)
    record["candidates"][0]["prior"] = -1.25
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "r.json")]) == 1
    log = ["--log", str(tmp_path / "log.uma"), "--log-content", "digest"]
    assert main(["rank", *files, *model, *log]) == 0
    given = ["--job", files[0], "--candidates", files[1]]
    assert main(["replay", str(tmp_path / "log.uma"), "--all", *given]) == 0
    capsys.readouterr()


def test_a_cascade_counts_on_them(engine: Engine) -> None:
    """Who is far behind by the prior is not read to the end; the top is that of the whole ranking."""
    texts = [f"A person who knows {'Rust' if i % 3 else 'Go'} and has done {i} jobs. " * 8 for i in range(40)]
    priors = np.random.default_rng(3).normal(0, 4, 40)
    crowd = [Candidate(str(i), t, prior=float(p)) for i, (t, p) in enumerate(zip(texts, priors, strict=True))]
    bounds = engine.fit_cascade([(JOB, texts)], prefix_tokens=8, confidence=0.9)
    whole = engine.rank(JOB, crowd, top_n=5)
    answer = engine.rank(JOB, crowd, top_n=5, cascade=bounds)
    assert answer.cascade is not None
    assert len(answer.cascade.whole) < 25
    assert [(r.id, r.score) for r in answer.results] == [(r.id, r.score) for r in whole.results]


def test_a_cascade_on_priors_alone(engine: Engine) -> None:
    texts = [f"A person who knows {'Rust' if i % 3 else 'Go'} and has done {i} jobs. " * 4 for i in range(60)]
    priors = np.random.default_rng(5).normal(0, 8, 60)
    crowd = [Candidate(str(i), t, prior=float(p)) for i, (t, p) in enumerate(zip(texts, priors, strict=True))]
    bounds = engine.fit_cascade([(JOB, texts)], prefix_tokens=0, confidence=0.9)
    margins = [r.logits[0] - r.logits[1] for r in engine.rank(JOB, texts).all_results]
    assert min(margins) <= bounds.low < bounds.high <= max(margins)
    whole, answer = engine.rank(JOB, crowd, top_n=5), engine.rank(JOB, crowd, top_n=5, cascade=bounds)
    report = answer.cascade
    assert report is not None
    assert [(r.id, r.score) for r in answer.results] == [(r.id, r.score) for r in whole.results]
    assert len(report.whole) < 30
    assert sorted(report.whole + report.eliminated) == list(range(60))
    assert [r.index for r in answer.all_results] == list(report.whole)
    assert answer.usage.computed_tokens < 0.6 * whole.usage.computed_tokens
    assert answer.record["left_out"] == [crowd[i].id for i in report.eliminated]
    short = engine.rank(JOB, crowd, top_n=5, cascade=bounds, budget=1)
    assert short.cascade is not None
    assert short.cascade.stopped_by == "budget"
    assert len(short.cascade.whole) + len(short.cascade.eliminated) + len(short.cascade.not_looked_at) == 60


def test_the_first_stage_gives_them(tmp_path: Path, engine: Engine) -> None:
    pytest.importorskip("bm25s")
    from tests.retrieval.test_index import Hashed
    from uma_engine.retrieval import CandidateIndex
    from uma_engine.retrieval.prior import OFFSET, log_odds, with_priors

    crowd = [Candidate(str(i), t) for i, t in enumerate(TEXTS)]
    embedder = Hashed()
    with CandidateIndex(tmp_path / "index", embedder=embedder) as index:
        index.add(crowd)
        index.commit()
        found = index.search("Rust databases", 4)
        answer = engine.match("Rust databases", index, first=4, blend=True)
        apart = engine.match("Rust databases", index, first=4)
        with pytest.raises(InvalidRequest, match="prior"):
            index.add([Candidate("z", "text", prior=1.0)])
    assert found.hits[0].prior == max(h.prior for h in found.hits)
    asked = embedder.embed(["Rust databases"]).vectors[0]
    for hit, result in zip(found.hits, answer.ranking.all_results, strict=True):
        cosine = float(embedder.embed([hit.candidate.text]).vectors[0].astype(np.float16).astype(np.float32) @ asked)
        assert log_odds(cosine, 0) - 1e-3 <= hit.prior <= log_odds(cosine, 1) + 1e-3
        assert result.ledger[-1].name == "prior"
        assert result.ledger[-1].value == hit.prior
    assert all(f.name != "prior" for r in apart.results for f in r.ledger)
    by_id = {h.candidate.id: h.prior for h in found.hits}
    for person in with_priors("Rust databases", crowd, embedder):
        if person.id in by_id:
            assert person.prior == pytest.approx(by_id[person.id], abs=0.02)
    assert with_priors("of the", ["x"], embedder)[0].prior >= -OFFSET - 10
    with pytest.raises(InvalidRequest):
        with_priors(" ", ["x"], embedder)
