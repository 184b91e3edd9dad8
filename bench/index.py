"""The first stage: how fast a pool becomes searchable beside its embedder alone, and how long a query over a large pool takes.

    python -m bench.index [--candidates 1000000] [--queries 40] [--texts 400] [--only indexing|search]

indexing  add and commit of new people with MiniLM, in turns with the embedder alone on the same number of other people of the same kind,
          nothing cached. Goal: 0.9 of the embedder's throughput.
search    one query over `--candidates` people of about 30 words on this machine's CPUs: filter, BM25, embedding of the query, inner
          products, fusion, the best 100 read. Goal: 150 ms over a million. Embedding a million texts takes hours and a search costs the
          same whatever the vectors are, so those of the pool are drawn at random; the query is embedded.

Words are drawn as often as they occur in examples/candidates.jsonl, each person's number beside them. Rows go to bench/results/index.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.rows import ROOT, OthersShare, append_row, quantiles
from uma_engine import Candidate
from uma_engine.retrieval import CandidateIndex, Embedder, Embeddings

WORDS_SEARCHED, WORDS_INDEXED = 30, 80
ROUNDS = 5
FIRST = 100
AREAS = ("design", "data", "web", "writing", "sales")


def vocabulary() -> np.ndarray:
    text = (ROOT / "examples" / "candidates.jsonl").read_text(encoding="utf-8")
    return np.array(re.findall(r"[a-z]{3,}", text.lower()))


def crowd(words: np.ndarray, count: int, length: int, seed: int) -> Iterator[Candidate]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        drawn = " ".join(words[rng.integers(len(words), size=length)])
        facts = {"rate": float(rng.integers(10, 120)), "area": AREAS[number % len(AREAS)]}
        yield Candidate(f"{seed}-{number}", f"{drawn} p{number}", facts=facts)


class DrawnVectors(Embedder):
    """MiniLM for a query, and directions drawn at random for a pool."""

    def __init__(self) -> None:
        super().__init__(cache=False)
        self.digest = "drawn " + self.digest
        self._rng = np.random.default_rng(7)

    def embed(self, texts: Sequence[str], progress: Any = None) -> Embeddings:
        if len(texts) == 1:
            return super().embed(texts, progress)
        vectors = self._rng.standard_normal((len(texts), self.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embeddings(vectors, np.zeros(len(texts), np.int64))


def indexing(words: np.ndarray, texts: int) -> dict[str, Any]:
    ratios, speeds = [], []
    with Embedder(cache=False) as embedder:
        for turn in range(-1, ROUNDS):  # the first warms up
            alone = [c.text for c in crowd(words, texts, WORDS_INDEXED, 100 + 2 * turn)]
            people = list(crowd(words, texts, WORDS_INDEXED, 101 + 2 * turn))
            began = time.perf_counter()
            embedder.embed(alone)
            middle = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, CandidateIndex(folder, embedder) as index:
                index.add(people)
                index.commit()
                end = time.perf_counter()
            if turn >= 0:
                ratios.append((middle - began) / (end - middle))
                speeds.append(texts / (end - middle))
    low, median, high = quantiles(ratios)
    return {
        "kind": "indexing", "candidates": texts, "words": WORDS_INDEXED, "candidates_s": round(quantiles(speeds)[1], 1),
        "of_embedder": round(median, 3), "of_embedder_p20": round(low, 3), "of_embedder_p80": round(high, 3),
    }  # fmt: skip


def searching(words: np.ndarray, count: int, queries: int) -> Iterator[dict[str, Any]]:
    def tell(what: str, done: int, of: int) -> None:
        if done % 100_000 == 0:
            sys.stderr.write(f"  {what}: {done}/{of}\n")

    rng = np.random.default_rng(1)
    asked = [" ".join(words[rng.integers(len(words), size=20)]) for _ in range(queries)]
    with (
        tempfile.TemporaryDirectory() as folder,
        DrawnVectors() as embedder,
        CandidateIndex(folder, embedder) as index,
    ):
        began = time.perf_counter()
        index.add(crowd(words, count, WORDS_SEARCHED, 0), tell)
        index.commit(tell)
        built = time.perf_counter() - began
        for name, where in (("no filter", None), ("rate and area", {"rate": {"<=": 60}, "area": "data"})):
            index.search(asked[0], FIRST, where=where)
            times = []
            for query in asked:
                begin = time.perf_counter()
                found = index.search(query, FIRST, where=where)
                times.append((time.perf_counter() - begin) * 1e3)
            low, median, high = quantiles(times)
            yield {
                "kind": "search", "case": name, "candidates": count, "considered": found.cut.considered, "queries": queries,
                "ms": round(median, 1), "ms_p20": round(low, 1), "ms_p80": round(high, 1), "ms_most": round(max(times), 1),
                "built_s": round(built, 1), "index_mib": round(index.info().bytes / 2**20),
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--only", choices=("indexing", "search"))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    words = vocabulary()

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if not args.no_save:
            append_row("index", {"bench": "index", **row, "others_share": others.read()})

    others = OthersShare()
    if args.only != "search":
        keep(indexing(words, args.texts))
    if args.only == "indexing":
        return
    for row in searching(words, args.candidates, args.queries):
        keep(row)


if __name__ == "__main__":
    main()
