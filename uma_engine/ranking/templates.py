"""Sentences made from the ledger alone: what is said when a model has nothing grounded to say.

Knows ledger lines; does not know models or texts. Every number in a sentence is the one that its source shows, in the same digits.
"""

from __future__ import annotations

from collections.abc import Sequence

from uma_engine.ranking.assessment import Section, Sentence, Source
from uma_engine.ranking.grounding import MIDDLE
from uma_engine.ranking.ledger import LedgerLine

__all__ = ["factor_source", "stand_ins"]


def factor_source(line: LedgerLine, name: str | None = None) -> Source:
    """A ledger line as something to cite."""
    said = f"{_title(line)} ({line.kind}): "
    if line.missing:
        said += f"not known, counts as {line.value:.2f}"
    else:
        said += f"{line.raw:g}, value {line.value:.2f}" if line.raw is not None else f"value {line.value:.2f}"
    said += f", weight {line.weight:g}, contribution {line.contribution:.4f}"
    return Source(name or line.name, "factor", said, value=None if line.missing else line.value)


def stand_ins(
    section: Section, ledger: Sequence[LedgerLine], sources: Sequence[Source], most: int = 1
) -> list[Sentence]:
    """Sentences for a section that has none, at most `most`; `sources` are the ledger's lines in order. None where the ledger has
    nothing for it: a candidate without a weak factor has no gap.
    """
    pairs = list(zip(ledger, sources, strict=True))
    known = [p for p in pairs if not p[0].missing]
    if section == "strengths":
        ranked = sorted((p for p in known if p[0].value >= MIDDLE), key=lambda p: -p[0].weight * p[0].value)
        return [Sentence(_strength(line), (source,), "template") for line, source in ranked[:most]]
    weak = sorted((p for p in known if p[0].value < MIDDLE), key=lambda p: -p[0].weight * (1 - p[0].value))
    missing = [p for p in pairs if p[0].missing]
    if section == "gaps":
        found = [Sentence(_gap(line), (source,), "template") for line, source in weak]
        found += [Sentence(f"{_title(line)} is not known.", (source,), "template") for line, source in missing]
        return found[:most]
    found = [Sentence(f"{_title(line)} is not known: what is it?", (source,), "template") for line, source in missing]
    found += [
        Sentence(f"{_title(line)} has a value of {line.value:.2f}: what would you say about it?", (source,), "template")
        for line, source in weak
    ]
    return found[:most]


def _strength(line: LedgerLine) -> str:
    return f"{_title(line)} is a strength: {_number(line)}."


def _gap(line: LedgerLine) -> str:
    return f"{_title(line)} is a gap: {_number(line)}."


def _number(line: LedgerLine) -> str:
    value = f"value {line.value:.2f}, weight {line.weight:g}"
    return f"{line.raw:g}, {value}" if line.kind == "fact" and line.raw is not None else value


def _title(line: LedgerLine) -> str:
    """The factor's name as a sentence begins with it, on one line."""
    name = " ".join(line.name.replace("_", " ").split())
    return name[:1].upper() + name[1:]
