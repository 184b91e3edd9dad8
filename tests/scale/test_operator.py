"""One engine changes at a time, what fails on one is tried on no other, and who has gone is not waited for."""

from __future__ import annotations

import random

from uma_engine.scale.operator import SEEN_S, Operator

OLD, NEW = {"model": "old"}, {"model": "new"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def cluster(engines: int = 3) -> tuple[Operator, Clock, dict[str, int]]:
    clock = Clock()
    operator = Operator(clock)
    number = operator.change(OLD)
    return operator, clock, {f"e{n}": number for n in range(engines)}


def test_engines_change_one_after_the_other():
    operator, _, numbers = cluster()
    for name, number in numbers.items():
        assert operator.ask(name, number, {}) == (number, OLD, False)
    wanted = operator.change(NEW)
    rng = random.Random(1)
    changing: str | None = None
    for _ in range(200):
        name = rng.choice(sorted(numbers))
        number, stack, may = operator.ask(name, numbers[name], {})
        assert (number, stack) == (wanted, NEW)
        if may:
            assert changing in (None, name), "two at once"
            changing = name
            if rng.random() < 0.3:
                numbers[name], changing = wanted, None
                operator.ask(name, wanted, {})
    assert set(numbers.values()) == {wanted}
    assert {e["number"] for e in operator.status()["engines"].values()} == {wanted}


def test_an_engine_that_dies_at_its_turn_is_not_waited_for():
    operator, clock, _ = cluster(2)
    operator.ask("e0", 1, {})
    operator.ask("e1", 1, {})
    operator.change(NEW)
    assert operator.ask("e0", 1, {})[2]
    assert not operator.ask("e1", 1, {})[2]
    clock.now += SEEN_S + 1
    assert operator.ask("e1", 1, {})[2]
    assert list(operator.status()["engines"]) == ["e1"]


def test_what_fails_on_one_is_tried_on_no_other_until_something_else_is_wanted():
    operator, _, _ = cluster(2)
    wanted = operator.change(NEW)
    assert operator.ask("e0", 1, {})[2]
    operator.failed("e0", wanted, "CorruptFile: no")
    assert not operator.ask("e1", 1, {})[2]
    assert not operator.ask("e0", 1, {})[2]
    assert operator.status()["failed"] == "e0: CorruptFile: no"
    back = operator.change(OLD)
    assert operator.status()["failed"] is None
    assert operator.ask("e1", 1, {}) == (back, OLD, True)
    operator.failed("e0", wanted, "late news of an earlier change")
    assert operator.status()["failed"] is None


def test_an_engine_that_begins_waits_for_nobody_and_for_a_stack():
    operator = Operator()
    assert operator.ask("e0", 0, {}) == (0, None, False)
    number = operator.change(OLD)
    assert operator.ask("e0", 0, {}) == (number, OLD, True)
    assert operator.ask("e1", 0, {}) == (number, OLD, True)


def test_numbers_after_a_restart_are_none_that_were_there_before():
    before = [Operator().change(OLD) for _ in range(3)]
    again = Operator()
    assert again.change(NEW) > max(before)
    assert again.change(OLD) > max(before) + 1
