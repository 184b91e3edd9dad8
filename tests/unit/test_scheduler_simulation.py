"""A hundred thousand requests on a virtual clock: bursts, cancels, failures. None is lost, doubled or starved."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scheduler_harness import Ahead, Engine, expected_scores, generate_request, rank_request, score_request

from uma_engine.core import NO_PARENT, FinishReason, Request, SchedulerOutput
from uma_engine.errors import Overloaded
from uma_engine.scheduler import Event, Finished, ScoreReady

STEP_SECONDS = 0.01
BUDGET = 96
MAX_RUNNING = 32


class Simulation:
    """Arrivals, cancels and failures drawn from a seed. Every event is booked and compared with what was asked."""

    def __init__(self, seed: int, num_requests: int, num_blocks: int, ahead: bool = False) -> None:
        self.random = random.Random(seed)
        self.engine = Engine(
            num_blocks,
            block_size=8,
            max_model_len=256,
            max_num_batched_tokens=BUDGET,
            max_num_seqs=MAX_RUNNING,
            max_waiting=200,
        )
        self.ahead = Ahead(self.engine.scheduler, self.engine.runner) if ahead else None
        self.num_requests = num_requests
        self.num_submitted = 0
        self.num_refused = 0
        self.steps = 0
        self.backlog = 0  # tokens of all live requests
        self.live: dict[str, Request] = {}
        self.scores: dict[str, dict[int, list[float]]] = {}
        self.arrived: dict[str, tuple[int, int]] = {}  # at which step, before how many tokens
        self.reasons: Counter[FinishReason] = Counter()
        self.trace: list[tuple[int, int, int]] = []

    def run(self) -> None:
        scheduler = self.engine.scheduler
        while self.num_submitted < self.num_requests or scheduler.has_unfinished():
            self._arrive()
            self._cancel(chance=0.05)
            output = scheduler.schedule()
            assert bool(output.chunks) == bool(scheduler.num_running), "requests wait and nothing is computed"
            for request, reason in output.finished:
                self._end(request, reason)
            if output.chunks:
                self._run_step(output)
            elif self.ahead:
                self._book(self.ahead.land())
            self.steps += 1
            self.engine.now += STEP_SECONDS
            self.trace.append((len(output.chunks), output.num_tokens, len(self.live)))
            if self.steps % 500 == 0:
                scheduler.check_integrity()
        if self.ahead:
            self._book(self.ahead.land())

    def _make(self) -> Request:
        draw = self.random
        name = f"r{self.num_submitted}"
        deadline = self.engine.now + draw.uniform(0, 3) if draw.random() < 0.05 else None
        prefix = [draw.randrange(30)] * draw.choice((3, 8, 20, 40))  # few different ones, so that many are shared
        kind = draw.random()
        if kind < 0.5:
            return generate_request(name, prefix, max_tokens=draw.randint(1, 12), deadline=deadline)
        if kind < 0.9:
            leaves = [[draw.randrange(50)] * draw.randint(1, 12) for _ in range(draw.randint(1, 6))]
            return rank_request(name, prefix, leaves, deadline=deadline)
        if kind < 0.999:
            tree = [(prefix, NO_PARENT, False), ([1] * 9, 0, True), ([2] * 5, 0, False), ([3], 1, True), ([4], 2, True)]
            return score_request(name, tree, deadline=deadline)
        return rank_request(name, prefix, [[draw.randrange(50)] * 10] * 300, deadline=deadline)

    def _arrive(self) -> None:
        """In bursts: for a while nothing, then more than the queue takes."""
        most = 0 if self.steps % 60 < 25 else 12
        for _ in range(min(self.random.randint(0, most), self.num_requests - self.num_submitted)):
            request = self._make()
            self.num_submitted += 1
            try:
                self.engine.scheduler.add_request(request)
            except Overloaded:
                self.num_refused += 1
                continue
            name = request.request_id
            self.live[name] = request
            self.scores[name] = {}
            self.arrived[name] = (self.steps, self.backlog)
            self.backlog += self._size(request)

    def _cancel(self, chance: float) -> None:
        if self.live and self.random.random() < chance:
            name = self.random.choice(list(self.live))
            self.engine.scheduler.cancel(name)  # False if it was cancelled before and has not been reported yet
            assert not self.engine.scheduler.cancel(name)

    def _run_step(self, output: SchedulerOutput) -> None:
        scheduler = self.engine.scheduler
        self._cancel(chance=0.05)  # in flight
        if self.random.random() < 0.004:
            if self.ahead:
                self._book(self.ahead.land())
            events = scheduler.abort_step(output, RuntimeError("injected"))
        elif self.ahead:
            events = self.ahead.update(output)
        else:
            events = scheduler.update(output, self.engine.runner.run(output))
        self._book(events)

    def _book(self, events: list[Event]) -> None:
        for event in events:
            name = event.request.request_id
            if self.ahead and name not in self.live:
                continue  # it was ended with a step under way
            if isinstance(event, Finished):
                self._end(event.request, event.reason)
            elif isinstance(event, ScoreReady):
                assert event.segment_index not in self.scores[name], "scored twice"
                self.scores[name][event.segment_index] = event.logits

    def _end(self, request: Request, reason: FinishReason) -> None:
        name = request.request_id
        assert self.live.pop(name) is request, "a request ends twice"
        scores = self.scores.pop(name)
        self.reasons[reason] += 1
        if reason is FinishReason.SCORED:
            assert scores == expected_scores(request)
        if reason is FinishReason.LENGTH:
            assert len(request.output_token_ids) == request.sampling.max_tokens
            assert min(request.output_token_ids) >= 0
        # a fair share for its own tokens, after a turn for all that came before it: twice that is the limit
        step, backlog = self.arrived.pop(name)
        fair = backlog / BUDGET + self._size(request) / (BUDGET / MAX_RUNNING)
        assert self.steps - step <= 2 * fair + 16, "a request is starved"
        self.backlog -= self._size(request)

    def _size(self, request: Request) -> int:
        return request.num_prompt_tokens + (request.sampling.max_tokens if request.sampling else 0)

    def check(self) -> None:
        """What must hold in the end, whatever happened."""
        counters = self.engine.scheduler.counters
        assert not self.live
        assert self.num_submitted == self.num_requests == counters.accepted + self.num_refused
        assert counters.accepted == sum(self.reasons.values())
        assert counters.cancelled == self.reasons[FinishReason.CANCELLED]
        assert counters.failed == self.reasons[FinishReason.DEADLINE] + self.reasons[FinishReason.ERROR]
        assert counters.accepted == counters.finished + counters.cancelled + counters.failed
        assert self.engine.pool.num_used == 0
        self.engine.scheduler.check_integrity()


def simulate(seed: int, num_requests: int, num_blocks: int, ahead: bool = False) -> Simulation:
    simulation = Simulation(seed, num_requests, num_blocks, ahead)
    simulation.run()
    simulation.check()
    return simulation


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("num_blocks", [400, 60, 30])
def test_five_thousand_requests_all_end_as_they_should(num_blocks, ahead):
    simulate(seed=1, num_requests=5_000, num_blocks=num_blocks, ahead=ahead)


def test_overload_is_refused_and_tight_memory_preempts_without_losing_anything():
    simulation = simulate(seed=2, num_requests=5_000, num_blocks=30)
    assert simulation.num_refused > 500
    assert simulation.engine.scheduler.counters.preempted > 10
    assert {FinishReason.DEADLINE, FinishReason.CANCELLED, FinishReason.ERROR} <= set(simulation.reasons)


def test_the_same_seed_gives_the_same_trace():
    assert simulate(3, 1_000, 40).trace == simulate(3, 1_000, 40).trace


@pytest.mark.slow
def test_a_hundred_thousand_requests_none_lost_none_doubled_none_starved():
    simulation = simulate(seed=0, num_requests=100_000, num_blocks=60)
    assert simulation.engine.scheduler.counters.accepted > 80_000
    assert simulation.engine.scheduler.counters.preempted > 0
