"""What an assessment is: sentences about one candidate, each with the sources that it cites.

Knows sentences, sources and sections; does not know who wrote them or whether they are true: `grounding` judges, `templates`
stand in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["SECTIONS", "Assessment", "Dropped", "Finding", "Section", "Sentence", "Source", "split_sentences"]

Section = Literal["strengths", "gaps", "questions"]
SECTIONS: tuple[Section, ...] = get_args(Section)
LONGEST_SPAN = 400  # characters


@dataclass(frozen=True, slots=True)
class Source:
    """Something that a sentence may cite: characters [start, end) of the candidate's text as reads have seen it or of the job's,
    or a line of the ledger (`value`: what it came to, None where the fact is not known). `text` is what the source says.
    """

    name: str
    kind: Literal["candidate", "job", "factor"]
    text: str
    start: int | None = None
    end: int | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a sentence is not grounded: `kind` of the fault and the words at fault."""

    kind: str
    words: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence. `origin`: written by the model and found grounded, or a template filled in from the ledger."""

    text: str
    cites: tuple[Source, ...]
    origin: Literal["model", "template"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A sentence of the model that is not shown, and why."""

    section: Section
    text: str
    cites: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Assessment:
    """What is said about one candidate: `index` and `id` as in the result. `written` is what the model wrote, JSON."""

    index: int
    id: str
    strengths: tuple[Sentence, ...]
    gaps: tuple[Sentence, ...]
    questions: tuple[Sentence, ...]
    dropped: tuple[Dropped, ...]
    written: str

    def section(self, name: Section) -> tuple[Sentence, ...]:
        return {"strengths": self.strengths, "gaps": self.gaps, "questions": self.questions}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {"index": self.index, "id": self.id}
        for name in SECTIONS:
            data[name] = [sentence_dict(s) for s in self.section(name)]
        data["dropped"] = [
            {
                "section": d.section,
                "text": d.text,
                "cites": list(d.cites),
                "findings": [{"kind": f.kind, "words": f.words} for f in d.findings],
            }
            for d in self.dropped
        ]
        return data | {"written": self.written}


def sentence_dict(sentence: Sentence) -> dict[str, Any]:
    """A sentence as plain data."""
    return {"text": sentence.text, "origin": sentence.origin, "cites": [_cite(s) for s in sentence.cites]}


def _cite(source: Source) -> Mapping[str, Any]:
    if source.kind == "factor":
        return {"kind": "factor", "name": source.name, "text": source.text}
    return {"kind": source.kind, "name": source.name, "start": source.start, "end": source.end, "text": source.text}


_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[^\W_])|\s*\n\s*")


def split_sentences(text: str, most: int | None = None) -> list[tuple[int, int]]:
    """Spans of the text's sentences and lines, in order, at most `most`: what has a letter or a digit, without the blanks around
    it. A sentence of more than `LONGEST_SPAN` characters is cut at blanks.
    """
    spans: list[tuple[int, int]] = []
    begin = 0
    for end, next_begin in [*((m.start(), m.end()) for m in _END.finditer(text)), (len(text), len(text))]:
        while end - begin > LONGEST_SPAN:
            at = text.rfind(" ", begin + 1, begin + LONGEST_SPAN)
            at = begin + LONGEST_SPAN if at < 0 else at
            spans.append((begin, at))
            begin = at
        spans.append((begin, end))
        begin = next_begin
    found = []
    for start, stop in spans:
        part = text[start:stop]
        start += len(part) - len(part.lstrip())
        stop -= len(part) - len(part.rstrip())
        if start < stop and any(c.isalnum() for c in text[start:stop]):
            found.append((start, stop))
    return found if most is None else found[:most]
