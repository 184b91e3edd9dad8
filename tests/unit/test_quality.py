"""The quality bench on a small collection: its measure is ours, a run that was stopped goes on, rows say what they must."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench import quality
from tests.tiny import make_tiny_model
from uma_engine.ranking.metrics import ndcg

pytest.importorskip("ir_measures")
WORDS = "rust nurse tax paint violin kernel sales excel law music care linux".split()  # noqa: SIM905


def test_the_measure_is_that_of_training() -> None:
    rng = random.Random(0)
    qrels = {f"q{n}": {f"d{d}": rng.choice([0, 0, 1, 2, 3]) for d in range(20)} for n in range(30)}
    qrels["q0"] = {"d1": 3}
    run = {q: rng.sample([f"d{d}" for d in range(25)], 15) for q in qrels}
    found = quality.ndcg_of(run, qrels)
    for q, docs in run.items():
        expected = ndcg([qrels[q].get(d, 0) for d in docs], list(qrels[q].values()))
        assert found[q] == pytest.approx(expected, abs=1e-6), q


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(quality, "KEPT", tmp_path / "kept")
    rng = random.Random(1)
    corpus = {f"d{n}": " ".join(rng.choices(WORDS, k=9)) for n in range(30)}
    queries = [quality.Query(f"15-{n}/tasks", " ".join(rng.choices(WORDS, k=6))) for n in range(6)]
    pools = {q.id: rng.sample(list(corpus), 8) for q in queries}
    whole = quality.model_run(str(model), None, queries, pools, corpus, "near")
    (kept,) = (tmp_path / "kept").glob("*.jsonl")
    lines = kept.read_text().splitlines()
    assert len(lines) == 6
    kept.write_text("\n".join(lines[:4]) + "\n")
    assert quality.model_run(str(model), None, queries, pools, corpus, "near") == whole
    assert sorted(map(str, kept.read_text().splitlines()[:4])) == sorted(lines[:4]), (
        "what was there is not computed again"
    )
    for q in queries:
        scores = next(row["scores"] for row in map(json.loads, lines) if row["id"] == q.id)
        assert whole[q.id] == scores
    order = quality.ordered(pools, queries, whole)
    assert all([whole[q.id][d] for d in order[q.id]] == sorted(whole[q.id].values(), reverse=True) for q in queries)


def test_rows_have_intervals_by_form() -> None:
    queries = [quality.Query(f"{major}-{n}/{form}", "x") for major in (15, 29) for n in range(8) for form in ("a", "b")]
    fused = {q.id: 0.5 for q in queries}
    better = {q.id: 0.6 if q.major == "15" else 0.4 for q in queries}
    rows = list(quality.rows_of("tuned", better, {"fused": fused, "minilm": fused}, queries))
    assert [(r["form"], r["queries"], r["ndcg_10"]) for r in rows] == [("a", 16, 0.5), ("b", 16, 0.5)]
    assert rows[0]["worst_major_over_fused"] == -0.1
    mean, low, high = rows[0]["over_minilm"]
    assert low < mean < high
    assert mean == 0


def test_a_rows_command_names_no_place_of_a_machine() -> None:
    from bench.rows import ROOT, without_place

    assert without_place("/somewhere/data") == "data"
    assert without_place("tuned=/somewhere/out") == "tuned=out"
    assert without_place(f"--data={ROOT}/examples/data") == "--data=examples/data"
    assert [without_place(a) for a in ("--jobs", "60", "a/b", "x=1")] == ["--jobs", "60", "a/b", "x=1"]


def test_related_occupations_are_graded_by_tier(tmp_path: Path) -> None:
    home = tmp_path / "onet-29.2"
    home.mkdir()
    (home / "Occupation_Data.txt").write_text(
        'O*NET-SOC Code\tTitle\tDescription\n15-1.00\tCoders\tWrite "code".\n15-2.00\tTesters\tTest.\n29-1.00\tNurses\tCare.\n'
    )
    statements = [f"15-1.00\t{n}\tTask {n}." for n in range(8)] + ["15-2.00\t9\tOnly one."]
    (home / "Task_Statements.txt").write_text("\n".join(["O*NET-SOC Code\tTask ID\tTask", *statements]))
    (home / "Related_Occupations.txt").write_text(
        "O*NET-SOC Code\tRelated O*NET-SOC Code\tRelatedness Tier\tIndex\n"
        "15-1.00\t15-2.00\tPrimary-Short\t1\n15-1.00\t29-1.00\tSupplemental\t2\n15-2.00\t15-1.00\tPrimary-Long\t1\n"
    )
    corpus, queries, grades = quality.read_related(tmp_path)
    assert corpus["15-1.00"] == 'Coders. Write "code".'
    assert grades == {"15-1.00": {"15-2.00": 3, "29-1.00": 1}, "15-2.00": {"15-1.00": 2}}
    assert dict(queries)["15-1.00/tasks"].startswith("Task 0. Task 1.")
    assert [name for name, _ in queries] == ["15-1.00/title_text", "15-2.00/title_text", "15-1.00/tasks"]
