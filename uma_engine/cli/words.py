"""What was written about the shortlist, on a terminal: the notes with what they changed, and the assessments.

Knows how it looks; does not know who wrote it or how it was judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uma_engine.cli.console import printable
from uma_engine.ranking.assessment import SECTIONS, Assessment, Section, Sentence
from uma_engine.tasks.results import Deliberation, RankAnswer

if TYPE_CHECKING:
    from rich.console import Console

SIGNS: dict[Section, str] = {"strengths": "+", "gaps": "-", "questions": "?"}
LONGEST = 2000


def show_shortlist(console: Console, answer: RankAnswer) -> None:
    """Print notes and assessments, where there are any, and what each stage cost."""
    from rich.text import Text

    if answer.deliberation is not None:
        _show_notes(console, answer.deliberation)
    for assessment in answer.assessments:
        _show(console, assessment)
    if answer.assessments:
        said = [s for a in answer.assessments for name in SECTIONS for s in a.section(name)]
        own = sum(s.origin == "model" for s in said)
        dropped = sum(len(a.dropped) for a in answer.assessments)
        summary = f"{own} sentences of the model are grounded, {dropped} were dropped, {len(said) - own} are from the ledger (*)"
        console.print(Text(summary, style="dim"))
    if answer.assessments or answer.deliberation is not None:
        costs = ", ".join(
            f"{s.name} {s.seconds:.2f} s, {s.computed_tokens:,} tokens"
            for s in answer.usage.stages
            if s.computed_tokens
        )
        console.print(Text(costs, style="dim"))


def _show_notes(console: Console, deliberation: Deliberation) -> None:
    from rich.text import Text

    for note in deliberation.notes:
        moved = f"{note.place_before} -> {note.place}" if note.place != note.place_before else f"{note.place}"
        head = f"{moved}  {note.id}  {note.score_before:.4f} -> {note.score:.4f}  "
        console.print(Text(printable(head, 200), style="bold"), Text(_line(note.text), style="dim"))
    same = f"Kendall's tau {deliberation.kendall_tau:.2f}, {deliberation.moved} of {len(deliberation.notes)} moved"
    console.print(Text(f"notes, which nobody checked, were read before the probes: {same}", style="dim"))


def _show(console: Console, assessment: Assessment) -> None:
    from rich.text import Text

    console.print(Text(printable(assessment.id, 200), style="bold"))
    for section in SECTIONS:
        for sentence in assessment.section(section):
            console.print(Text(f"  {SIGNS[section]} {_line(sentence.text)}"), Text(_cites(sentence), style="dim"))


def _cites(sentence: Sentence) -> str:
    mark = " *" if sentence.origin == "template" else ""
    return _line("[" + ", ".join(s.name for s in sentence.cites) + "]") + mark


def _line(text: str) -> str:
    return printable(" ".join(text.split()), LONGEST)
