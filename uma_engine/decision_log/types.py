"""What the log's methods return.

Knows names and numbers; does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from uma_engine.config import LOG_CONTENTS as CONTENTS

__all__ = ["CONTENTS", "Entry", "Forgotten", "Logged", "Verified"]


@dataclass(frozen=True, slots=True)
class Logged:
    """Where an answer's record went: its id in the log, and the digest that seals it and everything before it.

    Who keeps `head`, anywhere else, can prove later that the log was neither shortened nor rewritten up to there.
    """

    id: int
    digest: str

    @property
    def head(self) -> str:
        return f"{self.id}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: `kind` is `rank` or `forget`, `record` its data. `forgotten` counts people whose content is gone from it,
    `num_candidates` all who were in it, those whom a cascade did not read too."""

    id: int
    kind: str
    at: str
    tenant: str
    content: str
    digest: str
    num_candidates: int
    forgotten: int
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found. `problems` says in words what was tampered with or lost; empty: every byte is what was written.

    `head`, as `COUNT:DIGEST`, is what to keep elsewhere and to give to a later `verify` as `expect`.
    """

    entries: int
    candidates: int
    forgotten: int
    head: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` did and what its scan found.

    `entry` is the log's entry that says so, None where the log held nothing of the person. `records`: ids of the records that lost
    content. `who` stands for the person in that entry: a keyed digest of tenant and id. `scanned_bytes` of the log's files were
    searched for `patterns` byte strings; `found_elsewhere` names other places that hold the same words, such as another candidate
    with the same text or the job post: they belong to somebody else and stay. `stores`: what other stores say they deleted, by name.
    """

    entry: Logged | None
    who: str
    records: tuple[int, ...]
    scanned_bytes: int
    patterns: int
    found_elsewhere: tuple[str, ...]
    stores: Mapping[str, int]

    @property
    def clean(self) -> bool:
        """No byte string of theirs is in any file of the log."""
        return not self.found_elsewhere

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"clean": self.clean}
