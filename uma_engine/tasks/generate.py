"""Generation: tokens to text as they come, stop strings, and what of the text may already be shown.

Knows incremental decoding and stop strings; does not know requests' scheduling or sampling.
"""

from __future__ import annotations

from collections.abc import Callable

from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.core import FinishReason

__all__ = ["TextAssembler"]


class TextAssembler:
    """Grows the text of one completion. Text that could still become part of a stop string is held back from `emit`."""

    def __init__(
        self, decoder: IncrementalDecoder, stop: tuple[str, ...], emit: Callable[[str, tuple[int, ...]], None]
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._emit = emit
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._shown = 0
        self._unshown_ids: list[int] = []
        self.text = ""
        self.token_ids: list[int] = []
        self.stopped = False

    def take(self, token_id: int) -> bool:
        """Add a token; True when a stop string is complete. The text then ends before it."""
        self.token_ids.append(token_id)
        self._unshown_ids.append(token_id)
        searched_from = max(0, len(self.text) - self._hold)
        self.text += self._decoder.push(token_id)
        found = [at for s in self._stop if (at := self.text.find(s, searched_from)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        else:
            self._show(len(self.text) - self._hold)
        return self.stopped

    def finish(self, reason: FinishReason) -> FinishReason:
        """Flush what was held back (unfinished bytes become U+FFFD) and settle the reason."""
        if not self.stopped:
            self.text += self._decoder.finish()
        self._show(len(self.text))
        return FinishReason.STOP if self.stopped else reason

    def _show(self, until: int) -> None:
        if until > self._shown:
            ids, self._unshown_ids = tuple(self._unshown_ids), []
            self._emit(self.text[self._shown : until], ids)
            self._shown = until
