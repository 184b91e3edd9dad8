"""The people of an index in one SQLite file: texts, facts, and which generation of the search structures is in force.

Knows rows and transactions; does not know how anybody is found. SQLite because a process may be killed at any point: what was
committed is there, what was not is not.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uma_engine.core import Candidate
from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest

__all__ = ["CandidateStore", "Row"]

FORMAT = "uma-candidate-index/1"
WAIT_S = 10.0  # for another process that writes
KEYS_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate as it is stored; `number` orders them as they came, `digest` names the text."""

    number: int
    candidate: Candidate
    digest: bytes


class CandidateStore:
    """A map from ids to candidates. Any thread may call it. Errors: CorruptFile, EngineUnavailable where SQLite fails"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS candidates (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,"
                " text TEXT NOT NULL, facts TEXT NOT NULL, digest BLOB NOT NULL)"
            )
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (FORMAT,))
            self._db.execute("COMMIT")
            found = self.get_meta("format")
        except sqlite3.DatabaseError as error:
            raise CorruptFile(f"`{path}` is not the file of an index: {error}") from None
        if found != FORMAT:
            raise CorruptFile(f"`{path}` has the format `{found}` but this version reads `{FORMAT}`")

    def get_meta(self, key: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, values: dict[str, str]) -> None:
        """All of them or none."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    def put(self, candidates: Iterable[Candidate]) -> tuple[int, int]:
        """Add candidates, or replace those whose id is there, all or none: (how many were new, how many have changed). A candidate that
        has changed keeps its place in the order."""
        added = changed = 0
        with self._transaction():
            for c in candidates:
                if c.prior:
                    raise InvalidRequest(
                        f"candidate `{c.id}` has a `prior`",
                        hint="it is about a job, and an index has none",
                        param="prior",
                    )
                facts = json.dumps(dict(c.facts), ensure_ascii=False, sort_keys=True, allow_nan=False)
                digest = hashlib.sha256(c.text.encode("utf-8", "surrogatepass")).digest()
                old = self._db.execute("SELECT digest, facts FROM candidates WHERE id = ?", (c.id,)).fetchone()
                if old is None:
                    self._db.execute(
                        "INSERT INTO candidates (id, text, facts, digest) VALUES (?, ?, ?, ?)",
                        (c.id, c.text, facts, digest),
                    )
                    added += 1
                elif (bytes(old[0]), old[1]) != (digest, facts):
                    self._db.execute(
                        "UPDATE candidates SET text = ?, facts = ?, digest = ? WHERE id = ?",
                        (c.text, facts, digest, c.id),
                    )
                    changed += 1
            if added or changed:
                self._touch()
        return added, changed

    def delete(self, ids: Sequence[str]) -> int:
        """Delete candidates, their bytes overwritten, also in the journal; how many there were."""
        with self._transaction():
            gone = sum(self._db.execute("DELETE FROM candidates WHERE id = ?", (i,)).rowcount for i in ids)
            if gone:
                self._touch()
        if gone:
            with self._lock:
                (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise EngineUnavailable(
                    f"`{self.path}` is being read, and its journal may still hold who was deleted",
                    hint="close the other readers and delete again",
                )
        return gone

    def get(self, ids: Sequence[str]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for first in range(0, len(ids), KEYS_PER_QUERY):
            part = ids[first : first + KEYS_PER_QUERY]
            places = ",".join("?" * len(part))
            with self._lock:
                rows = self._db.execute(
                    f"SELECT number, id, text, facts, digest FROM candidates WHERE id IN ({places})", part
                ).fetchall()
            found |= {row.candidate.id: row for row in map(_row, rows)}
        return found

    def rows(self) -> Iterator[Row]:
        """Everybody, in order. A snapshot: what is written meanwhile is not seen."""
        reader = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=WAIT_S)
        try:
            for row in reader.execute("SELECT number, id, text, facts, digest FROM candidates ORDER BY number"):
                yield _row(row)
        finally:
            reader.close()

    def digests(self) -> dict[str, bytes]:
        """The digest of everybody's text, by id."""
        with self._lock:
            return {row[0]: bytes(row[1]) for row in self._db.execute("SELECT id, digest FROM candidates")}

    @property
    def revision(self) -> int:
        """Counts the changes of people."""
        return int(self.get_meta("revision") or 0)

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _touch(self) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('revision', ?)", (str(self.revision + 1),))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._lock, self._db, self.path)


class _Transaction:
    def __init__(self, lock: Any, db: sqlite3.Connection, path: Path) -> None:
        self._lock, self._db, self._path = lock, db, path

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._lock.release()
            raise EngineUnavailable(
                f"`{self._path}` cannot be written: {error}", hint="another process may be writing it"
            ) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error as failed:
            raise EngineUnavailable(f"`{self._path}` cannot be written: {failed}") from None
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise EngineUnavailable(f"`{self._path}` cannot be written: {error}") from None
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise InvalidRequest(f"a candidate's facts cannot be kept as JSON: {error}") from None


def _row(row: tuple[Any, ...]) -> Row:
    number, identity, text, facts, digest = row
    return Row(number, Candidate(identity, text, json.loads(facts)), bytes(digest))
