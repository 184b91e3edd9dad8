"""Judged jobs from public occupation data: O*NET occupations ask, ESCO occupations answer, experts' crosswalk judges.

A job is an occupation's title and description, or some of its task statements alone, which reads like a post; candidates
are ESCO occupations, graded 3 (exact match), 2 (close), 1 (narrower or broader), 0. Hard negatives come from the first stage: BM25
and MiniLM, fused by reciprocal rank.

Splits are by SOC major group, so that no occupation is on both sides, and an ESCO occupation that is relevant to a dev or
test job is no candidate in training at all. The dev and test files have the first stage's best `POOL` for each job, as a cascade would
meet them; training jobs have all who fit.

Knows the files of the data sets; does not know training. Sources and licences go into `card.json`.
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest, InvariantViolation, MissingPackage
from uma_engine.train.artifact import write_json
from uma_engine.train.groups import Group, Judged, file_digest, write_groups

__all__ = ["DEV_MAJORS", "TEST_MAJORS", "build", "first_stages", "read_collection", "read_table", "split_of"]

# SOC major groups. 13, 17, 27, 43 and 55 have no jobs in the collection.
DEV_MAJORS = frozenset({"21", "33", "41", "47"})
TEST_MAJORS = frozenset({"15", "29", "35", "49"})
POOL = 100
NEGATIVES = 40  # of a training job
# A text's candidates by id, best first, and log-odds of anybody by id.
Found = tuple[Sequence[str], Mapping[str, float]]
FirstStage = Callable[[Sequence[str], Mapping[str, str], Callable[[str], None]], Sequence[Found]]
TASKS = 6  # statements of a post made of tasks
POSTS = 2  # made of tasks, of each training occupation
RRF = 60
SOURCES = (
    "ESCO-O*NET crosswalk, ESCO Secretariat with the U.S. Department of Labor, 2022 (CC BY 4.0)",
    "ESCO v1.1.1 occupations, European Commission (CC BY 4.0)",
    "O*NET 29.2 Database, U.S. Department of Labor, Employment and Training Administration (CC BY 4.0)",
)


def split_of(soc_code: str) -> str:
    """`train`, `dev` or `test`, by the major group of an O*NET-SOC code."""
    major = soc_code[:2]
    return "dev" if major in DEV_MAJORS else "test" if major in TEST_MAJORS else "train"


def build(
    source: Path,
    out: Path,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    first_stage: FirstStage | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, dev.jsonl, test.jsonl and card.json to `out`; the card. A function of the files and `seed`.

    `first_stage`: for each text the corpus' ids, best first, and log-odds by id, a candidate's `prior`; None: BM25 and MiniLM, fused.
    Errors:  InvalidRequest for files that cannot be read or written; InvariantViolation, and nothing written, if a split leaks
    """
    home, onet = source / "esco-onet-crosswalk", source / "onet-29.2"
    corpus = {d["_id"]: f"{d['title']}. {d['text']}" for d in _lines(home / "corpus.jsonl")}
    queries = {q["_id"]: q for q in _lines(home / "queries.jsonl")}
    grades = _grades(home / "qrels.tsv")
    statements = _statements(onet / "Task_Statements.txt")
    held_out = {doc for soc, judged in grades.items() if split_of(soc) != "train" for doc in judged}
    jobs = list(_jobs(queries, statements, seed))
    say(f"{len(jobs)} jobs over {len(corpus)} occupations; ranking them by BM25 and MiniLM")
    order = (first_stage or _fused)([text for _, _, text in jobs], corpus, say)
    made: dict[str, list[Group]] = {"train": [], "dev": [], "test": []}
    for (soc, form, text), (ranked, priors) in zip(jobs, order, strict=True):
        split, judged = split_of(soc), grades.get(soc, {})
        if split == "train":
            good = [doc for doc in judged if doc in corpus and doc not in held_out]
            if not good:
                continue
            chosen = good + [doc for doc in ranked if doc not in judged and doc not in held_out][:NEGATIVES]
            missed: list[int] = []
        else:
            chosen = list(ranked[:POOL])
            missed = [grade for doc, grade in judged.items() if doc not in chosen]
        candidates = tuple(
            Judged(doc, corpus[doc], judged.get(doc, 0), round(priors.get(doc, 0.0), 3)) for doc in chosen
        )
        made[split].append(Group(f"{soc}/{form}", text, candidates, tuple(missed)))
    _refuse_leaks(made, held_out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"`{out}` cannot be made: {error.strerror}", param="out") from None
    for split, groups in made.items():
        write_groups(out / f"{split}.jsonl", groups)
    card = {
        "sources": list(SOURCES),
        "seed": seed,
        "majors": {"dev": sorted(DEV_MAJORS), "test": sorted(TEST_MAJORS)},
        "jobs": {split: len(groups) for split, groups in made.items()},
        "digests": {split: file_digest(out / f"{split}.jsonl") for split in made},
    }
    write_json(out / "card.json", card)
    return card


def _jobs(
    queries: Mapping[str, Mapping[str, Any]], statements: Mapping[str, Sequence[str]], seed: int
) -> Iterable[tuple[str, str, str]]:
    """(SOC code, form, text) of every job. Dev and test jobs are the collection's own; a training occupation has more posts."""
    for soc, q in queries.items():
        yield soc, "title_text", f"{q['title']}. {q['text']}"
        if q["tasks"]:
            yield soc, "tasks", " ".join(q["tasks"])
        if split_of(soc) == "train":
            known = list(statements.get(soc, ()))
            for number in range(POSTS if len(known) > TASKS else 0):
                chosen = random.Random(f"{seed}:{soc}:{number}").sample(known, TASKS)
                yield soc, f"post{number}", " ".join(chosen)


def _fused(texts: Sequence[str], corpus: Mapping[str, str], say: Callable[[str], None]) -> list[Found]:
    stages = first_stages(texts, corpus, say)
    return list(zip(stages.fused, stages.priors, strict=True))


@dataclass(frozen=True)
class FirstStages:
    """For each text the corpus' ids, best first: by words, by vectors, and by their reciprocal-rank fusion, each the best 2 * POOL; and the
    log-odds of everybody, which grow with the cosine and with the share of the best BM25 score."""

    bm25: list[list[str]]
    minilm: list[list[str]]
    fused: list[list[str]]
    priors: list[dict[str, float]]


def first_stages(
    texts: Sequence[str], corpus: Mapping[str, str], say: Callable[[str], None] = lambda line: None
) -> FirstStages:
    """Rank the corpus for every text. Errors: MissingPackage"""
    try:
        import bm25s
        import numpy as np

        from uma_engine.retrieval.embedder import Embedder
        from uma_engine.retrieval.prior import log_odds
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[retrieval]'`"
        ) from None
    ids, depth = list(corpus), min(2 * POOL, len(corpus))
    bm25 = bm25s.BM25(k1=0.9, b=0.4)
    bm25.index(bm25s.tokenize(list(corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    asked_words = bm25s.tokenize(list(texts), stopwords="en", show_progress=False, return_ids=False)
    with Embedder() as embedder:
        documents = embedder.embed(list(corpus.values())).vectors
        say("corpus embedded")
        asked = embedder.embed(list(texts)).vectors
    found = FirstStages([], [], [], [])
    for words, vector in zip(asked_words, asked, strict=True):
        cosines = documents @ vector
        scores = bm25.get_scores(words) if words else np.zeros(len(ids), np.float32)
        near, by_words = (np.argsort(-x, kind="stable")[:depth] for x in (cosines, scores))
        fused: dict[int, float] = defaultdict(float)
        for ranking in (by_words, near):
            for place, doc in enumerate(ranking):
                fused[int(doc)] += 1 / (RRF + place + 1)
        found.bm25.append([ids[doc] for doc in by_words])
        found.minilm.append([ids[doc] for doc in near])
        found.fused.append([ids[doc] for doc in sorted(fused, key=lambda d: (-fused[d], d))])
        odds = log_odds(cosines, scores / max(float(scores.max()), 1e-6))
        found.priors.append(dict(zip(ids, map(float, odds), strict=True)))
    return found


def read_collection(source: Path) -> tuple[dict[str, str], list[tuple[str, str]], dict[str, dict[str, int]]]:
    """The crosswalk collection below `source`: documents by id, (SOC code/form, text) of every query, grades by SOC code.

    Errors:  InvalidRequest
    """
    home = source / "esco-onet-crosswalk"
    corpus = {d["_id"]: f"{d['title']}. {d['text']}" for d in _lines(home / "corpus.jsonl")}
    queries = []
    for q in _lines(home / "queries.jsonl"):
        queries.append((f"{q['_id']}/title_text", f"{q['title']}. {q['text']}"))
        if q["tasks"]:
            queries.append((f"{q['_id']}/tasks", " ".join(q["tasks"])))
    return corpus, queries, _grades(home / "qrels.tsv")


def _refuse_leaks(made: Mapping[str, Sequence[Group]], held_out: set[str]) -> None:
    """InvariantViolation if an occupation or a job's text of dev or test, or an answer to it, is in the training data."""
    occupations = {split: {g.id.partition("/")[0] for g in groups} for split, groups in made.items()}
    for split in ("dev", "test"):
        if both := occupations["train"] & occupations[split]:
            raise InvariantViolation(f"occupation `{min(both)}` of `{split}` is in the training data")
        if {g.job for g in made["train"]} & {g.job for g in made[split]}:
            raise InvariantViolation(f"the text of a job of `{split}` is in the training data")
    if both := held_out & {c.id for g in made["train"] for c in g.candidates}:
        raise InvariantViolation(f"`{min(both)}` is relevant to a dev or test job and in the training data")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"`{path}` cannot be read: {error}", hint="`--source` holds the data sets", param="source"
        ) from None


def _grades(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for row in read_table(path):
        found[row["query-id"]][row["corpus-id"]] = int(row["score"])
    return found


def _statements(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in read_table(path):
        found[row["O*NET-SOC Code"]].append(row["Task"])
    return found


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a file whose fields are parted by tabs. Errors: InvalidRequest"""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}", param="source") from None
