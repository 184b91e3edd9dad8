"""Calls that follow each other: a plan yields a call, is sent its answer, and yields the next or returns.

Knows how a plan is driven, by a thread that waits or by an event loop, and that nothing prepared is left behind when the
caller goes. Does not know what the calls are about.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from uma_engine.tasks.calls import Call

__all__ = ["Done", "Plan", "done", "finish", "prepared", "run", "run_async", "step"]

T = TypeVar("T")

Plan = Generator[Call[Any], Any, T]


def run(plan: Plan[T]) -> T:
    """Drive a plan to its answer. An error of a call is raised inside the plan, which may answer it."""
    try:
        call = next(plan)
        while True:
            try:
                answer = call.wait()
            except Exception as error:
                call = plan.throw(error)
            else:
                call = plan.send(answer)
    except StopIteration as end:
        return end.value
    finally:
        plan.close()


async def run_async(plan: Plan[T]) -> T:
    """As `run`, for an event loop: what the plan computes between its calls happens on another thread."""
    advance: Callable[[], Call[Any]] = lambda: next(plan)  # noqa: E731
    try:
        while True:
            call = await prepared(step, advance)
            if isinstance(call, Done):
                return call.value
            try:
                answer = await finish(call)
            except Exception as error:
                advance = lambda error=error: plan.throw(error)  # type: ignore[misc]  # noqa: E731
            else:
                advance = lambda answer=answer: plan.send(answer)  # type: ignore[misc]  # noqa: E731
    finally:
        # A cancelled task may leave the plan running on its thread for a moment: then it is closed when it is collected.
        with contextlib.suppress(ValueError):
            plan.close()


class Done:
    """A plan's answer on its way through a future, which a StopIteration cannot pass."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def abandon(self) -> None:
        """Nothing was begun."""


def done(call: Any) -> Done | None:
    """The plan's answer, where it has come to its end."""
    return call if isinstance(call, Done) else None


def step(advance: Callable[[], Call[Any]]) -> Call[Any] | Done:
    """The plan's next call, or its answer."""
    try:
        return advance()
    except StopIteration as end:
        return Done(end.value)


class _Handover:
    """A call on its way from the thread that prepares it to a task that may be gone by then, with its event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call: Any = None
        self._given_up = False

    def put(self, call: Any) -> Any:
        with self._lock:
            self._call = call
            given_up = self._given_up
        if given_up:
            call.abandon()
        return call

    def give_up(self) -> None:
        with self._lock:
            self._given_up = True
            call = self._call
        if call is not None:
            call.abandon()


async def prepared(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a call on another thread. A task cancelled meanwhile leaves no prepared call behind."""
    handover = _Handover()
    try:
        return await asyncio.to_thread(lambda: handover.put(make(*args, **kwargs)))
    except BaseException:
        handover.give_up()
        raise


async def finish(call: Call[Any]) -> Any:
    """Submit a call and wait for its answer. A task cancelled meanwhile cancels the call."""
    call.submit()
    try:
        for future in call.futures:
            await asyncio.wrap_future(future)
    except BaseException:
        call.cancel()
        raise
    return call.build()
