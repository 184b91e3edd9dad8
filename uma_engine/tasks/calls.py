"""One call on its way through the engine: requests submitted, results gathered, cancellation when the caller leaves.

Knows sinks and futures; does not know templates or scores' meaning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from uma_engine.core import FinishReason, Request
from uma_engine.engine import EngineLoop
from uma_engine.errors import UmaError

__all__ = ["Call", "ScoreSink", "TokenSink"]

T = TypeVar("T")


class ScoreSink:
    """Collects label logits by segment index; the future ends with that mapping."""

    def __init__(self) -> None:
        self.future: Future[dict[int, list[float]]] = _started_future()
        self._logits: dict[int, list[float]] = {}

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        self._logits[segment_index] = logits

    def on_token(self, token_id: int) -> bool:
        raise AssertionError("a score request generates no tokens")

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(self._logits)


class TokenSink:
    """Feeds generated tokens to a text assembler; the future ends with the finish reason."""

    def __init__(self, take: Callable[[int], bool], ended: Callable[[FinishReason, UmaError | None], None]) -> None:
        self.future: Future[FinishReason] = _started_future()
        self._take = take
        self._ended = ended

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        raise AssertionError("a generate request has no label logits")

    def on_token(self, token_id: int) -> bool:
        return self._take(token_id)

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self._ended(reason, error)
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(reason)


@dataclass
class Call(Generic[T]):
    """Requests of one public call with what becomes of their results.

    `build()` runs once every future is done. `release` gives back what the call holds (its adapters) and runs exactly
    once for each request, however it ends.
    """

    loop: EngineLoop
    requests: list[Request]
    sinks: Sequence[ScoreSink | TokenSink]
    build: Callable[[], T]
    started: float = field(default_factory=time.perf_counter)

    @property
    def futures(self) -> list[Future[Any]]:
        return [sink.future for sink in self.sinks]

    def submit(self) -> None:
        """Submit all requests; when one is refused the ones before it are cancelled and the refusal is raised."""
        self.started = time.perf_counter()
        for position, (request, sink) in enumerate(zip(self.requests, self.sinks, strict=True)):
            try:
                self.loop.submit(request, sink)
            except BaseException as error:
                for rest in self.sinks[position:]:
                    rest.future.set_exception(error)
                self.cancel()
                raise

    def cancel(self) -> None:
        for request, sink in zip(self.requests, self.sinks, strict=True):
            if not sink.future.done():
                try:
                    self.loop.cancel(request.request_id)
                except UmaError:  # the engine is closing: the loop ends every request by itself
                    return

    def wait(self) -> T:
        """Block until every request ended. An exception in the waiting thread (Ctrl-C) cancels the call."""
        self.submit()
        try:
            for future in self.futures:
                future.result()
        except BaseException:
            self.cancel()
            raise
        return self.build()


def _started_future() -> Future[Any]:
    """A future that nobody can cancel behind the engine's back: only the loop ends it, after it freed what it held."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
