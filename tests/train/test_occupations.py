"""Judged jobs from occupation files: who is on which side, what counts as missed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uma_engine.errors import InvalidRequest, InvariantViolation
from uma_engine.train import occupations
from uma_engine.train.groups import Group, Judged, read_groups
from uma_engine.train.occupations import build, split_of

SOCS = {"train": "11-1011.00", "dev": "21-2011.00", "test": "15-1252.00"}


def by_shared_words(texts, corpus, say):
    """A first stage for tests: the corpus by the number of shared words, ties by id; that number is the prior."""
    words = {doc: set(text.lower().split()) for doc, text in corpus.items()}
    shared = [{doc: float(len(words[doc] & set(text.lower().split()))) for doc in corpus} for text in texts]
    return [(sorted(corpus, key=lambda d: (-odds[d], d)), odds) for odds in shared]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three occupations, one a split, and five that answer: `both` is relevant to the training and to the dev occupation."""
    home, onet = tmp_path / "in/esco-onet-crosswalk", tmp_path / "in/onet-29.2"
    home.mkdir(parents=True)
    onet.mkdir()
    corpus = {
        "chief": "leads a company",
        "clergy": "leads a parish",
        "coder": "writes code",
        "both": "leads people",
        "cook": "cooks",
    }
    lines = [json.dumps({"_id": d, "title": d, "text": t}) for d, t in corpus.items()]
    (home / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    queries = [
        {"_id": soc, "title": f"{split} title", "text": "leads and writes", "tasks": [f"{split} task"]}
        for split, soc in SOCS.items()
    ]
    (home / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), encoding="utf-8")
    qrels = [
        ("train", "chief", 3),
        ("train", "both", 2),
        ("dev", "clergy", 3),
        ("dev", "both", 1),
        ("test", "coder", 2),
    ]
    rows = [f"{SOCS[split]}\t{doc}\t{grade}\tmatch" for split, doc, grade in qrels]
    (home / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore\tmatch", *rows]) + "\n", encoding="utf-8")
    tasks = [f"{SOCS['train']}\tStatement number {i}." for i in range(9)]
    (onet / "Task_Statements.txt").write_text("\n".join(["O*NET-SOC Code\tTask", *tasks]) + "\n", encoding="utf-8")
    return tmp_path / "in"


def test_every_occupation_is_on_one_side(source, tmp_path):
    card = build(source, tmp_path / "out", first_stage=by_shared_words)
    assert card["jobs"] == {"train": 4, "dev": 2, "test": 2}  # the training occupation has two further posts
    for split, soc in SOCS.items():
        groups = read_groups(tmp_path / f"out/{split}.jsonl")
        assert {g.id.partition("/")[0] for g in groups} == {soc}
        assert split_of(soc) == split


def test_what_answers_a_dev_job_is_no_candidate_in_training(source, tmp_path):
    build(source, tmp_path / "out", first_stage=by_shared_words)
    for group in read_groups(tmp_path / "out/train.jsonl"):
        assert {c.id: c.grade for c in group.candidates} == {"chief": 3, "cook": 0}


def test_who_fits_and_was_not_found_is_in_the_ideal_order(source, tmp_path, monkeypatch):
    monkeypatch.setattr(occupations, "POOL", 2)
    build(
        source,
        tmp_path / "out",
        first_stage=lambda texts, corpus, say: [(["cook", "both", "clergy"], {}) for _ in texts],
    )
    (group, _) = read_groups(tmp_path / "out/dev.jsonl")
    assert [c.grade for c in group.candidates] == [0, 1]
    assert sorted(group.ideal) == [0, 1, 3]


def test_the_same_files_and_seed_give_the_same_bytes(source, tmp_path):
    cards = [
        build(source, tmp_path / name, seed=seed, first_stage=by_shared_words)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert cards[0] == cards[1]
    assert cards[0]["digests"]["train"] != cards[2]["digests"]["train"]
    assert cards[0]["digests"]["dev"] == cards[2]["digests"]["dev"]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (
            Group("21-2011.00/tasks", "a", (Judged("x", "t", 1), Judged("y", "t", 0))),
            "occupation `21-2011.00` of `dev`",
        ),
        (Group("11-1011.00/tasks", "a", (Judged("x", "t", 1), Judged("both", "t", 0))), "`both` is relevant"),
        (Group("11-1011.00/tasks", "b", (Judged("x", "t", 1), Judged("y", "t", 0))), "text of a job of `dev`"),
    ],
)
def test_leaks_are_refused(train, says):
    dev = Group("21-2011.00/tasks", "b", (Judged("both", "t", 1), Judged("y", "t", 0)))
    with pytest.raises(InvariantViolation, match=says):
        occupations._refuse_leaks({"train": [train], "dev": [dev], "test": []}, {"both"})


def test_missing_files_and_places_are_named(source, tmp_path):
    with pytest.raises(InvalidRequest, match=r"corpus\.jsonl"):
        build(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be made"):
        build(source, tmp_path / "file", first_stage=by_shared_words)
