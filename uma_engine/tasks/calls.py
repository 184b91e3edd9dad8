"""One call on its way through the engine: requests submitted, results gathered, cancellation when the caller leaves.

Knows sinks and futures; does not know templates or scores' meaning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from uma_engine.core import FinishReason, Request
from uma_engine.engine import EngineLoop, Sink
from uma_engine.errors import RequestCancelled, UmaError

__all__ = ["Call", "CallSink", "ScoreSink", "end_futures", "started_future"]

T = TypeVar("T")


class CallSink(Sink, Protocol):
    """A sink whose future ends with the request, whatever its listeners do."""

    future: Future[Any]


class ScoreSink:
    """Collects label logits by segment index; the future ends with that mapping."""

    def __init__(self) -> None:
        self.future: Future[Any] = started_future()
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


@dataclass
class Call(Generic[T]):
    """Requests of one public call with what becomes of their results.

    `build()` runs once every future is done. What a request holds (its adapter) hangs on its sink's future, so every
    future must end: through the loop once it is submitted, else through `abandon`.
    """

    loop: EngineLoop
    requests: list[Request]
    sinks: Sequence[CallSink]
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
                end_futures(self.sinks[position:], error)
                self.cancel()
                raise

    def abandon(self) -> None:
        """Give up a call that was never submitted."""
        end_futures(self.sinks, RequestCancelled("the call was given up before it began"))

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


def end_futures(sinks: Iterable[CallSink], error: BaseException) -> None:
    """End with `error` whatever has not ended yet."""
    for sink in sinks:
        if not sink.future.done():
            sink.future.set_exception(error)


def started_future() -> Future[Any]:
    """A future that nobody can cancel behind the engine's back: only the loop ends it, after it freed what it held."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
