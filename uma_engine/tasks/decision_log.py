"""The decision log: every ranking's record, appended to one local SQLite file whose entries are chained by digests.

Knows records as plain data, how they are split into what the chain holds and what may be forgotten, and how a change is found.
Does not know how an answer is computed.

Why SQLite and not a file of lines: somebody's content must be removable. The chain therefore holds commitments (digests of
salted content) and the content lies in a table of its own: deleting a row leaves every link of the chain as it was, and a
digest whose salt is gone says nothing about a short text. SQLite brings the rest: an append is whole or absent after a kill or on
a full disk, several processes may write, and deleted bytes are overwritten (`secure_delete`) and the file rewritten (`VACUUM`).

    entry     sequence, id, kind (decision | forget), created_at, body, chain = sha256(chain before + header + body)
    content   of an entry: position -1 the job, 0.. the candidates with their results; salt, body

Whoever may rewrite the file as a whole can also rewrite the chain; an answer's `LogReceipt`, kept elsewhere, anchors it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from uma_engine.config import LOG_INPUTS
from uma_engine.errors import EngineUnavailable, InvalidRequest
from uma_engine.tasks.results import LogReceipt

__all__ = ["DecisionLog", "Entry", "Forgetter", "Forgotten", "Verification"]

APPLICATION_ID = 0x756D6131  # "uma1", in the file's header
VERSION = 1
JOB = -1  # the position of the job among an entry's contents
WAIT_S = 20.0  # for another process that writes
MIN_PIECE = 12  # characters of a text that a scan looks for: shorter pieces are anybody's

_SCHEMA = """
CREATE TABLE entries (
  sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, created_at TEXT NOT NULL,
  body TEXT NOT NULL, chain BLOB NOT NULL);
CREATE TABLE contents (
  sequence INTEGER NOT NULL, position INTEGER NOT NULL, candidate TEXT, salt BLOB NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (sequence, position));
CREATE INDEX contents_by_candidate ON contents (candidate);
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER contents_stay BEFORE UPDATE ON contents BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""


class Forgetter(Protocol):
    """Something else that holds candidates' content: an index, a cache of vectors."""

    def forget_candidate(self, candidate_id: str, texts: Sequence[str]) -> int:
        """Remove what there is of the candidate; how many things that were. `texts` are all that the log knew."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log as `entries` lists it. `candidates` were ranked; of these `forgotten` are gone."""

    sequence: int
    id: str
    kind: str
    created_at: str
    chain: str
    candidates: int
    forgotten: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` did: how many entries' contents were removed, and where a scan of every byte still found some (nowhere)."""

    candidate_id: str
    contents: int
    elsewhere: int
    scanned_files: tuple[str, ...]
    scanned_bytes: int
    still_found: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """`problems` in words, none when the log is as it was written; `head` is the last entry's receipt."""

    entries: int
    head: LogReceipt | None
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class DecisionLog:
    """An append-only log in `path`. Any thread may call it; other processes may have it open.

    `inputs`: "full" keeps the job and the candidates' texts, so that `uma replay` recomputes an entry; "digest" keeps their
    SHA-256 instead, which proves what was asked to whoever still has the texts, and no more.
    Errors:  InvalidRequest when `path` is no decision log; EngineUnavailable when it cannot be written
    """

    def __init__(self, path: str | Path, *, inputs: str = "full", create: bool = True) -> None:
        if inputs not in LOG_INPUTS:
            raise InvalidRequest(f"`inputs` is `{inputs}` but must be one of {', '.join(LOG_INPUTS)}", param="inputs")
        self.path = Path(path).expanduser().absolute()
        self.inputs = inputs
        self._lock = threading.Lock()
        if not create and not self.path.exists():
            raise InvalidRequest(f"`{self.path}` does not exist", hint="name a decision log", param="decision_log")
        try:
            # People's content: nobody else on the machine reads it.
            os.close(os.open(self.path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600))
            self._connection = sqlite3.connect(self.path, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise InvalidRequest(
                f"`{self.path}` cannot be used as a decision log: {error}",
                hint="name a new file, or one that was written by the engine",
                param="decision_log",
            ) from None

    def _prepare(self) -> None:
        db = self._connection
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN EXCLUSIVE")  # another process may be making the same file
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("COMMIT")
        (kind,), (version,) = (db.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version"))
        if kind != APPLICATION_ID:
            raise sqlite3.DatabaseError("it is another program's database")
        if version != VERSION:
            raise sqlite3.DatabaseError(f"it has format {version} and this engine writes {VERSION}")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # -- writing ----------------------------------------------------------------------------------------------------

    def append(self, record: Mapping[str, Any]) -> LogReceipt:
        """Append one decision record; whole or not at all. Errors: EngineUnavailable"""
        frame = {k: v for k, v in record.items() if k not in ("query", "candidates", "results")}
        contents = [(JOB, None, _text_of({"query": self._input(record["query"])}))]
        for position, (person, result) in enumerate(zip(record["candidates"], record["results"], strict=True)):
            kept = {**person, "text": self._input(person["text"])}
            contents.append((position, person["id"], _text_of({"candidate": kept, "result": result})))
        salts = [secrets.token_bytes(16) for _ in contents]
        commitments = [_commit(salt, body) for salt, (_, _, body) in zip(salts, contents, strict=True)]
        body = _text_of({"frame": frame, "job": commitments[0], "items": commitments[1:]})
        with self._writing():
            receipt = self._append("decision", body)
            self._connection.executemany(
                "INSERT INTO contents VALUES (?, ?, ?, ?, ?)",
                [(receipt.sequence, p, c, salt, b) for salt, (p, c, b) in zip(salts, contents, strict=True)],
            )
        return receipt

    def _input(self, text: str) -> Any:
        return text if self.inputs == "full" else {"sha256": hashlib.sha256(text.encode()).hexdigest()}

    def _append(self, kind: str, body: str) -> LogReceipt:
        last = self._connection.execute(
            "SELECT sequence, chain FROM entries ORDER BY sequence DESC LIMIT 1"
        ).fetchone() or (0, b"")
        sequence, created = last[0] + 1, datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry_id = secrets.token_hex(8)
        chain = _link(last[1], sequence, entry_id, kind, created, body)
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", (sequence, entry_id, kind, created, body, chain)
        )
        return LogReceipt(entry_id, sequence, chain.hex())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, ended as a whole."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise EngineUnavailable(
                    f"`{self.path}` cannot be written: {error}",
                    hint="no decision is given that is not logged: make room, or start without `decision_log`",
                ) from None

    # -- reading ----------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """All entries in order."""
        left = dict(self._rows("SELECT sequence, count(*) FROM contents WHERE position >= 0 GROUP BY sequence"))
        for sequence, entry_id, kind, created, body, chain in self._rows(
            "SELECT sequence, id, kind, created_at, body, chain FROM entries ORDER BY sequence"
        ):
            count = len(json.loads(body)["items"]) if kind == "decision" else 0
            yield Entry(sequence, entry_id, kind, created, chain.hex(), count, count - left.get(sequence, 0))

    def record(self, entry_id: str) -> dict[str, Any]:
        """The decision record of an entry, as `append` got it, but for candidates that were forgotten since: these are left out,
        and `forgotten` counts them. Errors: InvalidRequest for an unknown id, for an entry that was tampered with
        """
        sequence, body = self._entry(entry_id)
        data = json.loads(body)
        contents = self._contents(sequence)
        record = dict(data["frame"])
        job = contents.get(JOB)
        if job is None:
            raise InvalidRequest(f"entry `{entry_id}` has lost its job", hint="`uma record verify` says more")
        record["query"] = _opened(entry_id, job, data["job"])["query"]
        record["candidates"], record["results"] = [], []
        for position, commitment in enumerate(data["items"]):
            if position in contents:
                item = _opened(entry_id, contents[position], commitment)
                record["candidates"].append(item["candidate"])
                record["results"].append(item["result"])
        record["forgotten"] = len(data["items"]) - len(record["candidates"])
        return record

    def export(self, candidate_id: str) -> list[dict[str, Any]]:
        """Everything the log holds of one candidate, and nothing of anybody else: an object for each decision."""
        found = []
        for sequence, position in self._rows(
            "SELECT sequence, position FROM contents WHERE candidate = ? ORDER BY sequence, position", (candidate_id,)
        ):
            ((entry_id, created, body),) = self._rows(
                "SELECT id, created_at, body FROM entries WHERE sequence = ?", (sequence,)
            )
            data, contents = json.loads(body), self._contents(sequence)
            item = _opened(entry_id, contents[position], data["items"][position])
            job = _opened(entry_id, contents[JOB], data["job"])["query"] if JOB in contents else None
            frame = {k: v for k, v in data["frame"].items() if k in ("options", "stack", "adapters", "warnings")}
            found.append(
                {"entry": entry_id, "decided_at": created, "job": job, **item, "pool": len(data["items"]), **frame}
            )
        return found

    def verify(self, receipts: Iterable[LogReceipt] = ()) -> Verification:
        """Recompute every link and every commitment. `receipts` of answers, kept elsewhere, find a log that was cut or remade."""
        problems, heads, chain, expected = [], {}, b"", 1
        forgotten: set[tuple[int, int]] = set()
        stored = {
            (s, p): (salt, body)
            for s, p, salt, body in self._rows("SELECT sequence, position, salt, body FROM contents")
        }
        known: dict[tuple[int, int], str] = {}
        head = None
        for sequence, entry_id, kind, created, body, link in self._rows(
            "SELECT sequence, id, kind, created_at, body, chain FROM entries ORDER BY sequence"
        ):
            if sequence != expected:
                problems.append(f"entry {expected} is missing")
            if _link(chain, sequence, entry_id, kind, created, body) != link:
                problems.append(f"entry {sequence} (`{entry_id}`) does not follow from the one before")
            chain, expected = link, sequence + 1
            head = LogReceipt(entry_id, sequence, link.hex())
            heads[sequence] = head
            try:
                data = json.loads(body)
                if kind == "decision":
                    known |= {(sequence, p): c for p, c in enumerate([data["job"], *data["items"]], JOB)}
                else:
                    forgotten |= {(s, p) for s, p in data["contents"]}
            except (ValueError, KeyError, TypeError):
                problems.append(f"entry {sequence} (`{entry_id}`) cannot be read")
        for place, commitment in known.items():
            where = f"entry {place[0]}, " + ("the job" if place[1] == JOB else f"candidate {place[1]}")
            if place in stored:
                salt, text = stored[place]
                if place in forgotten:
                    problems.append(f"{where}: was forgotten and is there again")
                if not isinstance(text, str) or _commit(salt, text) != commitment:
                    problems.append(f"{where}: the content is not what was decided on")
            elif place not in forgotten:
                problems.append(f"{where}: the content is missing and was never forgotten")
        problems += [f"content {place} belongs to no entry" for place in stored.keys() - known.keys()]
        problems += [
            f"receipt of `{r.id}` (entry {r.sequence}) does not fit: the log was cut or remade"
            for r in receipts
            if heads.get(r.sequence) != r
        ]
        return Verification(expected - 1, head, tuple(problems))

    # -- forgetting -------------------------------------------------------------------------------------------------

    def forget(self, candidate_id: str, *, elsewhere: Iterable[Forgetter] = ()) -> Forgotten:
        """Remove a candidate's content (texts, facts, ledgers, scores, id) from all entries and from what is given beside,
        and prove it: every byte of the log's files is searched for the id and the texts. The chain stays whole; an entry says what
        was removed and when, not whose it was. Errors: EngineUnavailable while another process reads the file, or if the scan finds some
        """
        rows = list(
            self._rows(
                "SELECT sequence, position, body FROM contents WHERE candidate = ? ORDER BY sequence, position",
                (candidate_id,),
            )
        )
        texts = list(dict.fromkeys(_full_text(json.loads(body)) for _, _, body in rows))
        others = sum(f.forget_candidate(candidate_id, [t for t in texts if t]) for f in elsewhere)
        if rows:
            with self._writing():
                self._append("forget", _text_of({"contents": [[s, p] for s, p, _ in rows]}))
                self._connection.execute("DELETE FROM contents WHERE candidate = ?", (candidate_id,))
        self._rewrite()
        pieces = _pieces(candidate_id, texts) if rows else []
        found, files, size = self._scan(pieces)
        if found:
            raise EngineUnavailable(f"the content of a forgotten candidate is still in {', '.join(found)}")
        return Forgotten(candidate_id, len(rows), others, files, size, found)

    def _rewrite(self) -> None:
        """Leave no deleted byte in the journal or in free pages."""
        with self._lock:
            try:
                self._connection.execute("VACUUM")
                (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as error:
                busy, reason = 1, str(error)
            else:
                reason = "another process is reading it"
            if busy:
                raise EngineUnavailable(
                    f"`{self.path}` may still hold deleted bytes: {reason}", hint="stop what uses it, and forget again"
                )

    def _scan(self, pieces: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        """Where pieces occur that nobody else's content holds; the files and bytes that were searched."""
        kept = [row[0] for row in self._rows("SELECT body FROM contents")]
        own = [p for p in pieces if not any(_inside_json(p) in body for body in kept)]
        files = [p for p in sorted(self.path.parent.glob(self.path.name + "*")) if p.is_file()]
        found, size = [], 0
        for file in files:
            data = file.read_bytes()
            size += len(data)
            for piece in own:
                forms = {
                    piece.encode(),
                    _inside_json(piece).encode(),
                    piece.encode("utf-16-le"),
                    json.dumps(piece)[1:-1].encode(),
                }
                if any(form in data for form in forms):
                    found.append(file.name)
                    break
        return tuple(found), tuple(f.name for f in files), size

    # -- rows -------------------------------------------------------------------------------------------------------

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise InvalidRequest(
                    f"`{self.path}` cannot be read: {error}", hint="the file is damaged", param="decision_log"
                ) from None

    def _entry(self, entry_id: str) -> tuple[int, str]:
        rows = self._rows("SELECT sequence, kind, body FROM entries WHERE id = ?", (entry_id,))
        if not rows:
            raise InvalidRequest(
                f"`{self.path}` has no entry `{entry_id}`", hint="`uma record list LOG` shows them", param="id"
            )
        sequence, kind, body = rows[0]
        if kind != "decision":
            raise InvalidRequest(f"entry `{entry_id}` is a `{kind}`, not a decision", param="id")
        return sequence, body

    def _contents(self, sequence: int) -> dict[int, tuple[bytes, str]]:
        rows = self._rows("SELECT position, salt, body FROM contents WHERE sequence = ?", (sequence,))
        return {position: (salt, body) for position, salt, body in rows}


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, which `executescript` would run outside of our transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _text_of(data: Mapping[str, Any]) -> str:
    """JSON that is the same for the same data."""
    return json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _commit(salt: bytes, body: str) -> str:
    return hashlib.sha256(salt + body.encode()).hexdigest()


def _link(before: bytes, sequence: int, entry_id: str, kind: str, created: str, body: str) -> bytes:
    """The chain's next value. Lengths are part of it, so that no two entries spell the same bytes."""
    h = hashlib.sha256(before)
    for part in (str(sequence), entry_id, kind, created, body):
        data = str(part).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.digest()


def _opened(entry_id: str, content: tuple[bytes, str], commitment: str) -> Any:
    salt, body = content
    if _commit(salt, body) != commitment:
        raise InvalidRequest(
            f"entry `{entry_id}` was tampered with: a content is not what was decided on",
            hint="`uma record verify` lists every place",
            param="decision_log",
        )
    return json.loads(body)


def _full_text(item: Mapping[str, Any]) -> str:
    text = item["candidate"]["text"]
    return text if isinstance(text, str) else ""


def _pieces(candidate_id: str, texts: Iterable[str]) -> list[str]:
    """What a scan looks for: the lines of the texts, and the id where it is long enough to be nobody else's."""
    lines = {line.strip() for text in texts for line in text.splitlines()} | {candidate_id}
    return sorted(line for line in lines if len(line) >= MIN_PIECE)


def _inside_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
