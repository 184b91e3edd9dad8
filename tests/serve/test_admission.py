"""Fair shares at the door: the bound at every step of random traffic, what is refused, and that nobody is lost."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uma_engine.errors import DeadlineExceeded, Overloaded

pytest.importorskip("starlette")
pytest.importorskip("msgspec")

from uma_engine.serve.admission import Admission, Ticket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=60),
    st.integers(1, 120),
    st.integers(0, 2**30),
)
@settings(max_examples=150, deadline=None)
def test_shares_differ_by_the_largest_cost_at_every_step(
    asked: list[tuple[int, int]], capacity: int, seed: int
) -> None:
    async def simulate() -> None:
        rng, clock = random.Random(seed), Clock()
        door = Admission(capacity, 1000, clock)
        tasks = [asyncio.create_task(door.enter(f"t{t}", cost, 1e9)) for t, cost in asked]
        await _settle()
        inside: list[Ticket] = []
        taken: set[Any] = set()
        for _ in range(3 * len(asked)):
            for task in tasks:
                if task.done() and task not in taken:
                    taken.add(task)
                    inside.append(task.result())
            assert door.lag <= max(cost for _, cost in asked)
            assert len(inside) == door.num_inside
            assert len(inside) == 1 or sum(t.cost for t in inside) <= capacity or not inside
            if not inside:
                break
            clock.now += 1
            inside.pop(rng.randrange(len(inside))).release()
            await _settle()
        assert len(taken) == len(asked)
        assert door.num_waiting == door.num_inside == 0

    asyncio.run(simulate())


def test_served_work_is_even_between_who_wait_all_the_time() -> None:
    """A hundred small requests of one and ten large of another: half of what is served is each one's, at every moment."""

    async def simulate() -> None:
        door = Admission(1, 1000, Clock())
        order: list[tuple[str, float]] = []

        async def ask(tenant: str, cost: int) -> None:
            ticket = await door.enter(tenant, cost, 1e9)
            order.append((tenant, ticket.cost))
            await asyncio.sleep(0)
            ticket.release()

        await asyncio.gather(*(ask("small", 10) for _ in range(100)), *(ask("large", 100) for _ in range(10)))
        for end in range(1, 100):
            served = {name: sum(c for t, c in order[:end] if t == name) for name in ("small", "large")}
            assert abs(served["small"] - served["large"]) <= 2 * 100

    asyncio.run(simulate())


def test_a_noisy_neighbour_does_not_delay_the_quiet_one_and_silence_earns_nothing() -> None:
    async def simulate() -> None:
        door = Admission(1, 1000, Clock())
        first = await door.enter("noisy", 10, 1e9)
        noisy = [asyncio.create_task(door.enter("noisy", 10, 1e9)) for _ in range(100)]
        await _settle()
        quiet = [asyncio.create_task(door.enter("quiet", 10, 1e9)) for _ in range(20)]
        await _settle()
        first.release()
        order = []
        for _ in range(40):
            await _settle()
            inside = next(t for t in (*noisy, *quiet) if t.done() and t.result().inside)
            order.append("q" if inside in quiet else "n")
            inside.result().release()
        assert "q" in order[:2]
        assert order[:40].count("q") == 20
        assert "qqq" not in "".join(order)
        for task in noisy:
            task.cancel()

    asyncio.run(simulate())


def test_what_is_refused_says_when_to_come_back() -> None:
    async def simulate() -> None:
        clock = Clock()
        door = Admission(1, 2, clock)
        first = await door.enter("a", 100, 60)
        clock.now = 10.0  # ten tokens a second
        second = asyncio.create_task(door.enter("a", 100, 600))
        await _settle()
        first.release()
        await _settle()
        assert door.rate() == pytest.approx(10)
        waiting = [asyncio.create_task(door.enter("a", 100, 600)) for _ in range(2)]
        await _settle()
        with pytest.raises(Overloaded) as many:
            await door.enter("a", 100, 600)
        assert many.value.retry_after == pytest.approx(30, rel=0.05)
        with pytest.raises(Overloaded) as late:  # 100 tokens are inside, which take ten seconds
            await door.enter("b", 1, 5)
        assert late.value.retry_after == pytest.approx(5, rel=0.3)
        assert door.refused == 2
        for task in waiting:
            task.cancel()
        await _settle()
        assert door.num_waiting == 0
        (await second).release()

    asyncio.run(simulate())


def test_who_gives_up_leaves_nothing_behind() -> None:
    async def simulate() -> None:
        door = Admission(1, 10)
        first = await door.enter("a", 10, 60)
        with pytest.raises(DeadlineExceeded):
            await door.enter("b", 10, 0.01)
        leaving = asyncio.create_task(door.enter("b", 10, 60))
        staying = asyncio.create_task(door.enter("c", 10, 60))
        await _settle()
        leaving.cancel()
        await _settle()
        assert door.num_waiting == 1
        first.release()
        first.release()
        ticket = await staying
        assert door.num_inside == 1
        # Let in and cancelled in the same moment: the place is free again.
        other = asyncio.create_task(door.enter("b", 10, 60))
        await _settle()
        ticket.release()
        other.cancel()
        await _settle()
        assert door.num_inside == door.num_waiting == 0

    asyncio.run(simulate())


def test_batches_let_others_go_first_leave_room_and_do_not_starve() -> None:
    async def simulate() -> None:
        clock = Clock()
        door = Admission(100, 1000, clock)
        first = await door.enter("bulk", 40, 1e9, batch=True)
        more = [asyncio.create_task(door.enter("bulk", 40, 1e9, batch=True)) for _ in range(20)]
        await _settle()
        assert door.num_inside == 1, "another 40 would be more than a batch may fill"
        quick = await asyncio.wait_for(door.enter("shop", 50, 1e9), 1)
        assert door.num_inside == 2, "who comes next finds room"
        late = asyncio.create_task(door.enter("shop", 50, 1e9))
        quick.release()
        await _settle()
        assert late.done()
        assert not more[0].done(), "interactive requests go before batches"
        late.result().release()
        first.release()
        await _settle()
        assert more[0].done()
        assert not more[1].done()
        clock.now += 1000.0  # they have aged: now they are like any other
        crowd = [asyncio.create_task(door.enter("shop", 40, 1e9)) for _ in range(20)]
        await _settle()
        more[0].result().release()
        await _settle()
        assert more[1].done()
        for _ in range(200):
            for task in (*more, *crowd):
                if task.done() and not task.cancelled():
                    task.result().release()
            await _settle()
        assert all(task.done() for task in (*more, *crowd))
        assert door.num_waiting == door.num_inside == 0

    asyncio.run(simulate())
