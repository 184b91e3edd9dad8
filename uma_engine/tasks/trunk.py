"""The path down to a shortlisted candidate's text, cut as the scores' tree was, so that its keys and values are found again.

Knows prompts and segments; does not know what is read or written at the path's end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uma_engine.core import Segment
from uma_engine.ranking.surface import DEFAULT_PROBE, question_of
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.surface_rank import groups_of, redacted

if TYPE_CHECKING:
    from uma_engine.tasks.shortlist import Beside, Shortlist

__all__ = ["Trunk"]


class Trunk:
    """Instruction -> job -> candidate for each of the shortlist, as one adapter has computed it."""

    def __init__(self, shortlist: Shortlist, beside: Beside, adapter: str | None) -> None:
        engine, options = shortlist.engine, shortlist.options
        self._shortlist = shortlist
        self._engine = engine
        tails = beside.of(adapter)
        if shortlist.surface is None:
            prompt = engine._rank_prompt(question_of(DEFAULT_PROBE, tuple(options["labels"])))
            self.shared = ranking.shared_prefix([prompt.after_candidate, *tails])
        else:
            groups = {group.adapter: group for group in groups_of(engine, shortlist.surface, beside)}
            self.shared = groups[adapter].shared if adapter in groups else 0
            prompt = engine._rank_prompt(question_of(DEFAULT_PROBE, ("yes", "no")))  # its beginning is that of all
        tail = tails[0]
        self._common = tail[: self.shared]
        self._above = [
            prompt.head + engine._ids_of("instruction", shortlist.instruction) + prompt.after_instruction,
            engine._ids_of("query", shortlist.query) + prompt.after_job,
        ]
        self._used = sum(map(len, self._above)) + self.shared

    def above(self) -> list[Segment]:
        """Instruction and job."""
        return [Segment(list(self._above[0])), Segment(list(self._above[1]), parent=0)]

    def text(self, index: int) -> str:
        """The candidate's text as reads have seen it."""
        person, surface = self._shortlist.people[index], self._shortlist.surface
        return person.text.strip() if surface is None else redacted(surface, person)[0]

    def seen(self, index: int) -> str:
        """As `text`, without what the scores had no room for."""
        text, cut = self.text(index), self._shortlist.answer.all_results[index].truncated_tokens
        if not cut:
            return text
        tokenizer = self._engine._stack.tokenizer
        return text[: len(tokenizer.decode(tokenizer.encode(text)[:-cut]).rstrip("\ufffd"))]

    def candidate(self, index: int, needed: int) -> list[int] | None:
        """The candidate's segment, cut so that `needed` tokens have room below it; None where not one of its own tokens has.

        It is the segment of the scores unless it had to be cut once more.
        """
        tokens = self._engine._stack.tokenizer.encode(self.text(index))
        kept = len(tokens) - self._shortlist.answer.all_results[index].truncated_tokens
        room = self._engine.max_model_len - self._used - needed
        if room < 1:
            return None
        return tokens[: min(kept, room)] + self._common
