"""What people said and marked: conversations with the replies that were compared, who marked them how, consent and licence.

Knows the form of such data, an importer for UPHELD, and how marks become grades; does not know training. A line is one conversation:

    {"id": "...", "source": "...", "licence": "CC BY 4.0", "consent": "...", "turns": [{"role": "user", "text": "..."}],
     "replies": [{"id": "a", "author": "person", "text": "...", "marks": [{"by": "3", "of": "content", "value": 4}]}]}
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest
from uma_engine.train.agreement import Level, krippendorff_alpha
from uma_engine.train.groups import Group, Judged, numbered_lines, share_of

__all__ = [
    "Conversation",
    "Mark",
    "Reply",
    "Turn",
    "agreement",
    "import_upheld",
    "read_conversations",
    "to_groups",
    "write_conversations",
]

ROLES = ("user", "assistant", "system")
LAST_TURNS = 6  # that a reply is judged by


@dataclass(frozen=True, slots=True)
class Mark:
    """`by`: who, `of`: which quality."""

    by: str
    of: str
    value: float


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One of several that could have come next. `author`: a person or a model by name."""

    id: str
    author: str
    text: str
    marks: tuple[Mark, ...] = ()

    def mean(self, of: str) -> float | None:
        values = [m.value for m in self.marks if m.of == of]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    source: str
    licence: str
    consent: str
    turns: tuple[Turn, ...]
    replies: tuple[Reply, ...]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Errors: InvalidRequest naming the line"""
    found, seen = [], set()
    for number, line in numbered_lines(path):
        try:
            conversation = _conversation(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"`{path}`, line {number}: {type(error).__name__}: {error}", param="data") from None
        if conversation.id in seen:
            raise InvalidRequest(f"`{path}`, line {number}: `{conversation.id}` was there before", param="data")
        seen.add(conversation.id)
        found.append(conversation)
    return found


def _conversation(data: dict[str, Any]) -> Conversation:
    turns = tuple(Turn(t["role"], t["text"]) for t in data["turns"])
    replies = tuple(
        Reply(r["id"], r["author"], r["text"], tuple(Mark(m["by"], m["of"], m["value"]) for m in r.get("marks", ())))
        for r in data["replies"]
    )
    conversation = Conversation(data["id"], data["source"], data["licence"], data["consent"], turns, replies)
    texts = [data["id"], data["source"], data["licence"], data["consent"], *(t.text for t in turns)]
    texts += [text for r in replies for text in (r.id, r.author, r.text)]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a text is missing: what has no licence and no consent is not used")
    if not turns or any(t.role not in ROLES for t in turns):
        raise ValueError(f"turns need roles, which are {', '.join(ROLES)}")
    if len({r.id for r in replies}) != len(replies):
        raise ValueError("two replies have one id")
    for mark in (m for r in replies for m in r.marks):
        if isinstance(mark.value, bool) or not isinstance(mark.value, int | float) or not math.isfinite(mark.value):
            raise ValueError(f"the mark `{mark.value}` is no number")
    return conversation


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> None:
    lines = (json.dumps(asdict(c), ensure_ascii=False) + "\n" for c in conversations)
    Path(path).write_text("".join(lines), encoding="utf-8")


def import_upheld(path: str | Path) -> list[Conversation]:
    """UPHELD (Upwork, CC BY 4.0), one line a turn: `messages`, and `candidates` with the annotators' marks of content, style, reasonable.

    Errors:  InvalidRequest
    """
    found = []
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            replies = []
            for c in row["candidates"]:
                marks = [
                    Mark(str(by), of, float(value))
                    for of in ("content", "style", "reasonable")
                    for by, value in zip(c["annotators"], c[of], strict=True)
                    if value is not None
                ]
                if c["text"].strip():
                    replies.append(Reply(c["model"], c["model"], c["text"], tuple(marks)))
            turns = tuple(Turn(m["role"], m["content"]) for m in row["messages"] if m["content"].strip())
            found.append(
                Conversation(
                    row["id"],
                    f"UPHELD, {row['source']}",
                    "CC BY 4.0",
                    "published by Upwork for research",
                    turns,
                    tuple(replies),
                )
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"`{path}` is not UPHELD: {type(error).__name__}: {error}", param="data") from None
    return found


def to_groups(conversations: Sequence[Conversation], of: str = "content", without: Iterable[str] = ()) -> list[Group]:
    """Replies as candidates of their conversation, graded by the rounded mean mark, the lowest mark being 0; `without`: authors. Lists in
    which all have one grade teach nothing and are left out."""
    left_out = set(without)
    lowest = min((m.value for c in conversations for r in c.replies for m in r.marks if m.of == of), default=0.0)
    groups = []
    for c in conversations:
        judged = []
        for r in c.replies:
            mean = r.mean(of)
            if mean is not None and r.author not in left_out:
                judged.append(Judged(r.id, r.text, round(mean - lowest)))
        if len(judged) > 1 and len({j.grade for j in judged}) > 1:
            said = "\n".join(f"{t.role}: {t.text}" for t in c.turns[-LAST_TURNS:])
            groups.append(Group(c.id, said, tuple(judged)))
    return groups


def dialogue_of(conversation: str) -> str:
    """What a split keeps together: turns of one dialogue have ids `DIALOGUE-TURN`."""
    return conversation.rpartition("-")[0] or conversation


def split_of(conversation: str) -> str:
    """`train`, `dev` or `test`, by the dialogue."""
    share = share_of(dialogue_of(conversation))
    return "test" if share < 0.25 else "dev" if share < 0.4 else "train"


def agreement(conversations: Sequence[Conversation], level: Level = "ordinal") -> dict[str, dict[str, float]]:
    """For each quality Krippendorff's alpha over all replies that several people marked, and how many marks there are."""
    units: dict[str, list[list[float]]] = defaultdict(list)
    for c in conversations:
        for r in c.replies:
            by: dict[str, list[float]] = defaultdict(list)
            for m in r.marks:
                by[m.of].append(m.value)
            for of, values in by.items():
                units[of].append(values)
    return {
        of: {"alpha": round(krippendorff_alpha(found, level), 4), "replies": len(found), "marks": sum(map(len, found))}
        for of, found in sorted(units.items())
    }
