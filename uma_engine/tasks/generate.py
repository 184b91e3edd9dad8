"""Generation: tokens to text as they come, stop strings, and what of the text may already be shown.

Knows incremental decoding, stop strings, a prompt's listener and its seed; does not know scheduling or how a token is chosen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from uma_engine.catalog.chat_template import FieldPiece, split_template
from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.core import FinishReason, SamplingParams
from uma_engine.errors import InvalidRequest, UmaError
from uma_engine.tasks.calls import started_future
from uma_engine.tasks.results import CompletionChunk

if TYPE_CHECKING:
    from uma_engine.catalog.chat_template import ChatTemplate
    from uma_engine.catalog.tokenizer import Tokenizer

__all__ = ["TextAssembler", "TextSink", "chat_ids", "with_seed"]

ROLES = ("system", "user", "assistant")


class TextAssembler:
    """Grows the text of one completion. Text that could still become part of a stop string is held back from `emit`."""

    def __init__(
        self, decoder: IncrementalDecoder, stop: tuple[str, ...], emit: Callable[[str, tuple[int, ...]], object]
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


class TextSink:
    """Takes one prompt's tokens, tells `emit` of each piece of text, and ends its future with the finish reason.

    Tokens that end a sequence (`stop_ids`) are not part of its text. `emit` gets CompletionChunks, the last one with the
    finish reason, or the error; should it fail (its event loop may be gone), the future ends all the same.
    """

    def __init__(
        self,
        index: int,
        decoder: IncrementalDecoder,
        stop: tuple[str, ...],
        stop_ids: frozenset[int],
        emit: Callable[[CompletionChunk | UmaError], object],
    ) -> None:
        self.future: Future[Any] = started_future()
        self.ended_at = 0.0
        self._index = index
        self._stop_ids = stop_ids
        self._emit = emit
        self._assembler = TextAssembler(decoder, stop, lambda text, ids: emit(CompletionChunk(index, text, ids)))

    @property
    def text(self) -> str:
        return self._assembler.text

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        raise AssertionError("a generate request has no label logits")

    def on_token(self, token_id: int) -> bool:
        return False if token_id in self._stop_ids else self._assembler.take(token_id)

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self.ended_at = time.perf_counter()
        try:
            if error is not None:
                self._emit(error)
            else:
                reason = self._assembler.finish(reason)
                self._emit(CompletionChunk(self._index, "", (), reason))
        finally:
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(reason)


def with_seed(params: SamplingParams, base: int, ids: list[int], index: int) -> SamplingParams:
    """A request without a seed gets one from the engine's seed, its prompt and its place: the same call, the same text."""
    data = f"{base}:{index}:{ids}".encode()
    return replace(params, seed=int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1)


def chat_ids(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of messages in the base's template. Contents pass by the template, not through it, and hold no control tokens.

    Errors:  InvalidRequest for what are no messages, or an order that the template refuses
    """
    shown: list[dict[str, str]] = []
    contents: dict[str, str] = {}
    marks: dict[str, str] = {}
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise InvalidRequest(
                f"message {index} has the role `{role}` and content of type `{type(content).__name__}`",
                hint=f"roles are {', '.join(ROLES)}, and content is text",
                param="messages",
            )
        name = f"message{index}"
        marks[name] = f"\u27e6uma-{name}\u27e7"
        contents[name] = content
        shown.append({"role": role, "content": marks[name]})
    ids: list[int] = []
    for piece in split_template(tokenizer, template, shown, marks):
        ids += tokenizer.encode(contents[piece.name]) if isinstance(piece, FieldPiece) else piece.token_ids
    return ids
