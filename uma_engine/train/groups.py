"""Judged jobs: a job post, candidates, and how well each fits, one job a line of JSON.

    {"id": "15-1252.00/tasks", "job": "...", "candidates": [{"id": "2512.4", "text": "...", "grade": 3}, ...], "missed": [2, 1]}

`missed`, which may be left out: grades of those who fit and are no candidates here, since a first stage did not find them. A candidate may
have a `prior`: log-odds of fitting that were known before reading, such as a first stage's; training and ranking add them to the model's.
Knows the file's form and what an epoch draws from a job; does not know tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from uma_engine.errors import InvalidRequest

__all__ = ["Group", "Judged", "file_digest", "numbered_lines", "read_groups", "share_of", "spread", "write_groups"]

MAX_GRADE = 10
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate of a job; `grade` is 0 for one that does not fit, and larger for a better fit. `prior`: log-odds known before reading."""

    id: str
    text: str
    grade: int
    prior: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """One job with its candidates."""

    id: str
    job: str
    candidates: tuple[Judged, ...]
    missed: tuple[int, ...] = ()

    @property
    def ideal(self) -> list[int]:
        """All grades there are: what a perfect order would be made of."""
        return [*(c.grade for c in self.candidates), *self.missed]

    def draw(self, count: int, seed: int) -> tuple[Judged, ...]:
        """At most `count` candidates: graded ones first, at most half of them, then others; in a random order. A function of `seed`."""
        rng = random.Random(f"{seed}:{self.id}")
        good = [c for c in self.candidates if c.grade > 0]
        bad = [c for c in self.candidates if c.grade == 0]
        rng.shuffle(good)
        rng.shuffle(bad)
        kept = good[: max(1, count // 2, count - len(bad))]
        chosen = (kept + bad)[:count]
        rng.shuffle(chosen)
        return tuple(chosen)


def read_groups(path: str | Path) -> list[Group]:
    """All jobs of a file. Errors: InvalidRequest naming the line"""
    groups: list[Group] = []
    seen: set[str] = set()
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    groups.append(_group(line, f"`{path}`, line {number}"))
                    if groups[-1].id in seen:
                        raise InvalidRequest(f"`{path}`, line {number}: the id `{groups[-1].id}` was there before")
                    seen.add(groups[-1].id)
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}", param="data") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"`{path}` is not UTF-8", param="data") from None
    if not groups:
        raise InvalidRequest(f"`{path}` holds no jobs", param="data")
    return groups


def numbered_lines(path: str | Path, param: str = "data") -> list[tuple[int, str]]:
    """The lines of a JSONL file that are not blank, with their numbers. Errors: InvalidRequest"""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error}", param=param) from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly over the list, which may be ordered by what they are about."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def share_of(name: str) -> float:
    """From 0 to below 1, always the same for a name: what splits that must not change are made of."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def _group(line: str, where: str) -> Group:
    try:
        data: Any = json.loads(line)
        candidates = tuple(Judged(c["id"], c["text"], c["grade"], c.get("prior", 0.0)) for c in data["candidates"])
        group = Group(data["id"], data["job"], candidates, tuple(data.get("missed", ())))
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{where}: {type(error).__name__}: {error}",
            hint='a line is {"id": ..., "job": ..., "candidates": [{"id": ..., "text": ..., "grade": 0}, ...]}',
            param="data",
        ) from None
    texts = [group.id, group.job, *(t for c in candidates for t in (c.id, c.text))]
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise InvalidRequest(f"{where}: ids and texts must be strings with something in them", param="data")
    for of, grade in [*((f"`{c.id}`", c.grade) for c in candidates), *(("one missed", g) for g in group.missed)]:
        if isinstance(grade, bool) or not isinstance(grade, int) or not 0 <= grade <= MAX_GRADE:
            raise InvalidRequest(
                f"{where}: the grade of {of} is `{grade}` but must be an integer from 0 to {MAX_GRADE}", param="data"
            )
    for c in candidates:
        if isinstance(c.prior, bool) or not isinstance(c.prior, int | float) or not math.isfinite(c.prior):
            raise InvalidRequest(
                f"{where}: the prior of `{c.id}` is `{c.prior}` but must be a finite number", param="data"
            )
    if len({c.id for c in candidates}) != len(candidates) or len(candidates) < 2:
        raise InvalidRequest(f"{where}: a job needs at least two candidates with ids of their own", param="data")
    return group


def write_groups(path: str | Path, groups: Iterable[Group]) -> int:
    """Write a file that `read_groups` reads, whole or not at all; how many jobs. Errors: InvalidRequest"""
    target = Path(path)
    partial = target.with_name(f".{target.name}.part")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for line in _lines(groups):
                file.write(line)
                count += 1
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InvalidRequest(f"`{path}` cannot be written: {error.strerror}", param="out") from None
    return count


def _lines(groups: Iterable[Group]) -> Iterator[str]:
    for g in groups:
        candidates = [
            {"id": c.id, "text": c.text, "grade": c.grade} | ({"prior": c.prior} if c.prior else {})
            for c in g.candidates
        ]
        data: dict[str, Any] = {"id": g.id, "job": g.job, "candidates": candidates}
        if g.missed:
            data["missed"] = list(g.missed)
        yield json.dumps(data, ensure_ascii=False) + "\n"


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
