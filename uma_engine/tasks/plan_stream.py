"""A plan whose listener is told things while its calls run: events as they come, then the plan's answer.

Knows how a plan is driven step by step, by a thread or an event loop, and that leaving early cancels what is left. Does not know what
the events are.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from uma_engine.tasks.calls import Call
from uma_engine.tasks.plan import Plan, done, prepared, step

__all__ = ["stream", "stream_async"]

Event = TypeVar("Event")
Task = Callable[[], Iterable[Event]]  # run by the reader, for its events


def stream(
    plan_of: Callable[[Callable[[Task[Event]], object]], Plan[Any]], last: Callable[[Any], Event]
) -> Iterator[Event]:
    """The events of `plan_of(emit)` in order, then `last(answer)`. What the plan emits is run on the reader's thread. Nothing begins
    before the first event is asked for; closing the iterator cancels what is left.
    """
    tasks: queue.SimpleQueue[Task[Event] | None] = queue.SimpleQueue()
    plan = plan_of(tasks.put)
    call: Call[Any] | None = None
    try:
        call = next(plan)
        while True:
            call.submit()
            left = _watch(call, lambda: tasks.put(None))
            while left:
                task = tasks.get()
                if task is None:
                    left -= 1
                else:
                    yield from task()
            try:
                answer = _answer(call)
            except Exception as error:
                call = plan.throw(error)
            else:
                call = plan.send(answer)
    except StopIteration as end:
        call = None
        answer = end.value
    finally:
        if call is not None:
            call.cancel()
        plan.close()
    while not tasks.empty():
        task = tasks.get()
        if task is not None:
            yield from task()
    yield last(answer)


async def stream_async(
    plan_of: Callable[[Callable[[Task[Event]], object]], Plan[Any]], last: Callable[[Any], Event]
) -> AsyncIterator[Event]:
    """As `stream`, for an event loop: what the plan computes between its calls happens on another thread."""
    event_loop = asyncio.get_running_loop()
    tasks: asyncio.Queue[Task[Event] | None] = asyncio.Queue()

    def put(task: Task[Event] | None) -> None:
        event_loop.call_soon_threadsafe(tasks.put_nowait, task)

    plan = plan_of(put)
    advance: Callable[[], Call[Any]] = lambda: next(plan)  # noqa: E731
    call: Any = None
    try:
        while True:
            call = await prepared(step, advance)
            if (ended := done(call)) is not None:
                call = None
                break
            call.submit()
            left = _watch(call, lambda: put(None))
            while left:
                task = await tasks.get()
                if task is None:
                    left -= 1
                else:
                    for event in task():
                        yield event
            try:
                answer = _answer(call)
            except Exception as error:
                advance = lambda error=error: plan.throw(error)  # type: ignore[misc]  # noqa: E731
            else:
                advance = lambda answer=answer: plan.send(answer)  # type: ignore[misc]  # noqa: E731
    finally:
        if call is not None:
            call.cancel()
        plan.close()
    await asyncio.sleep(0)  # what was put from another thread is there now
    while not tasks.empty():
        task = tasks.get_nowait()
        if task is not None:
            for event in task():
                yield event
    yield last(ended.value)


def _watch(call: Call[Any], tell: Callable[[], object]) -> int:
    """`tell` once for each request of the call that ends; how many there are. A request's pieces come before its end."""
    for future in call.futures:
        future.add_done_callback(lambda _: tell())
    return len(call.futures)


def _answer(call: Call[Any]) -> Any:
    for future in call.futures:
        future.result()
    return call.build()
