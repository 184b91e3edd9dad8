"""Any sequence of submissions, steps, cancels, failures and passing time keeps every promise of the scheduler."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_harness import Ahead, Engine, expected_scores, expected_tokens, generate_request, score_request

from uma_engine.core import NO_PARENT, FinishReason, Request, RequestKind, SamplingParams
from uma_engine.errors import Overloaded, TooLarge
from uma_engine.scheduler import Finished, ScoreReady, TokenReady

# few different tokens, so that prefixes collide
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)
roots = st.sampled_from([b"", b"adapter"])
deadlines = st.none() | st.floats(0, 8)


@st.composite
def trees(draw) -> list[tuple[list[int], int, bool]]:
    size = draw(st.integers(1, 9))
    tree = []
    for index in range(size):
        # deep ones hold most blocks
        parent = index - 1 if draw(st.booleans()) else draw(st.integers(NO_PARENT, index - 1))
        tree.append((draw(tokens), parent, draw(st.booleans())))
    if not any(scored for _, _, scored in tree):
        tree[-1] = (*tree[-1][:2], True)
    return tree


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools and budgets force preemption, chunks and long leaves. The oracle is what a request answers alone."""

    runs_ahead = False  # outputs are known a step later

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.prompts: dict[str, list[int]] = {}
        self.scores: dict[str, dict[int, list[float]]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.in_flight = None
        self.in_background = False

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 4]),
        budget=st.integers(1, 24),
        max_num_seqs=st.integers(1, 5),
        cache=st.booleans(),
    )
    def start(self, num_blocks, block_size, budget, max_num_seqs, cache):
        self.engine = Engine(
            num_blocks,
            block_size,
            max_model_len=60,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            max_waiting=6,
            enable_prefix_cache=cache,
        )
        self.scheduler = self.engine.scheduler
        self.ahead = Ahead(self.scheduler, self.engine.runner)

    @rule(tokens_in_a_step=st.integers(1, 30))
    def pace(self, tokens_in_a_step):
        self.scheduler.background_tokens = tokens_in_a_step

    @rule(whether=st.booleans())
    def choose_background(self, whether):
        self.in_background = whether

    def _submit(self, request: Request) -> None:
        request.background = self.in_background
        waiting = self.scheduler.num_waiting
        try:
            self.scheduler.add_request(request)
        except Overloaded:
            assert waiting >= 6
        except TooLarge:
            assert self.scheduler.num_waiting == waiting
        else:
            self.requests[request.request_id] = request
            self.scores[request.request_id] = {}
            self.tokens[request.request_id] = []

    def _next_id(self) -> str:
        return f"r{len(self.requests)}"

    @rule(tree=trees(), root=roots, deadline=deadlines)
    def submit_tree(self, tree, root, deadline):
        due = None if deadline is None else self.engine.now + deadline
        self._submit(score_request(self._next_id(), tree, cache_root=root, deadline=due))

    @rule(
        prompt=tokens,
        cuts=st.sets(st.integers(1, 11), max_size=4),
        max_tokens=st.integers(1, 12),
        stop=st.integers(0, 49),
        root=roots,
        deadline=deadlines,
    )
    def submit_prompt(self, prompt, cuts, max_tokens, stop, root, deadline):
        due = None if deadline is None else self.engine.now + deadline
        name = self._next_id()
        self.prompts[name] = prompt
        stops = frozenset([stop])
        request = generate_request(
            name, prompt, max_tokens, sorted(cuts), stop_token_ids=stops, cache_root=root, deadline=due
        )
        self._submit(request)

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def schedule(self):
        output = self.scheduler.schedule()
        for request, reason in output.finished:
            self._end(request, reason)
        live = self.scheduler.num_waiting + self.scheduler.num_running
        assert bool(output.chunks) == bool(live), "a step without work while requests wait, or the reverse"
        if output.chunks:
            self.in_flight = output
        else:
            self._land()

    def _land(self) -> None:
        for event in self.ahead.land():
            self._note(event)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def update(self):
        output, self.in_flight = self.in_flight, None
        if self.runs_ahead:
            events = self.ahead.update(output)
        else:
            events = self.scheduler.update(output, self.engine.runner.run(output))
        for event in events:
            self._note(event)

    @precondition(lambda self: self.in_flight is None)
    @rule(steps=st.integers(1, 6))
    def run_steps(self, steps):
        for _ in range(steps):
            self.schedule()
            if self.in_flight is not None:
                self.update()
            self.scheduler.check_integrity()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def fail(self):
        output, self.in_flight = self.in_flight, None
        self._land()
        error = RuntimeError("injected")
        for event in self.scheduler.abort_step(output, error):
            assert isinstance(event, Finished)
            self._end(event.request, event.reason)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), stop=st.booleans())
    def end_early(self, data, stop):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        ended = self.scheduler.finish(name) if stop else self.scheduler.cancel(name)
        assert not (ended and name in self.ended)

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds):
        self.engine.now += seconds

    def _note(self, event) -> None:
        request = event.request
        name = request.request_id
        if self.runs_ahead and name in self.ended:
            return  # it was ended with a step under way
        assert name not in self.ended, "something happens to a request that has ended"
        if isinstance(event, ScoreReady):
            assert event.segment_index not in self.scores[name], "a segment is scored twice"
            self.scores[name][event.segment_index] = event.logits
        elif isinstance(event, TokenReady):
            self.tokens[name].append(event.token_id)
        else:
            self._end(request, event.reason)

    def _end(self, request: Request, reason: FinishReason) -> None:
        name = request.request_id
        assert self.requests[name] is request
        assert name not in self.ended, "a request ends twice"
        self.ended[name] = reason
        if reason is FinishReason.DEADLINE:
            assert request.deadline <= self.engine.now
        assert not any(segment.block_ids for segment in request.segments)
        if request.kind is RequestKind.SCORE:
            expected = expected_scores(request)
            assert self.scores[name].items() <= expected.items()
            assert reason is not FinishReason.SCORED or self.scores[name] == expected
        else:
            known = [token for token in request.output_token_ids if token >= 0]
            assert known[: len(self.tokens[name])] == self.tokens[name]
            assert self.runs_ahead or request.output_token_ids == self.tokens[name]
            alone = expected_tokens(
                self.prompts[name],
                SamplingParams(max_tokens=request.sampling.max_tokens),
                request.stop_token_ids,
                request.cache_root,
            )
            assert self.tokens[name] == alone[: len(self.tokens[name])]
            assert reason is not FinishReason.LENGTH or self.tokens[name] == alone

    @invariant()
    def holds_together(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        if self.in_flight is not None:
            self.update()
        for _ in range(3000):
            if not self.scheduler.has_unfinished():
                break
            self.run_steps(1)
        self._land()
        assert self.ended.keys() == self.requests.keys(), "a request was lost"
        assert self.engine.pool.num_used == 0
        counters = self.scheduler.counters
        reasons = list(self.ended.values())
        assert counters.accepted == len(self.requests)
        assert counters.cancelled == reasons.count(FinishReason.CANCELLED)
        assert counters.failed == reasons.count(FinishReason.DEADLINE) + reasons.count(FinishReason.ERROR)
        assert counters.accepted == counters.finished + counters.cancelled + counters.failed


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


class AheadMachine(SchedulerMachine):
    """Steps are taken for granted, and their tokens settled when the next one is under way."""

    runs_ahead = True


TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = TestSchedulerMachine.settings
