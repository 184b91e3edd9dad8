"""A pool of candidates that can be searched: hard filters, then words and vectors fused, the best M for a language model to judge.

Knows the store, its generations and how results are fused; does not know models that score, nor requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from uma_engine.core import Candidate
from uma_engine.errors import EngineUnavailable, InvalidRequest
from uma_engine.retrieval.filters import Where, allowed, parse_where
from uma_engine.retrieval.generation import Generation, Progress, tokens_of
from uma_engine.retrieval.prior import log_odds
from uma_engine.retrieval.store import CandidateStore

if TYPE_CHECKING:
    from uma_engine.retrieval.embedder import Embedder

__all__ = ["CandidateIndex", "Cut", "Found", "Hit", "IndexInfo"]

FUSION = 60  # of reciprocal rank fusion: Cormack, Clarke and Büttcher 2009
DEFAULT_FIRST = 100
MOST_FIRST = 4096
DEPTHS = (10, 20, 50, 100, 200, 500, 1000, 2000)  # at which recall is measured
BATCH = 1000  # candidates of one transaction


@dataclass(frozen=True, slots=True)
class Hit:
    """One candidate of the first stage. Places count from 1; None: not among the best by words, or by vectors. `prior`: log-odds of fitting
    (`prior.log_odds`); 0.0 in an index without vectors."""

    candidate: Candidate
    score: float
    by_words: int | None
    by_vectors: int | None
    prior: float = 0.0


@dataclass(frozen=True, slots=True)
class Cut:
    """What the first stage left out. `measured_recall` is the share of relevant candidates that a cut at `first` kept over
    `measured_on` labelled queries, None where it was never measured; `filtered` did not pass the filters."""

    first: int
    considered: int
    filtered: int
    target_recall: float | None
    measured_recall: float | None
    measured_on: int
    index_version: int


@dataclass(frozen=True, slots=True)
class Found:
    """Best first, with what was left out."""

    hits: tuple[Hit, ...]
    cut: Cut


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """`pending` candidates were added, changed or deleted since the generation that is searched."""

    path: str
    version: int
    candidates: int
    searchable: int
    pending: int
    embedder: str | None
    fields: Mapping[str, str]
    recall: Mapping[int, float]
    bytes: int


class CandidateIndex:
    """Candidates in a folder. `add` and `delete` are kept at once, and `commit` makes them searchable; whoever is deleted is not
    found from that moment on, and `commit` also rewrites the vectors and words that they left. Any thread may search.

    `embedder` None: words alone. A process that is killed leaves the index as it was at the last change; a commit that was
    interrupted goes on with the vectors that it had computed.

    Errors:  CorruptFile, EngineUnavailable, MissingPackage (extra `retrieval`)
    """

    def __init__(self, path: str | Path, embedder: Embedder | None = None, *, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not (self.path / "candidates.sqlite").is_file():
            raise InvalidRequest(f"`{path}` is not an index", hint="make one with `uma index build`", param="index")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineUnavailable(f"`{path}` cannot be made: {error}") from None
        self._embedder = embedder
        self._store = CandidateStore(self.path / "candidates.sqlite")
        self._lock = threading.Lock()
        self._deleted: set[str] = set()
        self._generation: Generation | None = None
        digest = self._store.get_meta("embedder")
        if embedder is not None and digest not in (None, "", embedder.digest):
            self._store.close()
            raise InvalidRequest(
                f"`{path}` was built with another embedder ({digest[:12] if digest else ''}, now {embedder.digest[:12]})",
                hint="build it again, or open it with the embedder that made it",
                param="embedder",
            )
        if (version := self.version) > 0:
            self._generation = Generation.load(self.path, version)
            present = self._store.digests()
            self._deleted = {i for i in self._generation.ids if i not in present}

    @classmethod
    def open(cls, path: str | Path, embedder: Embedder | None = None) -> CandidateIndex:
        """An index that is there. Errors: InvalidRequest where none is"""
        return cls(path, embedder, create=False)

    @property
    def version(self) -> int:
        """The generation that is searched; 0: none yet."""
        return int(self._store.get_meta("generation") or 0)

    def __len__(self) -> int:
        return len(self._store)

    def add(self, candidates: Iterable[Candidate], progress: Progress | None = None) -> tuple[int, int]:
        """Add candidates, or replace those whose id is there: how many were new, how many have changed. In batches, each kept whole.

        Errors:  InvalidRequest for what is not a candidate
        """
        added = changed = done = 0
        batch: list[Candidate] = []
        for candidate in candidates:
            if not isinstance(candidate, Candidate):
                raise InvalidRequest(f"`{type(candidate).__name__}` is not a `Candidate`", param="candidates")
            if not candidate.text.strip():
                raise InvalidRequest(f"candidate `{candidate.id}` has a blank text", param="candidates")
            batch.append(candidate)
            if len(batch) == BATCH:
                counts = self._store.put(batch)
                added, changed, done, batch = added + counts[0], changed + counts[1], done + len(batch), []
                if progress is not None:
                    progress("candidates", done, done)
        if batch:
            counts = self._store.put(batch)
            added, changed = added + counts[0], changed + counts[1]
        return added, changed

    def delete(self, candidate_id: str | Sequence[str], /) -> int:
        """Delete one or several: how many there were. They are not found from now on; `commit` rewrites what is left of them."""
        ids = [candidate_id] if isinstance(candidate_id, str) else list(candidate_id)
        with self._lock:
            gone = self._store.delete(ids)
            if self._generation is not None and gone:
                self._deleted = self._deleted | set(ids)
        return gone

    def get(self, candidate_id: str) -> Candidate | None:
        row = self._store.get([candidate_id]).get(candidate_id)
        return None if row is None else row.candidate

    def commit(self, progress: Progress | None = None) -> int:
        """Make everything searchable: the new version. Nothing changes for searches until all of it is on the disk.

        Errors:  InvalidRequest where a field has values of several kinds; EngineUnavailable
        """
        with self._lock:
            revision, number = self._store.revision, self.version + 1
            Generation.build(self.path, number, self._store, self._embedder, self._generation, progress)
            fresh = Generation.load(self.path, number)
            digest = "" if self._embedder is None else self._embedder.digest
            self._store.set_meta({"generation": str(number), "built": str(revision), "embedder": digest})
            self._generation, self._deleted = fresh, set()
            Generation.remove_others(self.path, number)
        return number

    def search(
        self,
        query: str,
        first: int | None = None,
        *,
        where: Where | None = None,
        recall: float | None = None,
    ) -> Found:
        """
        Semantics:  of everybody who passes `where` (see `filters.parse_where`) the `first` best by reciprocal rank fusion of BM25 and
                    the embedder's inner product, ties by the order in which they came. `recall`: the least cut whose measured
                    recall reaches it (`measure`)
        Errors:     InvalidRequest (blank query, no commit yet, no cut that reaches `recall`)
        """
        generation, deleted = self._generation, self._deleted
        if generation is None:
            raise InvalidRequest(
                f"`{self.path}` has nothing to search yet", hint="call `commit` after `add`", param="index"
            )
        if not isinstance(query, str) or not query.strip():
            raise InvalidRequest("`query` is blank", param="query")
        first = self._first(first, recall)
        passes = allowed(parse_where(where), generation.columns, generation.count)
        if deleted:
            passes &= np.array([i not in deleted for i in generation.ids], bool)
        considered = int(passes.sum())
        depth = min(considered, max(2 * first, 100))
        word_scores = _word_scores(query, generation)
        by_words = _best(word_scores, passes, depth)
        vector = self._vector(query, generation)
        by_vectors = _near(vector, generation, passes, depth)
        scores: dict[int, float] = {}
        places: dict[int, list[int | None]] = {}
        for column, ranking in enumerate((by_words, by_vectors)):
            for place, row in enumerate(ranking, start=1):
                scores[row] = scores.get(row, 0.0) + 1.0 / (FUSION + place)
                places.setdefault(row, [None, None])[column] = place
        order = sorted(scores, key=lambda row: (-scores[row], row))
        ids = [generation.ids[row] for row in order]
        rows = self._store.get(ids[: first + len(deleted)])
        found = [(row, i) for row, i in zip(order, ids, strict=True) if i in rows][:first]
        priors = _priors([row for row, _ in found], vector, word_scores, generation)
        hits = [
            Hit(rows[i].candidate, scores[row], places[row][0], places[row][1], prior)
            for (row, i), prior in zip(found, priors, strict=True)
        ]
        curve, measured_on = self._curve()
        cut = Cut(
            first=first,
            considered=considered,
            filtered=generation.count - len(deleted) - considered,
            target_recall=recall,
            measured_recall=1.0 if considered <= len(hits) else curve.get(first),
            measured_on=measured_on,
            index_version=generation.number,
        )
        return Found(tuple(hits), cut)

    def measure(self, examples: Iterable[tuple[str, Sequence[str]]]) -> dict[int, float]:
        """Measure the recall of cuts at several depths over queries with the ids of their relevant candidates, and keep it: the share
        of relevant candidates that are kept, averaged over queries. Errors: InvalidRequest"""
        found: dict[int, list[float]] = {}
        count = 0
        for query, relevant in examples:
            wanted = set(relevant)
            if not wanted:
                continue
            count += 1
            ids = [hit.candidate.id for hit in self.search(query, min(MOST_FIRST, max(DEPTHS))).hits]
            for depth in DEPTHS:
                found.setdefault(depth, []).append(len(wanted & set(ids[:depth])) / len(wanted))
        if not count:
            raise InvalidRequest("no example has a relevant candidate", param="examples")
        curve = {depth: float(np.mean(values)) for depth, values in found.items()}
        kept = {"curve": {str(d): r for d, r in curve.items()}, "queries": count, "version": self.version}
        self._store.set_meta({"recall": json.dumps(kept | {"measured": datetime.now(UTC).isoformat()})})
        return curve

    def info(self) -> IndexInfo:
        generation = self._generation
        stale = self._store.revision - int(self._store.get_meta("built") or 0)
        digest = self._store.get_meta("embedder")
        return IndexInfo(
            path=str(self.path),
            version=self.version,
            candidates=len(self._store),
            searchable=0 if generation is None else generation.count - len(self._deleted),
            pending=self._pending() if stale else 0,
            embedder=digest or None,
            fields={} if generation is None else {name: c.kind for name, c in generation.columns.items()},
            recall=self._curve()[0],
            bytes=sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file()),
        )

    def close(self) -> None:
        self._store.close()
        self._generation = None

    def __enter__(self) -> CandidateIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pending(self) -> int:
        now = self._store.digests()
        then: dict[str, bytes] = {}
        if self._generation is not None:
            then = {
                i: bytes(d) for i, d in zip(self._generation.ids, np.asarray(self._generation.digests), strict=True)
            }
        return len(then.keys() - now.keys()) + sum(then.get(i) != digest for i, digest in now.items())

    def _curve(self) -> tuple[dict[int, float], int]:
        kept = json.loads(self._store.get_meta("recall") or "{}")
        return {int(d): r for d, r in kept.get("curve", {}).items()}, kept.get("queries", 0)

    def _first(self, first: int | None, recall: float | None) -> int:
        if first is not None and (
            isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= MOST_FIRST
        ):
            raise InvalidRequest(f"`first` is `{first!r}` but must be from 1 to {MOST_FIRST}", param="first")
        if recall is None:
            return first or DEFAULT_FIRST
        if first is not None:
            raise InvalidRequest("`first` and `recall` are given", hint="one of them decides the cut", param="recall")
        if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
            raise InvalidRequest(f"`recall` is `{recall!r}` but must be above 0 and at most 1", param="recall")
        curve, _ = self._curve()
        found = [depth for depth, measured in sorted(curve.items()) if measured >= recall]
        if not found:
            best = max(curve.items(), key=lambda item: item[1], default=None)
            raise InvalidRequest(
                f"no measured cut keeps {recall:.0%} of the relevant candidates"
                + (f": {best[0]} keep {best[1]:.1%}" if best else ": recall was never measured here"),
                hint="ask for less, name `first`, or measure with `CandidateIndex.measure`",
                param="recall",
            )
        return found[0]

    def _vector(self, query: str, generation: Generation) -> np.ndarray | None:
        if generation.vectors is None or self._embedder is None:
            return None
        return self._embedder.embed([query]).vectors[0]


def _near(vector: np.ndarray | None, generation: Generation, passes: np.ndarray, depth: int) -> list[int]:
    if vector is None or generation.vectors is None or not depth:
        return []
    import torch

    from uma_kernels.topk import Corpus, pack_filter, topk

    vectors = torch.from_numpy(generation.vectors)
    corpus = Corpus("fp16", vectors.shape[1], len(vectors), vectors)
    _, rows = topk(
        torch.from_numpy(vector[None]), corpus, min(depth, MOST_FIRST), pack_filter(torch.from_numpy(passes))
    )
    return [int(row) for row in rows[0] if row >= 0]


def _priors(rows: list[int], vector: np.ndarray | None, word_scores: np.ndarray, generation: Generation) -> list[float]:
    if vector is None or generation.vectors is None or not rows:
        return [0.0] * len(rows)
    cosines = np.asarray(generation.vectors[rows], np.float32) @ vector
    words = word_scores[rows] / max(float(word_scores.max()), 1e-6)
    return [round(float(x), 4) for x in log_odds(cosines, words)]


def _word_scores(query: str, generation: Generation) -> np.ndarray:
    words = [] if generation.bm25 is None else tokens_of(query, generation.bm25)
    if not words:
        return np.zeros(generation.count, np.float32)
    return np.asarray(generation.bm25.get_scores(words))


def _best(scores: np.ndarray, passes: np.ndarray, depth: int) -> list[int]:
    """The `depth` best rows with a score above 0 that pass, ties by row."""
    held = np.where(passes, scores, 0.0)
    positive = int((held > 0).sum())
    depth = min(depth, positive)
    if not depth:
        return []
    least = np.partition(held, len(held) - depth)[len(held) - depth]
    rows = np.flatnonzero(held >= max(least, np.nextafter(np.float32(0), np.float32(1))))
    order = rows[np.argsort(-held[rows], kind="stable")]
    return [int(row) for row in order[:depth]]
