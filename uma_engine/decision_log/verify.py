"""Recomputes everything that seals a log and says in words what does not agree.

Knows rows and digests; does not know how they came to be. Reads inside the caller's transaction.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from uma_engine.decision_log import chain
from uma_engine.decision_log.forgetting import forgotten_parts
from uma_engine.decision_log.types import Verified
from uma_engine.errors import CorruptFile, InvalidRequest

__all__ = ["problems_of"]


def problems_of(db: sqlite3.Connection, root: bytes, key: bytes, head_path: Path, expect: str | None) -> Verified:
    """See `DecisionLog.verify`."""
    expected = None if expect is None else _parsed(expect)
    # The file by itself first: a search through a damaged index would miss what is there.
    problems = [f"the file is damaged: {said}" for (said,) in db.execute("PRAGMA integrity_check(10)") if said != "ok"]
    digests = {0: root}
    sealed_parts: dict[tuple[int, int], str] = {}
    tenants: dict[int, str] = {}
    forgets: list[tuple[int, Any]] = []
    count = 0
    for number, kind, header_bytes, body, digest in db.execute(
        "SELECT id, kind, header, body, digest FROM entries ORDER BY id"
    ):
        if number != count + 1:
            problems.append(
                f"entry {count + 1} is missing"
                if number == count + 2
                else f"entries {count + 1} to {number - 1} are missing"
            )
        if not all(isinstance(value, bytes) for value in (header_bytes, body, digest)):
            problems.append(f"entry {number} is not as the log writes it")
            digests[number], count = b"", number
            continue
        if chain.seal(digests.get(number - 1, b""), header_bytes) != digest:
            problems.append(f"entry {number}: its seal does not follow from its header and entry {number - 1}")
        digests[number], count = digest, number
        try:
            header = chain.decode(header_bytes)
            if (header["id"], header["kind"]) != (number, kind):
                problems.append(f"entry {number}: its header is that of entry {header['id']}, `{header['kind']}`")
            if chain.commitment(b"", body) != header["body"]:
                problems.append(f"entry {number}: its body was changed")
            tenants[number] = header["tenant"]
            for place, sealed in enumerate(header["parts"]):
                sealed_parts[number, place] = sealed
            if kind == "forget":
                forgets.append((number, chain.decode(body)))
        except (ValueError, KeyError, TypeError):
            problems.append(f"entry {number}: its header or body cannot be read")
    listed = {name for (name,) in db.execute("SELECT name FROM tenants")}
    if listed != set(tenants.values()):
        problems.append("the list of tenants is not that of the entries")
    try:
        forgotten = forgotten_parts(forgets)
    except (KeyError, TypeError, ValueError):
        forgotten = {}
        problems.append("an entry of forgetting does not say what was forgotten")
    seen = _check_parts(db, key, sealed_parts, tenants, problems)
    for entry, place in sorted(sealed_parts.keys() - seen - forgotten.keys()):
        problems.append(
            f"entry {entry}: candidate at place {place} was deleted, and no entry says that it was forgotten"
        )
    for entry, place in sorted(forgotten.keys() & seen):
        problems.append(
            f"entry {entry}: candidate at place {place} was forgotten by entry {forgotten[entry, place]} but is back"
        )
    if db.execute("SELECT 1 FROM meta WHERE key = 'scrub'").fetchone():
        problems.append("forgetting was interrupted: open the log for writing to finish it")
    _check_head(count, digests, head_path, problems)
    if expected is not None:
        number, wanted = expected
        if number > count:
            problems.append(f"{count} entries are left of the {number} that are expected")
        elif digests.get(number) != wanted:
            problems.append(f"entry {number} is `{digests.get(number, b'').hex()}` but `{wanted.hex()}` is expected")
    gone = len(sealed_parts.keys() & forgotten.keys() - seen)
    return Verified(count, len(sealed_parts), gone, f"{count}:{digests[count].hex()}", tuple(problems))


def _check_parts(
    db: sqlite3.Connection,
    key: bytes,
    sealed: dict[tuple[int, int], str],
    tenants: dict[int, str],
    problems: list[str],
) -> set[tuple[int, int]]:
    """The parts that are there, each against its commitment."""
    seen = set()
    for entry, place, who, salt, content in db.execute("SELECT entry, place, who, salt, content FROM parts"):
        where = f"entry {entry}: candidate at place {place}"
        seen.add((entry, place))
        if not all(isinstance(value, bytes) for value in (who, salt, content)):
            problems.append(f"{where} is not as the log writes it")
        elif (entry, place) not in sealed:
            problems.append(f"{where} was put in afterwards")
        elif chain.commitment(salt, content) != sealed[entry, place]:
            problems.append(f"{where} was changed")
        elif chain.who(key, tenants[entry], chain.decode(content)["id"]) != who:
            problems.append(f"{where} is listed as somebody else")
    return seen


def _check_head(count: int, digests: dict[int, bytes], head_path: Path, problems: list[str]) -> None:
    try:
        head = chain.read_head(head_path)
    except CorruptFile as error:
        problems.append(error.message)
        return
    if head is None:
        if count:
            problems.append(f"the head `{head_path.name}` is missing")
        return
    number, digest = head
    if number > count:
        problems.append(f"the end was cut off: {count} entries are left of {number}")
    elif digests.get(number) != digest:
        problems.append(f"entry {number} is not the one that the head names")
    elif number < count - 1:  # one may have been committed just now
        problems.append(f"{count - number} entries were put in behind the head")


def _parsed(expect: str) -> tuple[int, bytes]:
    count, _, digest = expect.partition(":")
    try:
        number, wanted = int(count), bytes.fromhex(digest)
    except ValueError:
        number, wanted = -1, b""
    if number < 0 or len(wanted) != 32:
        raise InvalidRequest(f"`expect` is `{expect}` but a head is COUNT:DIGEST", param="expect")
    return number, wanted
