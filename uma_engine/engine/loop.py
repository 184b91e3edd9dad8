"""The thread that owns the scheduler and the runner: schedule -> run -> update, for as long as there is work.

Knows requests, sinks and threads; does not know text, templates or tensors. Every request that `submit` accepts ends in
exactly one `on_finished`.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from uma_engine.core import FinishReason, Request, RequestKind, SchedulerOutput, StepResult, unknown_token
from uma_engine.engine.meter import StepMeter
from uma_engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    InvariantViolation,
    Overloaded,
    RequestCancelled,
    UmaError,
)
from uma_engine.scheduler import Event, Finished, Scheduler, ScoreReady, TokenReady

__all__ = ["EngineLoop", "Sink"]

logger = logging.getLogger("uma_engine.engine")
BACKGROUND_STEP_S = 0.06  # that a step with background work may take: who arrives meanwhile waits for no longer
FIRST_BACKGROUND_TOKENS = 16  # before it is known how fast this model is here
RATE_TOKENS = 16  # a step of fewer says little about that
LONGEST_WAY_S = 5.0  # between two steps of an engine that gives way to another


class Sink(Protocol):
    """Where a request's results go. Called on the loop's thread between steps: be quick, never block."""

    def on_scores(self, segment_index: int, logits: list[float]) -> None: ...

    def on_token(self, token_id: int) -> bool:
        """Take a generated token; True ends the request there (a stop string was met)."""
        ...

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None: ...


class Runner(Protocol):
    def run(self, output: SchedulerOutput) -> StepResult: ...


class Launched(Protocol):
    """A step under way on a device."""

    def result(self) -> StepResult: ...


@runtime_checkable
class LaunchingRunner(Protocol):
    """A runner that need not be waited for. Steps run in the order in which they are launched; a step may begin with tokens of the one
    launched before it that only the device knows (`unknown_token`)."""

    def launch(self, output: SchedulerOutput) -> Launched: ...


@dataclass(slots=True)
class _Underway:
    """A step whose effects the scheduler has taken for granted, and the events that wait for its scores and tokens."""

    output: SchedulerOutput
    launched: Launched
    events: list[Event]
    began: float


class EngineLoop:
    """Runs one scheduler over one runner on a thread of its own.

    `on_thread_start` runs first on that thread (it sets the kernels' thread count). All methods are safe from any thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        max_waiting: int,
        on_thread_start: Callable[[], None] | None = None,
        meter: StepMeter | None = None,
        name: str = "uma-engine",
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._max_waiting = max_waiting
        self._meter = meter
        self._on_thread_start = on_thread_start
        self._commands: deque[Callable[[], object]] = deque()
        self._pending_adds = 0
        self._wake = threading.Condition()
        # By id, the loop thread's own. An id may be taken again as soon as its request has ended here, before the scheduler says so.
        self._sinks: dict[str, tuple[Request, Sink]] = {}
        self._closing = False
        self._dead: BaseException | None = None
        self._underway: _Underway | None = None
        self.num_steps = 0
        self.step_seconds = 0.0
        self.give_way: Callable[[], bool] | None = None  # while it says so, a step waits, for `LONGEST_WAY_S` at most
        self._last_step = 0.0
        self._way_ends = 0.0  # when the step under way waits no more
        self._waited_s = 0.0  # by the step under way
        self._rate: float | None = None  # tokens a second
        if not isinstance(runner, LaunchingRunner):
            scheduler.background_tokens = min(FIRST_BACKGROUND_TOKENS, scheduler.background_tokens)
        self._pid = os.getpid()
        # The thread sees what its maker set for this context, such as a forced back end.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name=name, daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request. Raises Overloaded or EngineUnavailable at once; every later end comes through the sink."""
        self._check_process()
        with self._wake:
            self._check_alive()
            queued = self._pending_adds + self._scheduler.num_waiting
            if queued >= self._max_waiting:
                raise Overloaded(
                    f"{queued} requests are waiting and `max_waiting` is {self._max_waiting}",
                    hint="retry later, or start the engine with a larger `max_waiting`",
                )
            self._pending_adds += 1
            self._commands.append(lambda: self._add(request, sink))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Give a request up: what it holds is free within one step. Unknown or finished ids are ignored."""
        self._command(lambda: self._scheduler.cancel(request_id))

    def call(self, fn: Callable[[Scheduler], object]) -> None:
        """Run `fn(scheduler)` on the loop's thread between two steps and wait for it; exceptions come back to the caller."""
        done = threading.Event()
        failure: list[BaseException] = []

        def command() -> None:
            try:
                fn(self._scheduler)
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        self._command(command)
        while not done.wait(0.2):
            if not self._thread.is_alive():
                raise EngineUnavailable("the engine stopped while a call was waiting")
        if failure:
            raise failure[0]

    def close(self) -> None:
        """Stop after the step in progress; requests still in it end with EngineUnavailable. Idempotent."""
        if os.getpid() != self._pid:
            return  # a fork has no loop to stop
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stop(self) -> None:
        """As `close`, without waiting: for an owner that is being forgotten."""
        if os.getpid() == self._pid:
            with self._wake:
                self._closing = True
                self._wake.notify()

    @property
    def closed(self) -> bool:
        return self._closing or self._dead is not None

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineUnavailable(f"the engine stopped: {self._dead}", hint="create a new engine")
        if self._closing:
            raise EngineUnavailable("the engine is closed", hint="create a new engine")

    def _check_process(self) -> None:
        """Before any lock: one that was held at the fork is never released in the child."""
        if os.getpid() != self._pid:
            raise EngineUnavailable(
                f"the engine was made in process {self._pid} and does not run in process {os.getpid()}",
                hint="create the engine after the fork",
            )

    def _command(self, command: Callable[[], object]) -> None:
        self._check_process()
        with self._wake:
            self._check_alive()
            self._commands.append(command)
            self._wake.notify()

    # -- the loop's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._on_thread_start is not None:
                self._on_thread_start()
            idle = True
            while True:
                with self._wake:
                    while not (self._commands or self._closing or self._underway or self._scheduler.has_unfinished()):
                        idle = True
                        self._wake.wait()
                if self._closing:
                    break
                self._run_commands()
                if idle and self._meter is not None:
                    self._meter.begin()
                idle = False
                if not self._scheduler.has_unfinished() or self._gives_way():
                    self._land()
                else:
                    self._step()
                    self._last_step = time.perf_counter()
        except BaseException as error:  # a fault of ours: nobody may hang because of it
            logger.exception("the engine's step loop failed")
            self._dead = error
        finally:
            self._end_all()

    def _gives_way(self) -> bool:
        """Whether another engine has the machine for now; a moment has passed then."""
        if self.give_way is None:
            return False
        now = time.perf_counter()
        self._way_ends = 0.0
        if now - self._last_step > LONGEST_WAY_S:
            return False
        if not self.give_way():
            self._way_ends = now + LONGEST_WAY_S
            return False
        with self._wake:
            self._wake.wait(0.002)
        return True

    def between_layers(self) -> None:
        """Asked by the model within a step, on the loop's thread: a step that has begun waits too while another engine has the machine."""
        give_way = self.give_way
        if give_way is None or not give_way():
            return
        began = now = time.perf_counter()
        while now < self._way_ends and not self._closing and give_way():
            time.sleep(0.001)
            now = time.perf_counter()
        self._waited_s += now - began

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute. A look from outside."""
        return bool(self._pending_adds) or self._scheduler.has_unfinished()

    def _run_commands(self) -> None:
        """One at a time off the queue: should one fail, those behind it are still there to be ended."""
        while True:
            with self._wake:
                if not self._commands:
                    return
                command = self._commands.popleft()
            command()

    def _add(self, request: Request, sink: Sink) -> None:
        with self._wake:
            self._pending_adds -= 1
        if request.request_id in self._sinks:  # the one in flight keeps its sink
            sink.on_finished(FinishReason.ERROR, InvalidRequest(f"request id `{request.request_id}` is in use"))
            return
        self._sinks[request.request_id] = request, sink
        if self._closing:
            return  # ends with the rest
        try:
            self._scheduler.add_request(request)
        except UmaError as error:
            self._finish(request, FinishReason.ERROR, error)
        except Exception as error:
            logger.exception("request `%s` could not be added", request.request_id)
            failure = InvariantViolation(f"the request could not be added: {error!r}")
            self._finish(request, FinishReason.ERROR, failure)

    def _step(self) -> None:
        started = time.perf_counter()
        output = self._scheduler.schedule()
        for request, reason in output.finished:
            self._finish(request, reason)
        if not output.chunks:
            self._land()
            return
        try:
            if isinstance(self._runner, LaunchingRunner):
                with _collector_paused():
                    events = self._launch(self._runner, output)
            else:
                self._waited_s = 0.0
                result = self._runner.run(output)
                started += self._waited_s
                self._charge(output, started)
                self._pace(output.num_tokens, time.perf_counter() - started)
                events = self._scheduler.update(output, result)
        except Exception as error:
            logger.exception("a step failed")
            failure = error if isinstance(error, UmaError) else InvariantViolation(f"a step failed: {error!r}")
            self._land()
            for event in self._scheduler.abort_step(output, failure):
                if isinstance(event, Finished):
                    ours = failure if event.reason is FinishReason.ERROR else None
                    self._finish(event.request, event.reason, ours)
            return
        for event in events:
            self._deliver(event)
        self.num_steps += 1
        self.step_seconds += time.perf_counter() - started

    def _pace(self, tokens: int, seconds: float) -> None:
        """How many tokens a step of background work may have."""
        if tokens >= RATE_TOKENS:
            rate = tokens / seconds
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
            self._scheduler.background_tokens = max(RATE_TOKENS, int(self._rate * BACKGROUND_STEP_S))

    def _launch(self, runner: LaunchingRunner, output: SchedulerOutput) -> list[Event]:
        """Begin a step and, while the device works, hand over what the one before brought.

        What a step changes in the schedule depends neither on its scores nor, but for stop tokens, on its tokens: the
        scheduler is told at once that it is done, and the next step is planned and launched behind it. What it frees can be
        given away, for steps run in order. A request that turns out to have ended has been computed in one step too many.
        A step is waited for where the host must read its tokens before it can draw the next ones.
        """
        began = time.perf_counter()
        launched = runner.launch(output)
        self._land()
        wanted = [chunk for chunk in output.chunks if chunk.wants_output]
        if any(chunk.request.reads_tokens for chunk in wanted):
            result = launched.result()
            self._charge(output, began)
            return self._scheduler.update(output, result)
        unknown: list[list[float] | int | UmaError] = [
            [] if chunk.request.kind is RequestKind.SCORE else unknown_token(place)
            for place, chunk in enumerate(wanted)
        ]
        self._underway = _Underway(output, launched, self._scheduler.update(output, StepResult(unknown)), began)
        return []

    def _land(self) -> None:
        """Wait for the step under way, if there is one, and deliver what it brought."""
        underway, self._underway = self._underway, None
        if underway is None:
            return
        try:
            outputs = underway.launched.result().outputs
        except Exception as error:
            logger.exception("a step failed")
            failure = error if isinstance(error, UmaError) else InvariantViolation(f"a step failed: {error!r}")
            for chunk in underway.output.chunks:
                self._fail(chunk.request, failure)
            return
        self._charge(underway.output, underway.began)
        wanted = [chunk for chunk in underway.output.chunks if chunk.wants_output]
        found = {
            (chunk.request.request_id, chunk.segment_index): value for chunk, value in zip(wanted, outputs, strict=True)
        }
        for event in underway.events:
            if isinstance(event, Finished):
                self._deliver(event)
                continue
            request = event.request
            value = found[request.request_id, event.segment_index if isinstance(event, ScoreReady) else request.growing]
            if isinstance(value, UmaError):
                self._fail(request, value)
                continue
            if isinstance(event, ScoreReady):
                assert isinstance(value, list)
                event.logits = value
            else:
                assert isinstance(value, int)
                self._scheduler.settle(event, value)
            self._deliver(event)
            if isinstance(event, TokenReady) and event.finish_reason is FinishReason.STOP:
                self._finish(request, FinishReason.STOP)

    def _charge(self, output: SchedulerOutput, began: float) -> None:
        """Before the step's results are handed over: who has its answer may ask what it cost."""
        if self._meter is not None:
            self._meter.charge(output.chunks, began)

    def _fail(self, request: Request, error: UmaError) -> None:
        """End a request whose step went wrong after the scheduler had taken it for done."""
        if self._sink_of(request) is not None:
            self._scheduler.finish(request.request_id, FinishReason.ERROR)
            self._finish(request, FinishReason.ERROR, error)

    def _sink_of(self, request: Request) -> Sink | None:
        """The listener of a request that has not ended here."""
        held, sink = self._sinks.get(request.request_id, (None, None))
        return sink if held is request else None

    def _deliver(self, event: ScoreReady | TokenReady | Finished) -> None:
        request = event.request
        request_id = request.request_id
        sink = self._sink_of(request)
        if sink is None:
            return
        if isinstance(event, Finished):
            self._finish(request, event.reason, event.error if isinstance(event.error, UmaError) else None)
            return
        try:
            if isinstance(event, ScoreReady):
                sink.on_scores(event.segment_index, event.logits)
            elif sink.on_token(event.token_id) and event.finish_reason is None:
                self._scheduler.finish(request_id, FinishReason.STOP)
                self._finish(request, FinishReason.STOP)
        except Exception as error:  # a caller's listener failed, e.g. its event loop is closed: its request alone ends
            logger.exception("a listener of request `%s` failed", request_id)
            self._scheduler.finish(request_id, FinishReason.ERROR)
            self._finish(request, FinishReason.ERROR, InvariantViolation(f"a listener failed: {error!r}"))

    def _finish(self, request: Request, reason: FinishReason, error: UmaError | None = None) -> None:
        sink = self._sink_of(request)
        if sink is None:
            return
        del self._sinks[request.request_id]
        if error is None and reason is FinishReason.CANCELLED:
            error = RequestCancelled("the request was cancelled")
        elif error is None and reason is FinishReason.DEADLINE:
            error = DeadlineExceeded(
                "the request's deadline passed before it finished", hint="raise `deadline`, or send fewer candidates"
            )
        try:
            sink.on_finished(reason, error)
        except Exception:
            logger.exception("a listener of request `%s` failed at its end", request.request_id)

    def _end_all(self) -> None:
        if self._dead is None:
            self._land()
        with self._wake:
            self._closing = True
        while True:
            try:
                self._run_commands()  # additions end below; waiting callers are let go
                break
            except Exception:
                logger.exception("a command failed while the engine closed")
        for request_id in self._sinks:  # what they held is given back, so that the books balance at the end
            self._scheduler.cancel(request_id)
        cause = f"the engine stopped: {self._dead}" if self._dead is not None else "the engine was closed"
        for request, _ in list(self._sinks.values()):
            self._finish(request, FinishReason.ERROR, EngineUnavailable(cause))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection of this process while the host prepares a device's step: the device would wait for it. Between
    steps it runs as always; who has turned it off finds it off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
