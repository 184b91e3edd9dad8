"""One generation of an index's search structures: vectors, words and fields of everybody at one moment, in a folder of their own.

Knows how they are built, written and mapped; does not know how results are fused. A folder is written under another name, forced to
the disk and then renamed: one that is there is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uma_engine.errors import CorruptFile, MissingPackage
from uma_engine.retrieval.filters import Column, columns_of
from uma_engine.retrieval.store import CandidateStore

if TYPE_CHECKING:
    from uma_engine.retrieval.embedder import Embedder

__all__ = ["Generation", "Progress", "tokens_of"]

K1, B = 0.9, 0.4  # of BM25, as in Anserini's defaults
CHUNK = 2048  # texts embedded between two looks at the clock
Progress = Callable[[str, int, int], None]  # what is done, how many, of how many


@dataclass(frozen=True)
class Generation:
    """What a search looks at. `ids` [N] in the order of the rows; `vectors` [N, D] fp16 of length 1, or None without an embedder."""

    number: int
    ids: tuple[str, ...]
    digests: np.ndarray  # [N, 32] uint8, of the texts
    vectors: np.ndarray | None
    bm25: Any
    columns: Mapping[str, Column]

    @property
    def count(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls,
        folder: Path,
        number: int,
        store: CandidateStore,
        embedder: Embedder | None,
        previous: Generation | None,
        progress: Progress | None,
    ) -> None:
        """Write generation `number` of everybody in `store` under `folder`. Vectors of texts that have not changed are taken from
        `previous`; the others go through the embedder's cache, so that a build that was interrupted goes on where it was."""
        bm25s = _bm25s()
        tell = progress or (lambda what, done, of: None)
        rows = list(store.rows())
        texts = [row.candidate.text for row in rows]
        ids = [row.candidate.id for row in rows]
        columns = columns_of([row.candidate.facts for row in rows], ids)
        digests = np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, 32)
        target = folder / f"generation-{number}"
        scratch = folder / f"generation-{number}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            if embedder is not None:
                np.save(scratch / "vectors.npy", _vectors(texts, digests, embedder, previous, tell))
            np.save(scratch / "digests.npy", digests)
            tell("words", 0, len(texts))
            if texts:
                model = bm25s.BM25(k1=K1, b=B)
                tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
                model.index(tokens, show_progress=False)
                model.save(str(scratch / "words"), show_progress=False)
            tell("words", len(texts), len(texts))
            fields = [column.values for column in columns.values()]
            np.save(scratch / "columns.npy", np.array(fields, np.float64).reshape(len(fields), len(rows)))
            facts = {"ids": ids, "fields": {n: [c.kind, list(c.texts)] for n, c in columns.items()}}
            (scratch / "facts.json").write_text(json.dumps(facts, ensure_ascii=False))
            _force(scratch)
            shutil.rmtree(target, ignore_errors=True)  # of a build that was killed before it was published
            scratch.rename(target)
            _sync(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    @classmethod
    def load(cls, folder: Path, number: int) -> Generation:
        """Map a generation into memory. Errors: CorruptFile"""
        path = folder / f"generation-{number}"
        try:
            facts = json.loads((path / "facts.json").read_text())
            values = np.load(path / "columns.npy", mmap_mode="r")
            columns = {
                name: Column(kind, column, tuple(texts))
                for (name, (kind, texts)), column in zip(facts["fields"].items(), values, strict=True)
            }
            vectors = None
            if (path / "vectors.npy").exists():
                vectors = np.load(path / "vectors.npy", mmap_mode="c")  # torch wants memory that could be written
            digests = np.load(path / "digests.npy", mmap_mode="r")
            bm25 = None
            if facts["ids"]:
                bm25 = _bm25s().BM25.load(str(path / "words"), mmap=True, show_progress=False)
            found = cls(number, tuple(facts["ids"]), digests, vectors, bm25, columns)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"`{path}` cannot be read: {error}", hint="build the index again: `uma index build`"
            ) from None
        sizes = {len(digests), *(len(c.values) for c in columns.values()), *([] if vectors is None else [len(vectors)])}
        if sizes - {found.count}:
            raise CorruptFile(f"`{path}` does not fit together: {found.count} ids but {sorted(sizes)} rows")
        return found

    @staticmethod
    def remove_others(folder: Path, number: int) -> None:
        """Delete every generation but `number`, and what killed builds have left."""
        for path in folder.glob("generation-*"):
            if path.name != f"generation-{number}":
                shutil.rmtree(path, ignore_errors=True)


def tokens_of(text: str, bm25: Any) -> list[str]:
    """The words of a query that the index knows, in order."""
    (words,) = _bm25s().tokenize([text], stopwords="en", return_ids=False, show_progress=False)
    return [word for word in words if word in bm25.vocab_dict]


def _vectors(
    texts: Sequence[str],
    digests: np.ndarray,
    embedder: Embedder,
    previous: Generation | None,
    tell: Progress,
) -> np.ndarray:
    vectors = np.empty((len(texts), embedder.dim), np.float16)
    known: dict[bytes, int] = {}
    if previous is not None and previous.vectors is not None and previous.vectors.shape[1] == embedder.dim:
        known = {bytes(digest): row for row, digest in enumerate(previous.digests)}
    missing: list[int] = []
    for row, digest in enumerate(digests):
        at = known.get(bytes(digest))
        if at is None or previous is None or previous.vectors is None:
            missing.append(row)
        else:
            vectors[row] = previous.vectors[at]
    done = len(texts) - len(missing)
    tell("vectors", done, len(texts))
    for first in range(0, len(missing), CHUNK):
        part = missing[first : first + CHUNK]
        vectors[part] = embedder.embed([texts[row] for row in part]).vectors.astype(np.float16)
        tell("vectors", done + first + len(part), len(texts))
    return vectors


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise MissingPackage(
            "`bm25s` is not installed", hint="install it with `pip install 'uma-engine[retrieval]'`"
        ) from None
    return bm25s


def _force(folder: Path) -> None:
    """Everything in a folder onto the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
