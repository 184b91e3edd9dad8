"""Vectors that were computed before, in one SQLite file, under the digests of their texts.

Knows digests and vectors; does not know texts or models. SQLite because a process may be killed at any point and several may
share the file. Whatever happens to the file, the caller gets an answer: a cache that fails only costs time.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uma_engine.errors import EngineUnavailable

__all__ = ["VectorCache"]

logger = logging.getLogger("uma_engine.retrieval")

KEYS_PER_QUERY = 500
WAIT_S = 10.0  # for another process that writes

Entry = tuple[np.ndarray, int]  # a vector [D] fp32, and how many tokens of its text it does not cover


class VectorCache:
    """A map from 32-byte digests to entries, kept in `path`. Any thread may call it."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self._dim = dim
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
            # A page of this size wastes least on vectors of 384 numbers.
            for pragma in ("page_size = 8192", "journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (digest BLOB PRIMARY KEY, vector BLOB NOT NULL,"
                " truncated_tokens INTEGER NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, digests: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries that are there."""
        found: dict[bytes, Entry] = {}
        with self._lock:
            try:
                for first in range(0, len(digests), KEYS_PER_QUERY):
                    if self._connection is None:
                        break
                    part = digests[first : first + KEYS_PER_QUERY]
                    places = ",".join("?" * len(part))
                    rows = self._connection.execute(
                        f"SELECT digest, vector, truncated_tokens FROM vectors WHERE digest IN ({places})", part
                    )
                    for digest, vector, truncated in rows:
                        if len(vector) == 4 * self._dim:
                            found[digest] = np.frombuffer(vector, np.float32), truncated
            except sqlite3.Error as error:
                self._give_up(error)
        return found

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Keep entries; all of them or none."""
        rows = [(digest, vector.astype(np.float32).tobytes(), lost) for digest, (vector, lost) in entries.items()]
        with self._lock:
            if self._connection is None or not rows:
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                self._give_up(error)

    def forget(self, digests: Sequence[bytes]) -> int:
        """Delete entries, their bytes overwritten, also in the journal; how many there were.

        Errors:  EngineUnavailable when they may still be there: here a failure matters
        """
        with self._lock:
            try:
                if self._connection is None:
                    raise sqlite3.Error("it is not open")
                before = self._connection.total_changes
                self._connection.executemany("DELETE FROM vectors WHERE digest = ?", [(digest,) for digest in digests])
                (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:
                    raise sqlite3.Error("another process is reading it")
                return self._connection.total_changes - before
            except sqlite3.Error as error:
                raise EngineUnavailable(
                    f"`{self.path}` may still hold what was to be forgotten: {error}",
                    hint="stop what uses the file and try again, or delete it: it is only a cache",
                ) from None

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("the cache of embeddings `%s` is not used (hint: delete it): %s", self.path, error)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
