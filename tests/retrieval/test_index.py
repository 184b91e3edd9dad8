"""The index against what it should be: an oracle that scores everybody, filters one by one, kills at any moment, forgotten people."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uma_engine.core import Candidate
from uma_engine.errors import CorruptFile, InvalidRequest
from uma_engine.retrieval import CandidateIndex, Embedder, Embeddings
from uma_engine.retrieval.filters import columns_of
from uma_engine.retrieval.generation import K1, B

pytest.importorskip("bm25s")
WORDS = ("rust python nurse tax ledger linux postgres design logo sales kernel cloud excel paint violin").split()  # noqa: SIM905
COUNTRIES = ("DE", "AT", "PL")


class Hashed:
    """An embedder of its own kind: a word is a direction, a text the sum of its words."""

    dim = 32

    def __init__(self, name: str = "hashed") -> None:
        self.digest = hashlib.sha256(name.encode()).hexdigest()
        self.num_texts = 0

    def embed(self, texts: Sequence[str]) -> Embeddings:
        self.num_texts += len(texts)
        rows = np.array([sum((self._of(w) for w in text.lower().split()), np.zeros(self.dim)) for text in texts])
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        return Embeddings(rows.astype(np.float32), np.zeros(len(texts), np.int64))

    def _of(self, word: str) -> np.ndarray:
        return np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).standard_normal(self.dim)


def people(count: int, seed: int = 0) -> list[Candidate]:
    rng = random.Random(seed)
    found = []
    for n in range(count):
        facts: dict[str, Any] = {
            "rate": rng.randrange(10, 90),
            "country": rng.choice(COUNTRIES),
            "remote": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            del facts["rate"]
        found.append(Candidate(f"c{n}", " ".join(rng.choices(WORDS, k=rng.randrange(3, 12))), facts))
    return found


def oracle(query: str, pool: Sequence[Candidate], embedder: Hashed | None, first: int) -> list[str]:
    """Reciprocal rank fusion of BM25 as Lucene has it and of inner products, everybody scored."""
    texts = [Counter(p.text.split()) for p in pool]
    lengths = [sum(t.values()) for t in texts]
    mean = sum(lengths) / len(lengths)
    words = []
    for counts, length in zip(texts, lengths, strict=True):
        score = 0.0
        for word in query.split():
            df = sum(word in t for t in texts)
            idf = math.log(1 + (len(pool) - df + 0.5) / (df + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + K1 * (1 - B + B * length / mean))
        words.append(score)
    rankings = [sorted((i for i in range(len(pool)) if words[i] > 0), key=lambda i: (-round(words[i], 5), i))]
    if embedder is not None:
        near = embedder.embed([p.text for p in pool]).vectors.astype(np.float16).astype(np.float32)
        similar = near @ embedder.embed([query]).vectors[0]
        rankings.append(sorted(range(len(pool)), key=lambda i: (-similar[i], i)))
    fused: dict[int, float] = {}
    for ranking in rankings:
        for place, i in enumerate(ranking[: max(2 * first, 100)], start=1):
            fused[i] = fused.get(i, 0.0) + 1 / (60 + place)
    return [pool[i].id for i in sorted(fused, key=lambda i: (-fused[i], i))[:first]]


@pytest.mark.parametrize("embedder", [Hashed(), None], ids=["fused", "words"])
def test_a_search_finds_what_the_oracle_finds(tmp_path: Path, embedder: Hashed | None) -> None:
    pool = people(400)
    with CandidateIndex(tmp_path / "index", embedder) as index:  # type: ignore[arg-type]
        assert index.add(pool) == (400, 0)
        assert index.commit() == 1
        for query in ("rust linux kernel", "nurse", "violin paint paint", "excel ledger tax sales"):
            found = index.search(query, 20)
            assert [h.candidate.id for h in found.hits] == oracle(query, pool, embedder, 20), query
            assert found.hits[0].candidate == next(p for p in pool if p.id == found.hits[0].candidate.id)
            assert (found.cut.considered, found.cut.filtered, found.cut.index_version) == (400, 0, 1)
        again = index.search("nurse", 20)
    with CandidateIndex.open(tmp_path / "index", embedder) as opened:  # type: ignore[arg-type]
        assert opened.search("nurse", 20) == again, "the same from the disk"


@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({"rate": {"<=": 60}}, lambda f: f.get("rate", 99) <= 60),
        ({"rate": {">": 20, "<": 50}}, lambda f: 20 < f.get("rate", 0) < 50),
        ({"rate": {"<=": 60, "or_missing": True}}, lambda f: f.get("rate", 0) <= 60),
        ({"country": ["DE", "PL"]}, lambda f: f["country"] in ("DE", "PL")),
        ({"country": "FR"}, lambda f: False),
        ({"country": {"!=": "DE"}, "remote": True}, lambda f: f["country"] != "DE" and f["remote"]),
        ({"rate": {"in": [20, 21, 22, 23]}}, lambda f: f.get("rate") in (20, 21, 22, 23)),
    ],
)  # fmt: skip
def test_filters_let_through_who_should_pass(tmp_path: Path, where: dict[str, Any], passes: Any) -> None:
    pool = people(150, seed=1)
    with CandidateIndex(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
        index.add(pool)
        index.commit()
        found = index.search("rust", 150, where=where)
    expected = {p.id for p in pool if passes(p.facts)}
    assert {h.candidate.id for h in found.hits} == expected
    assert found.cut.considered == len(expected)
    assert found.cut.filtered == 150 - len(expected)
    assert found.cut.measured_recall == 1.0, "nobody was cut"


def test_bad_filters_and_questions_are_refused_in_words(tmp_path: Path) -> None:
    with CandidateIndex(tmp_path, None) as index:
        with pytest.raises(InvalidRequest, match="nothing to search"):
            index.search("rust")
        index.add(people(5))
        index.commit()
        for where, words in (
            ({"salary": 3}, "nobody in the index has a field"),
            ({"rate": {"~": 3}}, "no comparison"),
            ({"rate": {"<": "x"}}, "cannot be compared"),
            ({"country": {"<": "DE"}}, "cannot be compared"),
            ({"rate": {"<": math.inf}}, "compares with"),
            ({"rate": {}}, "compares with nothing"),
            ("rate<3", "must be a mapping"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                index.search("rust", where=where)  # type: ignore[arg-type]
        for options, words in (
            ({"first": 0}, "`first`"),
            ({"recall": 0.9}, "never measured"),
            ({"first": 3, "recall": 0.9}, "are given"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                index.search("rust", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="blank"):
            index.search("  ")
        index.add([Candidate("odd", "odd", {"rate": "cheap"})])
        with pytest.raises(InvalidRequest, match=r"field `rate` is a number for candidate `c\d` but a text for `odd`"):
            index.commit()
        assert [h.candidate.id for h in index.search("rust python nurse tax", 9).hits], "the old version is still there"
    with pytest.raises(InvalidRequest, match="is not an index"):
        CandidateIndex.open(tmp_path / "nowhere")


def test_changes_cost_what_has_changed(tmp_path: Path) -> None:
    pool, embedder = people(60), Hashed()
    with CandidateIndex(tmp_path, embedder) as index:  # type: ignore[arg-type]
        index.add(pool)
        index.commit()
        assert embedder.num_texts == 60
        changed = Candidate("c3", "violin violin violin", {"rate": 50})
        assert index.add([changed, pool[5], Candidate("new", "a harp and a violin")]) == (1, 1)
        assert (index.info().pending, index.info().version) == (2, 1)
        assert index.commit() == 2
        assert embedder.num_texts == 62, "texts that have not changed keep their vectors"
        assert index.get("c3") == changed
        assert index.search("violin", 1).hits[0].candidate.id == "c3"
        assert index.info().pending == 0
    with pytest.raises(InvalidRequest, match="another embedder"):
        CandidateIndex(tmp_path, Hashed("other"))  # type: ignore[arg-type]


def test_who_is_deleted_is_gone_at_once_and_then_for_good(tmp_path: Path) -> None:
    secret = "zyxwvut qwertyzz"
    with CandidateIndex(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
        index.add([*people(30), Candidate("x", f"rust {secret}", {"country": "secretland"})])
        index.commit()
        assert index.search("zyxwvut", 1).hits[0].candidate.id == "x"
        assert index.delete("x") == 1
        assert index.delete(["x", "nobody"]) == 0
        assert "x" not in {h.candidate.id for h in index.search("zyxwvut rust", 31).hits}
        index.commit()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(word.encode() in data for word in (*secret.split(), "secretland")), path
    with CandidateIndex.open(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
        assert len(index) == 30
        assert index.get("x") is None


def test_the_recall_of_a_cut_is_measured_and_chosen(tmp_path: Path) -> None:
    pool = people(300, seed=2)
    with CandidateIndex(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
        index.add(pool)
        index.commit()
        examples = [(w, [p.id for p in pool if p.text.split().count(w) >= 2]) for w in WORDS]
        curve = index.measure(examples)
        assert list(curve.values()) == sorted(curve.values()), "a deeper cut keeps more"
        least = next(depth for depth, recall in curve.items() if recall >= 0.9)
        found = index.search("rust", recall=0.9)
        assert found.cut.first == least
        assert found.cut.measured_recall == curve[least] >= 0.9
        assert found.cut.measured_on == len(WORDS)
        with pytest.raises(InvalidRequest, match="no example"):
            index.measure([("rust", [])])


CHILD = """
import sys
from pathlib import Path
from tests.retrieval.test_index import Hashed, people
from uma_engine.core import Candidate
from uma_engine.retrieval import CandidateIndex
index = CandidateIndex(Path(sys.argv[1]), Hashed())
start = len(index)
for n in range(start, start + 1000):
    index.add([Candidate(f"k{n}", f"rust number{n}", {"rate": n})])
    print(f"added {n}", flush=True)
    print(f"version {index.commit()}", flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    rng = random.Random(0)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    most_added, most_version = -1, 0
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]  # it has begun
        time.sleep(rng.random() * 0.4)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines()
        child.wait()
        for line in lines:
            word, _, number = line.strip().partition(" ")
            if word == "added" and number:
                most_added = max(most_added, int(number))
            elif word == "version" and number:
                most_version = max(most_version, int(number))
        with CandidateIndex(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
            assert len(index) >= most_added + 1
            assert index.version >= most_version
            if index.version:
                found = index.search("rust", 4096)
                assert len(found.hits) == index.info().searchable
            index.commit()
            assert len(index.search("rust", 4096).hits) == len(index)
    assert most_version > 1, "it was killed before it did anything"


def test_a_damaged_index_is_said_so(tmp_path: Path) -> None:
    with CandidateIndex(tmp_path, Hashed()) as index:  # type: ignore[arg-type]
        index.add(people(9))
        index.commit()
    digests = tmp_path / "generation-1" / "digests.npy"
    digests.write_bytes(digests.read_bytes()[:40])
    with pytest.raises(CorruptFile, match="uma index build"):
        CandidateIndex.open(tmp_path, Hashed())  # type: ignore[arg-type]
    (tmp_path / "candidates.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(CorruptFile, match="is not the file of an index"):
        CandidateIndex.open(tmp_path)


@pytest.mark.weights
def test_meaning_finds_what_words_do_not(tmp_path: Path) -> None:
    pool = [
        Candidate("law", "She works as an attorney in Berlin and argues in court."),
        Candidate("cook", "Whisks eggs, bakes bread, runs a small kitchen."),
        Candidate("care", "Registered nurse in intensive care."),
    ]
    with Embedder(cache=False) as embedder, CandidateIndex(tmp_path, embedder) as index:
        index.add(pool)
        index.commit()
        hit = index.search("We look for a lawyer.", 1).hits[0]
    assert (hit.candidate.id, hit.by_words, hit.by_vectors) == ("law", None, 1)


def test_a_field_is_one_column_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made for every value would cost the square of the pool."""
    made, full = [], np.full
    monkeypatch.setattr(np, "full", lambda *a, **k: made.append(a) or full(*a, **k))
    columns = columns_of([{"rate": float(i), "area": "ab"[i % 2]} for i in range(50)], [str(i) for i in range(50)])
    assert len(made) == 2
    assert columns["rate"].values.tolist() == [float(i) for i in range(50)]
    assert columns["area"].texts == ("a", "b")
