"""What a model writes about one candidate: the schema that binds it, and the sentences as they become whole, judged one by one.

Knows sources, schemas and JSON in pieces; does not know engines, prompts or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from uma_engine.ranking.assessment import (
    SECTIONS,
    Assessment,
    Dropped,
    Finding,
    Section,
    Sentence,
    Source,
    split_sentences,
)
from uma_engine.ranking.grounding import MIDDLE, check
from uma_engine.ranking.ledger import LedgerLine
from uma_engine.ranking.templates import factor_source, stand_ins

__all__ = ["Draft", "Sources", "schema_of"]

MOST_SPANS = {"candidate": 10, "job": 6}  # that can be cited: the first ones
MOST_SENTENCES: dict[Section, int] = {"strengths": 2, "gaps": 1, "questions": 1}
MOST_CITES = 2
# A sentence as the grammar has it: one alone, of at most some 120 characters. A dot inside stands in a word or a number; quotes and
# escapes would need rules of their own. Too short ones are left to the judge: a grammar that asks for length is slow to close.
SENTENCE = r'^[^"\\\x00-\x20.!?]([^"\\\x00-\x1f.!?]|[.][0-9a-z]){3,100}[%s]$'
PREVIEW_WORDS = 4


@dataclass(frozen=True)
class Sources:
    """All that may be cited about one candidate. `factors` are the ledger's lines, in order; names are distinct."""

    candidate: tuple[Source, ...]
    job: tuple[Source, ...]
    factors: tuple[Source, ...]
    text: str  # the candidate's, as reads have seen it

    @classmethod
    def of(cls, text: str, job: str, ledger: Sequence[LedgerLine]) -> Sources:
        candidate, about = (
            tuple(
                Source(f"{kind[0]}{number}", kind, whole[start:end], start, end)  # type: ignore[arg-type]
                for number, (start, end) in enumerate(split_sentences(whole, MOST_SPANS[kind]), start=1)
            )
            for kind, whole in (("candidate", text), ("job", job))
        )
        taken = {s.name for s in (*candidate, *about)}
        factors = []
        for number, line in enumerate(ledger, start=1):
            name = line.name if line.name not in taken else f"f{number}"
            taken.add(name)
            factors.append(factor_source(line, name))
        return cls(candidate, about, tuple(factors), text)

    def citable(self, section: Section) -> tuple[Source, ...]:
        """What a sentence of the section may cite: a strength rests on the candidate and on what speaks for them, a gap also on the
        job, and on what does not."""
        for_them = tuple(f for f in self.factors if f.value is not None and f.value >= MIDDLE)
        if section == "strengths":
            return (*self.candidate, *for_them)
        if section == "gaps":
            return (*self.job, *self.candidate, *(f for f in self.factors if f not in for_them))
        return (*self.candidate, *self.job, *self.factors)

    def listed(self) -> str:
        """The sources as the prompt lists them: a name and how each begins."""
        lines = []
        for source in (*self.candidate, *self.job):
            words = source.text.split()
            lines.append(
                f"{source.name}: {' '.join(words[:PREVIEW_WORDS])}{'...' if len(words) > PREVIEW_WORDS else ''}"
            )
        for source in self.factors:
            lines.append(f"{source.name}: {'not known' if source.value is None else f'{source.value:.2f}'}")
        return "\n".join(lines)


def schema_of(sources: Sources, least: int = 1) -> dict[str, Any]:
    """The JSON schema of what the model writes. A sentence can cite nothing but what is there, and cites before it speaks.
    `least`: how many strengths there must be.
    """
    return {
        "type": "object",
        "properties": {s: _list_schema(sources, s, least if s == "strengths" else 0) for s in SECTIONS},
        "required": list(SECTIONS),
        "additionalProperties": False,
    }


def _list_schema(sources: Sources, section: Section, least: int) -> dict[str, Any]:
    names = [s.name for s in sources.citable(section)]
    if not names:
        return {"type": "array", "maxItems": 0}
    sentence = {
        "type": "object",
        "properties": {
            "cites": {"type": "array", "items": {"enum": names}, "minItems": 1, "maxItems": MOST_CITES},
            "text": {"type": "string", "pattern": SENTENCE % ("?" if section == "questions" else ".")},
        },
        "required": ["cites", "text"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": sentence, "minItems": least, "maxItems": MOST_SENTENCES[section]}


@dataclass
class Draft:
    """One candidate's assessment on its way. One thread at a time."""

    index: int
    id: str
    sources: Sources
    ledger: Sequence[LedgerLine]
    strict: bool = True
    written: str = ""
    _at: int = 0  # up to here `written` is read
    _section: Section | None = None
    _kept: dict[Section, list[Sentence]] = field(default_factory=lambda: {s: [] for s in SECTIONS})
    _dropped: list[Dropped] = field(default_factory=list)

    def feed(self, text: str) -> list[tuple[Section, Sentence]]:
        """Take more of what the model writes; the sentences that are whole now and grounded."""
        self.written += text
        found: list[tuple[Section, Sentence]] = []
        while (item := self._next()) is not None:
            assert self._section is not None
            judged = self._judge(self._section, item)
            if isinstance(judged, Dropped):
                self._dropped.append(judged)
            else:
                self._kept[self._section].append(judged)
                found.append((self._section, judged))
        return found

    def finish(self, written: str) -> list[tuple[Section, Sentence]]:
        """`written` is all that the model wrote: what is still to be read of it, and what stands in for sections left empty."""
        found = self.feed(written[len(self.written) :])
        for section in SECTIONS:
            if not self._kept[section]:
                stands = stand_ins(section, self.ledger, self.sources.factors)
                self._kept[section] += stands
                found += [(section, sentence) for sentence in stands]
        return found

    def assessment(self) -> Assessment:
        kept = {section: tuple(self._kept[section]) for section in SECTIONS}
        return Assessment(self.index, self.id, **kept, dropped=tuple(self._dropped), written=self.written)

    def _next(self) -> Mapping[str, Any] | None:
        """The next sentence that is whole, as data. The text is compact JSON of `schema_of`, perhaps not all of it."""
        text = self.written
        while self._at < len(text):
            char = text[self._at]
            if char == "{" and self._section is not None:
                try:
                    item, self._at = json.JSONDecoder().raw_decode(text, self._at)
                except json.JSONDecodeError:
                    return None
                return item
            if char == '"':
                end = text.find('"', self._at + 1)
                if end < 0:
                    return None
                name = text[self._at + 1 : end]
                self._section = next((s for s in SECTIONS if s == name), None)
                self._at = end
            self._at += 1
        return None

    def _judge(self, section: Section, item: Mapping[str, Any]) -> Sentence | Dropped:
        names = tuple(dict.fromkeys(str(name) for name in item.get("cites", ())))
        text = " ".join(str(item.get("text", "")).split())
        known = {s.name: s for s in self.sources.citable(section)}
        cites = tuple(known[name] for name in names if name in known)
        findings = list(check(text, section, cites, self.sources.text, strict=self.strict))
        findings += [Finding("source", f"{name} is not there") for name in names if name not in known]
        if any(text.casefold() == s.text.casefold() for kept in self._kept.values() for s in kept):
            findings.append(Finding("form", "said before"))
        if findings:
            return Dropped(section, text, names, tuple(findings))
        return Sentence(text, cites, "model")
