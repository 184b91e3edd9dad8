"""The log itself: append, read, verify, export, forget.

Knows SQL and files; does not know engines. It is SQLite and not a JSONL file because forgetting must take bytes out of the middle while
everything around them stays, an append must be whole or absent after a kill at any point, and everything about one person must be
found without reading all. The chain of digests lies over the rows (`chain`): content is apart from what is sealed.

- A transaction an entry, in a rollback journal that is synced: after a kill the next opening rolls back or finds it whole.
- `PATH.head` holds count and last digest, written after the commit: an entry beyond it can be one at most (a kill between the two), and
  a tail cut off shows, as does an older copy put in place. Who can rewrite both files and recompute every digest is shown only by a head
  kept elsewhere: each answer carries one (`Logged.head`), and `verify(expect=...)` takes it.
- `PATH.lock` is held by the one writer; threads of its process take turns. Readers need no lock.
- Forgetting deletes rows with overwriting, appends an entry that says so, rebuilds the file (so that no page keeps what lay there
  before), and scans the bytes of all files of the log. A kill in between leaves a mark, and the next opening finishes.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uma_engine.decision_log import chain
from uma_engine.decision_log.export import export_of
from uma_engine.decision_log.forgetting import attribute, identifying
from uma_engine.decision_log.inputs import as_digests
from uma_engine.decision_log.parts import join, split
from uma_engine.decision_log.scan import patterns_of, scan
from uma_engine.decision_log.types import CONTENTS, Entry, Forgotten, Logged, Verified
from uma_engine.decision_log.verify import problems_of
from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest

__all__ = ["DecisionLog"]

WAIT_S = 10.0  # for a reader, or a writer's transaction, to end
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL)",
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, header BLOB NOT NULL, body BLOB NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE parts (entry INTEGER NOT NULL, place INTEGER NOT NULL, who BLOB NOT NULL, salt BLOB NOT NULL,"
    " content BLOB NOT NULL, PRIMARY KEY (entry, place))",
    "CREATE INDEX parts_who ON parts (who)",
    "CREATE TABLE tenants (name TEXT PRIMARY KEY)",
)
_HINT = "see what is wrong with `uma record verify`, keep the file, and start a new log"


class DecisionLog:
    """A log in the file `path`, made where there is none. Any thread may call it.

    `content`: "full" keeps what was asked word for word, so that a replay needs nothing else; "digest" keeps salted digests of job,
    texts and facts, and who replays brings them. `readonly`: for looking, beside a writer too; the file must be there.

    Errors: EngineUnavailable where another writer holds the log or the file cannot be written; CorruptFile where its end is not as it
    was left (`verify` looks at all of it); InvalidRequest
    """

    def __init__(self, path: str | Path, *, content: str = "full", readonly: bool = False) -> None:
        if content not in CONTENTS:
            raise InvalidRequest(f"`content` is `{content}` but must be one of {', '.join(CONTENTS)}", param="content")
        self.path = Path(path).expanduser().absolute()
        self.content = content
        self.readonly = readonly
        self._head_path = self.path.with_name(self.path.name + ".head")
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._lock_file: int | None = None
        try:
            with self._errors("opened"):
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> list[Path]:
        """Every file in which the log may hold bytes."""
        return [self.path.with_name(self.path.name + end) for end in ("", "-journal", "-wal", "-shm", ".head", ".lock")]

    # ---- in ----

    def append(self, record: Mapping[str, Any], *, tenant: str = "") -> Logged:
        """Keep a record; it is on the disk when this returns.

        Errors: InvalidRequest for what is no record; EngineUnavailable where it cannot be written: then nothing of it is kept
        """
        body, parts = split(as_digests(record) if self.content == "digest" else record)
        try:
            contents = [chain.encode(part) for part in parts]
            return self._append("rank", chain.encode(body), contents, [p["id"] for p in parts], tenant)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the record is not plain JSON data: {error}", hint="facts are numbers, strings, booleans or None"
            ) from None

    def forget(self, candidate_id: str, *, tenant: str | None = None, texts: Sequence[str] = ()) -> Forgotten:
        """Remove all that the log holds about a candidate, their id included, and prove it by a scan of its files.

        The chain stays whole and an entry says what was forgotten and when. `texts`: further texts of theirs to look for. Words are looked
        for in pieces of 48 characters, from 8 characters on. Nothing to forget is no error.
        Errors: InvalidRequest where the id is known in several tenants and none is named; EngineUnavailable where bytes may still be
        there: the log remembers, and finishes when it is opened or asked again
        """
        with self._lock:
            db = self._writable()
            where = self._tenant_of(candidate_id, tenant)
            who = chain.who(self._key, where, candidate_id)
            with self._errors("written"):
                rows = db.execute(
                    "SELECT entry, place, content FROM parts NOT INDEXED WHERE who = ? ORDER BY entry, place", (who,)
                ).fetchall()
                found = {*identifying(candidate_id, [chain.decode(c) for _, _, c in rows]), *texts}
                entry = None
                if rows:
                    gone = [[number, place] for number, place, _ in rows]
                    body = chain.encode({"who": who.hex(), "parts": gone})
                    entry = self._append("forget", body, [], [], where, forgotten=who)
                    self._scrub()
                elif self._meta("scrub"):
                    self._scrub()
                patterns = patterns_of(found)
                scanned, hits = scan(self.files, patterns)
                elsewhere = attribute(db, hits)
            records = tuple(dict.fromkeys(number for number, _, _ in rows))
            return Forgotten(entry, who.hex(), records, scanned, len(patterns), elsewhere, {})

    # ---- out ----

    def __len__(self) -> int:
        with self._lock, self._errors("read"):
            return int(self._connection().execute("SELECT count(*) FROM entries").fetchone()[0])

    def get(self, entry_id: int) -> Entry:
        """One entry; its record as it was given, but for what was forgotten. Errors: InvalidRequest for an id that is not there"""
        with self._lock, self._errors("read"):
            row = (
                self._connection()
                .execute("SELECT id, header, body, digest FROM entries WHERE id = ?", (entry_id,))
                .fetchone()
            )
            if row is None:
                raise InvalidRequest(f"the log has no entry {entry_id} but 1 to {len(self)}", param="record")
            return self._entry(row)

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """All entries, oldest first; of one kind where it is named."""
        with self._lock, self._errors("read"):
            rows = self._connection().execute(
                "SELECT id FROM entries WHERE kind = ? OR ? IS NULL ORDER BY id", (kind, kind)
            )
            numbers = [number for (number,) in rows]
        yield from map(self.get, numbers)

    def texts_of(self, candidate_id: str, *, tenant: str | None = None) -> list[str]:
        """The texts with which a candidate was ranked, each once. Empty where the log keeps digests."""
        found: dict[str, None] = {}
        for part in self._parts_of(candidate_id, self._tenant_of(candidate_id, tenant)):
            for item in part[2]["items"]:
                if isinstance(item.get("text"), str) and not item["text"].startswith("sha256:"):
                    found[item["text"]] = None
        return list(found)

    def export(self, candidate_id: str, *, tenant: str | None = None) -> dict[str, Any]:
        """Everything the log holds about one candidate, and nothing about anybody else, as plain data.

        Errors: InvalidRequest where it holds nothing, not even that they were forgotten, or the id is known in several tenants
        """
        with self._lock, self._errors("read"):
            where = self._tenant_of(candidate_id, tenant)
            who = chain.who(self._key, where, candidate_id)
            parts = self._parts_of(candidate_id, where)
            entries = [(self.get(number), place, part, seal) for number, place, part, seal in parts]
            forgets = [e for e in self.entries("forget") if e.record["who"] == who.hex()]
        if not parts and not forgets:
            raise InvalidRequest(
                f"the log holds nothing about `{candidate_id}`", hint="ids are those of `rank`", param="candidate"
            )
        return export_of(candidate_id, where, entries, forgets)

    def verify(self, expect: str | None = None) -> Verified:
        """Recompute every digest. `expect`: a head, `COUNT:DIGEST`, that was kept elsewhere. Errors: InvalidRequest for one that is none"""
        with self._lock, self._errors("read"):
            db = self._connection()
            db.execute("BEGIN")
            try:
                return problems_of(db, chain.root(self._log_id, self._key), self._key, self._head_path, expect)
            finally:
                db.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of file and lock. Idempotent."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._lock_file is not None:
                os.close(self._lock_file)  # which unlocks it
                self._lock_file = None

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the file ----

    def _open(self) -> None:
        if self.readonly:
            if not self.path.is_file():
                raise InvalidRequest(f"there is no decision log `{self.path}`", param="log")
        else:
            self._take_lock()
            if not self.path.exists() and self._head_path.exists():
                raise CorruptFile(f"`{self._head_path}` is there but the log `{self.path}` is not", hint=_HINT)
        # A journal left by a kill must be rolled back, which a connection that may not write cannot do.
        uri = f"{self.path.as_uri()}?mode={'rw' if self.readonly else 'rwc'}"
        try:
            db = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            self._db = db
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            if not self.readonly:
                raise
            uri = f"{self.path.as_uri()}?mode=ro"
            self._db = db = sqlite3.connect(
                uri, uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False
            )
        for pragma in ("secure_delete = ON", "synchronous = FULL"):
            db.execute(f"PRAGMA {pragma}")
        if self.readonly:
            db.execute("PRAGMA query_only = ON")
        else:
            db.execute(
                "PRAGMA journal_mode = TRUNCATE"
            )  # its end is synced at a commit, so that no kill brings it back
            self._make_tables(db)
        self._log_id, self._key = self._meta("log_id"), self._meta("key")
        if not self._log_id or not self._key:
            raise CorruptFile(f"`{self.path}` is not a decision log", hint="name a file that an engine's log was")
        if not self.readonly:
            self._check_end()
            if self._meta("scrub"):
                self._scrub()

    def _take_lock(self) -> None:
        path = self.path.with_name(self.path.name + ".lock")
        self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock_file, 32, 0).decode("ascii", "replace").strip()
            raise EngineUnavailable(
                f"the decision log `{self.path}` is being written by process {holder or 'unknown'}",
                hint="one engine writes a log: give this one another file, or ask that one (`engine.forget`)",
            ) from None
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, str(os.getpid()).encode(), 0)

    def _make_tables(self, db: sqlite3.Connection) -> None:
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return
        os.chmod(self.path, 0o600)  # noqa: PTH101
        db.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            db.execute(table)
        made = {"format": chain.FORMAT.encode(), "log_id": secrets.token_bytes(16), "key": secrets.token_bytes(32)}
        db.executemany("INSERT INTO meta VALUES (?, ?)", made.items())
        db.execute("COMMIT")

    def _check_end(self) -> None:
        """The last entry is sealed as it should be and is the one that the head names, or the one after it."""
        count, digest = self._end()
        head = chain.read_head(self._head_path)
        if head is None and count == 0:
            head = (0, digest)
        if head is not None and head[0] == count - 1 and self._digest_of(head[0]) == head[1]:
            head = (count, digest)  # killed between the commit and the head
        if head != (count, digest):
            said = "there is no head" if head is None else f"the head says {head[0]} entries, the last {head[1].hex()}"
            raise CorruptFile(f"`{self.path}` has {count} entries, the last {digest.hex()}, but {said}", hint=_HINT)
        if count:
            header, found = self._connection().execute(
                "SELECT header, digest FROM entries WHERE id = ?", (count,)
            ).fetchone()  # fmt: skip
            if chain.seal(self._digest_of(count - 1), header) != found:
                raise CorruptFile(f"`{self.path}`: the seal of entry {count} is broken", hint=_HINT)
        chain.write_head(self._head_path, count, digest)

    def _end(self) -> tuple[int, bytes]:
        count = self._connection().execute("SELECT coalesce(max(id), 0) FROM entries").fetchone()[0]
        return count, self._digest_of(count)

    def _digest_of(self, number: int) -> bytes:
        if number == 0:
            return chain.root(self._log_id, self._key)
        row = self._connection().execute("SELECT digest FROM entries WHERE id = ?", (number,)).fetchone()
        return b"" if row is None else row[0]

    def _append(
        self,
        kind: str,
        body: bytes,
        contents: Sequence[bytes],
        ids: Sequence[str],
        tenant: str,
        forgotten: bytes | None = None,
    ) -> Logged:
        salts = [secrets.token_bytes(chain.SALT_BYTES) for _ in contents]
        header: dict[str, Any] = {
            "kind": kind,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "tenant": tenant,
            "content": self.content,
            "body": chain.commitment(b"", body),
            "parts": [chain.commitment(salt, content) for salt, content in zip(salts, contents, strict=True)],
        }
        with self._lock, self._errors("written"):
            db = self._writable()
            db.execute("BEGIN IMMEDIATE")
            try:
                count, previous = self._end()
                number = count + 1
                sealed = chain.encode({"id": number} | header)
                digest = chain.seal(previous, sealed)
                db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (number, kind, sealed, body, digest))
                db.execute("INSERT OR IGNORE INTO tenants VALUES (?)", (tenant,))
                db.executemany(
                    "INSERT INTO parts VALUES (?, ?, ?, ?, ?)",
                    [
                        (number, place, chain.who(self._key, tenant, name), salt, content)
                        for place, (name, salt, content) in enumerate(zip(ids, salts, contents, strict=True))
                    ],
                )
                if forgotten is not None:
                    db.execute("DELETE FROM parts NOT INDEXED WHERE who = ?", (forgotten,))
                    db.execute("INSERT OR REPLACE INTO meta VALUES ('scrub', ?)", (b"1",))
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            chain.write_head(self._head_path, number, digest)
        return Logged(number, digest.hex())

    def _scrub(self) -> None:
        """Rebuild the file from what is left; no page keeps anything else."""
        db = self._writable()
        db.execute("VACUUM")
        db.execute("DELETE FROM meta WHERE key = 'scrub'")

    # ---- small things ----

    def _meta(self, key: str) -> bytes:
        try:
            row = self._connection().execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.OperationalError as error:
            raise CorruptFile(f"`{self.path}` is not a decision log: {error}") from None
        return b"" if row is None else row[0]

    def _entry(self, row: tuple[int, bytes, bytes, bytes]) -> Entry:
        number, header_bytes, body, digest = row
        header = chain.decode(header_bytes)
        rows = self._connection().execute("SELECT place, content FROM parts WHERE entry = ?", (number,))
        parts = {place: chain.decode(content) for place, content in rows}
        count = len(header["parts"])
        record = join(chain.decode(body), parts)
        kind, at, tenant, content = (header[key] for key in ("kind", "at", "tenant", "content"))
        return Entry(number, kind, at, tenant, content, digest.hex(), count, count - len(parts), record)

    def _parts_of(self, candidate_id: str, tenant: str) -> list[tuple[int, int, dict[str, Any], tuple[str, str]]]:
        """Entry, place, content, and salt and commitment of all that is about a candidate."""
        who = chain.who(self._key, tenant, candidate_id)
        with self._lock, self._errors("read"):
            rows = self._connection().execute(
                "SELECT entry, place, salt, content FROM parts WHERE who = ? ORDER BY entry, place", (who,)
            )
            return [(e, p, chain.decode(c), (s.hex(), chain.commitment(s, c))) for e, p, s, c in rows]

    def _tenant_of(self, candidate_id: str, tenant: str | None) -> str:
        """The tenant that is meant: the one named, or the only one in which the id is known."""
        if tenant is not None:
            return tenant
        with self._lock, self._errors("read"):
            db = self._connection()
            known = [name for (name,) in db.execute("SELECT name FROM tenants ORDER BY name")]
            found = []
            for name in known:
                who = chain.who(self._key, name, candidate_id)
                if db.execute("SELECT 1 FROM parts WHERE who = ?", (who,)).fetchone():
                    found.append(name)
        if len(found) > 1:
            raise InvalidRequest(
                f"`{candidate_id}` is known in {len(found)} tenants: {', '.join(f'`{name}`' for name in found)}",
                hint="name one: they may be different people",
                param="tenant",
            )
        return found[0] if found else (known[0] if len(known) == 1 else "")

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise EngineUnavailable(f"the decision log `{self.path}` is closed")
        return self._db

    def _writable(self) -> sqlite3.Connection:
        if self.readonly:
            raise InvalidRequest(f"the decision log `{self.path}` was opened for reading", param="readonly")
        return self._connection()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Failures of files, of SQLite and of what lies there as errors for a caller."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise EngineUnavailable(
                f"the decision log `{self.path}` cannot be {what}: {error}",
                hint="make room or give permission there; where it is locked, let the other process end and try again",
            ) from error
        except (
            sqlite3.DatabaseError,
            ValueError,
            LookupError,
            TypeError,
        ) as error:  # also of what was read and is no entry
            raise CorruptFile(f"the decision log `{self.path}` is damaged: {error}", hint=_HINT) from error
        except OSError as error:
            raise EngineUnavailable(
                f"the decision log `{self.path}` cannot be {what}: {error.strerror or error}",
                hint="name a file in a directory of yours",
            ) from error
