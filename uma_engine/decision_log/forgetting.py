"""Which words identify a person, and whose else they are where a scan still finds them.

Knows parts and rows; does not know how rows are deleted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uma_engine.decision_log.parts import strings_of
from uma_engine.errors import EngineUnavailable

__all__ = ["attribute", "identifying"]

MIN_WRITTEN = 32  # characters: what was written about somebody is sentences; a factor's name is everybody's


def identifying(candidate_id: str, parts: Iterable[Mapping[str, Any]]) -> set[str]:
    """The id, the candidate's own words (text and facts), and sentences that were written about them."""
    found = {candidate_id}
    for part in parts:
        for item in part["items"]:
            own = isinstance(item, Mapping) and "text" in item and "facts" in item
            found.update(text for text in strings_of(item) if own or len(text) >= MIN_WRITTEN)
    return found


def attribute(db: sqlite3.Connection, hits: Mapping[bytes, Sequence[Path]]) -> tuple[str, ...]:
    """Places of others that hold the same bytes. Errors: EngineUnavailable where bytes are in a file and in no living row"""
    elsewhere: dict[str, None] = {}
    for pattern, files in hits.items():
        living = [
            f"record {number}, candidate at place {place}"
            for number, place in db.execute(
                "SELECT entry, place FROM parts WHERE instr(content, ?) ORDER BY entry, place", (pattern,)
            )
        ]
        living += [
            f"entry {number}, what was asked of everybody"
            for (number,) in db.execute(
                "SELECT id FROM entries WHERE instr(body, ?) OR instr(header, ?) ORDER BY id", (pattern, pattern)
            )
        ]
        if not living:
            raise EngineUnavailable(
                f"`{files[0]}` still holds bytes of who was to be forgotten, {len(pattern)} of them in one place",
                hint="close what uses the log and forget again",
            )
        elsewhere.update(dict.fromkeys(living))
    return tuple(elsewhere)


def forgotten_parts(entries: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[tuple[int, int], int]:
    """For each part that is said to be forgotten the entry that says so; `entries` are those of forgetting, id and body."""
    return {(number, place): by for by, body in entries for number, place in body["parts"]}
