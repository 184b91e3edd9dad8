"""The embedder with its real model: what is near what, and that a vector depends on its text alone."""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from uma_engine.catalog import resolve
from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest, MissingPackage, UnknownModel
from uma_engine.retrieval import Embedder
from uma_engine.retrieval.vector_cache import VectorCache
from uma_kernels.testing import assert_invariant, assert_reduction

JOBS = {
    "rust": "We need a senior Rust engineer for a storage engine: databases, Linux, networks.",
    "nurse": "A hospital seeks a registered nurse for intensive care.",
    "tax": "Bookkeeper wanted for payroll and taxes of small shops.",
}
PEOPLE = {
    "rust": [
        "Systems programmer, ten years of Rust and C++, wrote a key-value store.",
        "Backend developer: Postgres, Go, Rust",
    ],
    "nurse": ["RN with eight years in the ICU, careful and kind.", "Emergency nurse and midwife"],
    "tax": ["Accountant: ledgers, invoices, tax returns, payroll.", "I keep the books of restaurants and bakeries."],
}


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder(cache=False, num_threads=2) as embedder:
        yield embedder


@pytest.mark.weights
def test_candidates_are_nearest_to_their_own_job(embedder: Embedder) -> None:
    jobs = embedder.embed(list(JOBS.values())).vectors
    people = embedder.embed([text for texts in PEOPLE.values() for text in texts]).vectors
    assert jobs.shape == (3, 384)
    assert jobs.dtype == people.dtype == np.float32
    nearest = (people @ jobs.T).argmax(axis=1)
    assert nearest.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.weights
def test_known_pairs_are_ordered_by_meaning(embedder: Embedder) -> None:
    """From the same sentence in other words, through the same subject, to nothing in common."""
    query = "The woman is a lawyer in Berlin."
    others = [query, "She works as an attorney in Berlin.", "German courts are busy.", "Whisk two eggs into the flour."]
    similarities = embedder.embed(others).vectors @ embedder.embed([query]).vectors[0]
    assert_reduction(torch.tensor(similarities[:1]), torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert (np.diff(similarities) < 0).all(), similarities


@pytest.mark.weights
def test_a_vector_has_the_same_bits_in_any_company(embedder: Embedder) -> None:
    """Alone, among others of every length, in another order, with one thread and with three."""
    rng = random.Random(5)
    words = " ".join([*JOBS.values(), *(t for texts in PEOPLE.values() for t in texts)]).split()
    texts = [" ".join(rng.choices(words, k=n)) for n in (1, 2, 5, 9, 17, 33, 70)]
    alone = torch.from_numpy(np.concatenate([embedder.embed([text]).vectors for text in texts]))
    order = rng.sample(range(len(texts)), len(texts))
    for threads in (1, 3):
        with Embedder(cache=False, num_threads=threads) as other:
            together = other.embed([texts[i] for i in order]).vectors
            assert_invariant(torch.from_numpy(together), alone[order])


@pytest.mark.weights
def test_the_mean_is_over_the_tokens_and_has_length_one(embedder: Embedder) -> None:
    text = PEOPLE["tax"][0]
    ids = np.array([embedder._tokenizer.encode(text).ids])
    assert (ids[0, 0], ids[0, -1]) == (101, 102)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    hidden = torch.from_numpy(embedder._session.run(None, feed)[0][0])
    true = torch.nn.functional.normalize(hidden.double().mean(0), dim=0)
    own = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert_reduction(torch.from_numpy(embedder.embed([text]).vectors[0]), own, true)


@pytest.mark.weights
def test_what_is_cut_off_is_counted(embedder: Embedder) -> None:
    cut = Embedder(cache=False, num_threads=1, max_tokens=8)
    long, short = "one two three four five six seven eight nine", "one two three four five six"
    answer = cut.embed([long, short, ""])
    assert answer.truncated_tokens.tolist() == [3, 0, 0]
    assert_invariant(torch.from_numpy(answer.vectors[0]), torch.from_numpy(answer.vectors[1]))
    assert np.isfinite(answer.vectors).all()
    assert embedder.embed([long]).truncated_tokens.tolist() == [0]
    assert cut.digest != embedder.digest


@pytest.mark.weights
def test_the_cache_gives_the_same_bits_and_forgets(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve("minilm-l6")  # in the usual cache
    monkeypatch.setenv("UMA_CACHE", str(tmp_path))
    texts = [JOBS["rust"], PEOPLE["nurse"][0], JOBS["rust"], JOBS["tax"]]
    true = torch.from_numpy(embedder.embed(texts).vectors)
    seen: list[tuple[int, int]] = []
    with Embedder(model, num_threads=1) as first:
        assert_invariant(torch.from_numpy(first.embed(texts, lambda *counts: seen.append(counts)).vectors), true)
    assert seen == [(2, 4), (3, 4), (4, 4)]
    with Embedder(model, num_threads=1) as second:
        second._session = None  # nothing is computed again
        assert_invariant(torch.from_numpy(second.embed(texts[::-1]).vectors), true.flip(0))
        assert second.forget(texts[:2]) == 2
        assert second.forget(texts[:2]) == 0
        (path,) = (tmp_path / "embeddings").glob("*.sqlite")
        everything = b"".join(file.read_bytes() for file in path.parent.iterdir())
        kept, gone = true[3].numpy().tobytes(), true[0].numpy().tobytes()
        assert kept in everything
        assert not any(gone[i : i + 32] in everything for i in range(0, len(gone), 32))
        with pytest.raises(AttributeError):  # it would have to be computed
            second.embed(texts[:1])


@pytest.mark.weights
def test_bad_calls_are_refused_in_words(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedder.embed([]).vectors.shape == (0, 384)
    with pytest.raises(InvalidRequest, match="`texts` is one string"):
        embedder.embed("text")
    with pytest.raises(InvalidRequest, match="text 1 is `int`"):
        embedder.embed(["a", 5])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="text 0 holds a lone surrogate at character 2"):
        embedder.embed(["ab\ud800"])
    for wrong in ({"max_tokens": 2}, {"max_tokens": 513}, {"num_threads": 0}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            Embedder(**wrong)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UnknownModel, match=r"no `tokenizer\.json` beside"):
        Embedder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFile, match=r"cannot open .*model\.onnx"):
        Embedder(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match="needs `onnxruntime`") as caught:
        Embedder()
    assert "pip install 'uma-engine[retrieval]'" in str(caught.value)


def test_a_damaged_cache_only_costs_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "v.sqlite"
    entry = (np.arange(3, dtype=np.float32), 7)
    cache = VectorCache(path, 3)
    cache.put({b"a": entry, b"b": entry})
    (vector, lost), *others = cache.get([b"b", b"c"]).values()
    assert (vector.tolist(), lost, others) == ([0, 1, 2], 7, [])
    longer = VectorCache(path, 4)
    assert longer.get([b"a"]) == {}  # vectors of another length are not taken
    longer.close()
    cache.close()
    path.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    broken = VectorCache(path, 3)
    broken.put({b"a": entry})
    assert broken.get([b"a"]) == {}
    assert "is not used" in caplog.text
    with pytest.raises(EngineUnavailable, match="may still hold"):
        broken.forget([b"a"])


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    entry = (np.ones(2, np.float32), 0)
    one, two = VectorCache(tmp_path / "v.sqlite", 2), VectorCache(tmp_path / "v.sqlite", 2)
    one.put({b"x": entry})
    two.put({b"y": entry})
    assert one.get([b"x", b"y"]).keys() == two.get([b"x", b"y"]).keys() == {b"x", b"y"}
    with sqlite3.connect(tmp_path / "v.sqlite") as reader:
        assert reader.execute("SELECT count(*) FROM vectors").fetchone() == (2,)
