"""Continuous batching over request trees: requests come in, steps go out, results come back, requests end.

Knows the life of a request from acceptance to its end; does not know tensors, text, or who runs the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from uma_engine.config import EngineConfig
from uma_engine.core import FinishReason, Request, RequestKind, SchedulerOutput, StepResult
from uma_engine.errors import InvalidRequest, InvariantViolation, Overloaded, UmaError
from uma_engine.kv_cache import BlockPool
from uma_engine.scheduler.admission import mark_and_check_segments
from uma_engine.scheduler.events import Counters, Event, Finished, ScoreReady, TokenReady
from uma_engine.scheduler.integrity import check_scheduler
from uma_engine.scheduler.request_queue import DeadlineQueue
from uma_engine.scheduler.state import Phase, RequestState
from uma_engine.scheduler.step_planner import StepPlanner

__all__ = ["Scheduler"]


class Scheduler:
    """Plans steps and takes their results. One thread owns it, and one step is in flight at a time.

    The owner's loop: `output = schedule()`, report `output.finished`, and if there are chunks run them and call
    `update(output, result)`, or `abort_step(output, error)` if running them failed. Every accepted request ends exactly
    once: in `SchedulerOutput.finished` or as a `Finished` event.

    An owner whose runner is still at work may call `update` with unknown tokens and plan the next step. They must be settled before
    the `update` of that one.

    Token ids are checked against the vocabulary before they come here.
    """

    def __init__(
        self,
        config: EngineConfig,
        block_pool: BlockPool,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.block_pool = block_pool
        self.max_model_len = max_model_len
        self.counters = Counters()
        self._clock = clock
        self._planner = StepPlanner(config, block_pool, self.counters)
        self._waiting = self._planner.waiting
        self._running = self._planner.running
        self._live: dict[str, RequestState] = {}  # both of these, by id
        self._deadlines = DeadlineQueue()
        self._ended: list[tuple[Request, FinishReason]] = []  # for the next SchedulerOutput
        self._in_flight: SchedulerOutput | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def background_tokens(self) -> int:
        """About how many tokens a step with background prefill may have; see `StepPlanner`."""
        return self._planner.background_tokens

    @background_tokens.setter
    def background_tokens(self, tokens: int) -> None:
        self._planner.background_tokens = min(tokens, self.config.max_num_batched_tokens)

    def has_unfinished(self) -> bool:
        """Whether `schedule` has anything to do or to report."""
        return bool(self._live or self._ended)

    # ---- requests in ----

    def add_request(self, request: Request) -> None:
        """Accept a request at the end of the queue.

        Errors: Overloaded when `max_waiting` requests wait; TooLarge when a path cannot fit the model length or the
        block pool; InvalidRequest for an id that is in use, a request that was submitted before, a deadline that is
        NaN or a token id that is no 32-bit integer. A refused request is not changed in a way that matters.
        """
        if len(self._waiting) >= self.config.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait and `max_waiting` is {self.config.max_waiting}",
                hint="try again later, or start the engine with a larger `max_waiting`",
            )
        if request.request_id in self._live:
            raise InvalidRequest(f"request id `{request.request_id}` is in use", param="request_id")
        if request.scheduler_state is not None:
            raise InvalidRequest(f"request `{request.request_id}` was submitted before", hint="build a new Request")
        if request.deadline is not None and math.isnan(request.deadline):
            raise InvalidRequest("`deadline` is `nan`", hint="pass seconds of the engine's clock", param="deadline")
        mark_and_check_segments(request, self.config, self.block_pool, self.max_model_len)
        request.arrival = self._clock()
        state = RequestState(request, self.counters.accepted)
        request.scheduler_state = state
        self.counters.accepted += 1
        self._live[request.request_id] = state
        self._waiting.append(state)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, state)

    def cancel(self, request_id: str) -> bool:
        """End a request as CANCELLED; False if there is none of that id.

        Its blocks are free at once, or, if a step with it is in flight, when that step is updated; its results in that
        step are dropped.
        """
        return self._end_early(request_id, FinishReason.CANCELLED)

    def finish(self, request_id: str, reason: FinishReason = FinishReason.STOP) -> bool:
        """End a request because its owner has all it needs, such as a stop string. Otherwise as `cancel`."""
        return self._end_early(request_id, reason)

    # ---- a step out ----

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. It has at least one chunk while any request is waiting or running."""
        if self._in_flight is not None:
            raise InvariantViolation("a step is planned while another is in flight")
        for state in self._deadlines.pop_due(self._clock()):
            self._end_now(state, FinishReason.DEADLINE)
        output = SchedulerOutput(*self._planner.plan(), finished=self._ended)
        self._ended = []
        if output.chunks:
            self._in_flight = output
        return output

    # ---- results back in ----

    def update(self, output: SchedulerOutput, result: StepResult) -> list[Event]:
        """Take the results of the step that `schedule` planned; what happened, in chunk order. An output that is an error
        ends its request alone. Tokens may be unknown (`unknown_token`) where the request does not read them: `settle` their events later.

        Errors: InvariantViolation, with nothing changed, when the step is not the one in flight or the number of
        outputs is not the number of chunks that want one.
        """
        chunks = output.chunks
        num_wanted = sum(chunk.wants_output for chunk in chunks)
        if num_wanted != len(result.outputs):
            raise InvariantViolation(f"a step has {num_wanted} chunks with output but {len(result.outputs)} outputs")
        self._land(output)
        outputs = iter(result.outputs)
        events: list[Event] = []
        block_size = self.block_pool.block_size
        for chunk in chunks:
            value: Any = next(outputs) if chunk.wants_output else None
            request, index = chunk.request, chunk.segment_index
            state: RequestState = request.scheduler_state
            if state.ended_as is not None:  # its owner may have added up what it cost: that is not changed any more
                self._report_end(state, state.ended_as, events)
                continue
            request.num_computed_tokens += chunk.num_tokens
            if isinstance(value, UmaError):
                self._report_end(state, FinishReason.ERROR, events, value)
                continue
            segment = request.segments[index]
            segment.num_computed_tokens = end = chunk.start + chunk.num_tokens
            if chunk.decodes:  # hundreds a step: nothing is looked at that only others can have
                if not end % block_size:
                    self._planner.prefix_cache.insert(request, index, chunk.start, end)
                self._accept_token(state, value, events)
                continue
            if not segment.transient:
                state.open_chunk = None
                self._planner.prefix_cache.insert(request, index, chunk.start, end)
                if request.kind is RequestKind.GENERATE:
                    if chunk.wants_output:
                        self._accept_token(state, value, events)
                    continue
                if chunk.wants_output:
                    state.delivered.add(index)
            if chunk.wants_output:
                request.scores_left -= 1
                events.append(ScoreReady(request, index, value))
            if not segment.children_left and segment.done:
                state.finish_segment(index, self.block_pool)
            if not request.scores_left:
                self._report_end(state, FinishReason.SCORED, events)
        self.counters.computed_tokens += output.num_tokens
        return events

    def settle(self, event: TokenReady, token_id: int) -> None:
        """The unknown token of an event of `update` is this one. A stop token ends the request as `finish` does, and what it has in the
        step in flight is dropped.
        """
        request = event.request
        state: RequestState = request.scheduler_state
        outputs, token_ids = request.output_token_ids, request.segments[-1].token_ids
        token_ids[len(token_ids) - len(outputs) + event.position] = token_id
        outputs[event.position] = event.token_id = token_id
        if token_id in state.stop_token_ids:
            event.finish_reason = FinishReason.STOP
            if self._live.get(request.request_id) is state:
                self._end_early(request.request_id, FinishReason.STOP)

    def abort_step(self, output: SchedulerOutput, error: BaseException) -> list[Event]:
        """Running the step failed: end every request in it as ERROR (or as what it was ended as meanwhile)."""
        self._land(output)
        events: list[Event] = []
        for chunk in output.chunks:
            state: RequestState = chunk.request.scheduler_state
            self._report_end(state, state.ended_as or FinishReason.ERROR, events, error)
        return events

    def _land(self, output: SchedulerOutput) -> None:
        if output is not self._in_flight and (output.chunks or self._in_flight is not None):
            raise InvariantViolation("the step is not the one in flight")
        self._in_flight = None

    def _accept_token(self, state: RequestState, token_id: int, events: list[Event]) -> None:
        """Take a drawn token, and with it those that the request's grammar leaves no choice about: the next step computes them
        together, as it would a prompt."""
        request, grammar = state.request, state.request.grammar
        token_ids: tuple[int, ...] = (token_id,)
        if grammar is not None and not grammar.finished:
            token_ids += tuple(grammar.forced())
        outputs, growing = request.output_token_ids, request.segments[-1].token_ids
        whole = len(outputs) + len(token_ids) if grammar is not None and grammar.finished else -1
        reason: FinishReason | None = None
        for token in token_ids:
            outputs.append(token)
            growing.append(token)
            position = len(outputs)
            if token in state.stop_token_ids or position == whole:
                reason = FinishReason.STOP
            elif position >= state.max_tokens:  # within the model length: see admission
                reason = FinishReason.LENGTH
            events.append(TokenReady(request, token, position - 1, reason))
            if reason is not None:
                self._report_end(state, reason, events)
                return
        state.decoding = len(token_ids) == 1
        if not state.decoding:
            state.ready.append(request.growing)

    # ---- ends ----

    def _end_early(self, request_id: str, reason: FinishReason) -> bool:
        state = self._live.get(request_id)
        if state is None or state.ended_as is not None:
            return False
        if self._in_flight is not None and state.last_step == self._planner.step:
            state.ended_as = reason  # the step writes to its blocks; update reports the end
        else:
            self._end_now(state, reason)
        return True

    def _end_now(self, state: RequestState, reason: FinishReason) -> None:
        self._end(state, reason)
        self._ended.append((state.request, reason))

    def _report_end(
        self, state: RequestState, reason: FinishReason, events: list[Event], error: BaseException | None = None
    ) -> None:
        """End a request of the step that lands, unless an earlier chunk of it has done so."""
        if state.phase is Phase.ENDED:
            return
        self._end(state, reason)
        events.append(Finished(state.request, reason, error if reason is FinishReason.ERROR else None))

    def _end(self, state: RequestState, reason: FinishReason) -> None:
        state.release_all(self.block_pool)
        if state.phase is Phase.RUNNING:
            self._running.remove(state)
        else:
            self._waiting.remove(state)
        state.phase = Phase.ENDED
        state.ended_as = reason
        state.ready.clear()
        state.children.clear()
        request = state.request
        del self._live[request.request_id]
        if request.deadline is not None:
            self._deadlines.note_ended()
        if reason is FinishReason.CANCELLED:
            self.counters.cancelled += 1
        elif reason in (FinishReason.DEADLINE, FinishReason.ERROR):
            self.counters.failed += 1
        else:
            self.counters.finished += 1

    # ---- checks ----

    def check_integrity(self) -> None:
        """Raise InvariantViolation unless blocks, requests and counters agree. For tests: it looks at everything."""
        self.block_pool.check_integrity()
        check_scheduler(self)
