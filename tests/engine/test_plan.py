"""Plans: calls that follow each other, driven by a thread or an event loop."""

from __future__ import annotations

import asyncio

import pytest

from uma_engine.core import FinishReason, SamplingParams
from uma_engine.errors import InvalidRequest, RequestCancelled
from uma_engine.tasks.calls import started_future
from uma_engine.tasks.plan import Plan, run, run_async


class EchoCall:
    """A call that ends with what it was made with, or with an error; it knows what became of it."""

    requests = ()

    def __init__(self, value, *, ends=True):
        self.value = value
        self.cancelled = False
        self._future = started_future()
        self._ends = ends

    @property
    def futures(self):
        return [self._future]

    def submit(self):
        if isinstance(self.value, Exception):
            self._future.set_exception(self.value)
        elif self._ends:
            self._future.set_result(None)

    def wait(self):
        self.submit()
        self._future.result()
        return self.build()

    def build(self):
        return self.value

    def cancel(self):
        self.cancelled = True
        if not self._future.done():
            self._future.set_exception(RequestCancelled("cancelled"))

    def abandon(self):
        self.cancel()


def drive(how, plan):
    return run(plan) if how == "thread" else asyncio.run(run_async(plan))


@pytest.fixture(params=["thread", "event loop"])
def how(request):
    return request.param


def test_answers_are_sent_back_in_order(how):
    def plan() -> Plan[list[int]]:
        first = yield EchoCall(3)
        second = yield EchoCall(first + 4)
        return [first, second]

    assert drive(how, plan()) == [3, 7]


def test_a_plan_without_calls_is_its_answer(how):
    def plan() -> Plan[str]:
        return "done"
        yield

    assert drive(how, plan()) == "done"


def test_an_error_can_be_answered_inside(how):
    def plan() -> Plan[str]:
        try:
            yield EchoCall(InvalidRequest("no"))
        except InvalidRequest:
            return (yield EchoCall("fallen back"))
        return "unreachable"

    assert drive(how, plan()) == "fallen back"


def test_an_error_nobody_answers_is_the_callers(how):
    closed = []

    def plan() -> Plan[None]:
        try:
            yield EchoCall(InvalidRequest("no"))
        finally:
            closed.append(True)

    with pytest.raises(InvalidRequest, match="no"):
        drive(how, plan())
    assert closed == [True]


def test_a_cancelled_task_cancels_its_call_and_closes_the_plan():
    call, closed = EchoCall(1, ends=False), []

    def plan() -> Plan[None]:
        try:
            yield call
        finally:
            closed.append(True)

    async def leave() -> None:
        task = asyncio.create_task(run_async(plan()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert call.cancelled
    assert closed == [True]


def test_two_engine_calls_in_a_plan(engine):
    def plan() -> Plan[tuple[int, FinishReason]]:
        scores = yield engine._score_call("a", ["b"], labels=("yes", "no"), adapter=None, deadline=None, tenant="")
        (text,) = yield engine._generate_call(
            ["a b"],
            SamplingParams(max_tokens=2, ignore_eos=True),
            adapter=None,
            chat=False,
            deadline=None,
            tenant="",
            emit=lambda _: None,
        )
        return len(scores), text.finish_reason

    assert run(plan()) == (1, FinishReason.LENGTH)
