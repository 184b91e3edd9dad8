"""The scheduler's invariants, each checked from scratch.

Knows the scheduler's own fields, which nobody else may; does not change them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from uma_engine.core import NO_PARENT, Request, RequestKind
from uma_engine.errors import InvariantViolation
from uma_engine.scheduler.state import Phase, RequestState

if TYPE_CHECKING:
    from uma_engine.scheduler.scheduler import Scheduler

__all__ = ["check_scheduler"]


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise InvariantViolation unless every request is in one place, every used block has exactly its users, each
    tree's counts are those of its segments, and the counters add up."""
    running, waiting = scheduler._running, list(scheduler._waiting)
    live = list(scheduler._live.values())
    _expect({id(s) for s in running + waiting} == {id(s) for s in live}, "live requests are not those in the queues")
    _expect(len(running) + len(waiting) == len(live), "a request is in two places")
    _expect(all(s.phase is Phase.RUNNING for s in running), "a running request is not marked as running")
    _expect(all(s.phase is Phase.WAITING for s in waiting), "a waiting request is not marked as waiting")
    _expect(all(not s.held for s in waiting), "a waiting request holds blocks")
    _expect(len(running) <= scheduler.config.max_num_seqs, "more requests run than `max_num_seqs`")
    for queue in (running, waiting):
        orders = [s.order for s in queue]
        _expect(orders == sorted(orders), "requests are not in order of arrival")
    counters = scheduler.counters
    ended = counters.finished + counters.cancelled + counters.failed
    _expect(counters.accepted == ended + len(live), f"counters do not add up: {counters}, {len(live)} live")
    pool = scheduler.block_pool
    users: Counter[int] = Counter()
    for state in live:
        _check_request(state, pool.block_size, scheduler._in_flight is not None)
        for segment in state.request.segments:
            users.update(segment.block_ids)
    counts = {block_id: pool.ref_count(block_id) for block_id in range(pool.num_blocks) if pool.ref_count(block_id)}
    _expect(counts == dict(users), f"reference counts are {counts} but requests use {dict(users)}")


def _check_request(state: RequestState, block_size: int, in_flight: bool) -> None:
    request = state.request
    name = f"request `{request.request_id}`"
    segments = request.segments
    unfinished = Counter(s.parent for s, finished in zip(segments, state.finished, strict=True) if not finished)
    holders = {index for index, segment in enumerate(segments) if segment.block_ids}
    _expect(holders == state.held, f"{name}: segments {holders} have blocks but {state.held} are noted")
    for index, segment in enumerate(segments):
        label = f"{name}, segment {index}"
        _expect(segment.children_left == unfinished[index], f"{label}: `children_left` is wrong")
        _expect(0 <= segment.num_computed_tokens <= len(segment), f"{label}: computed more tokens than there are")
        if state.finished[index]:
            _expect(segment.done and not segment.children_left, f"{label}: finished too early")
        if segment.transient or state.finished[index]:
            _expect(not segment.block_ids, f"{label}: holds blocks that nobody will read")
        elif not in_flight:
            expected = -(-segment.num_computed_tokens // block_size)
            _expect(len(segment.block_ids) == expected, f"{label}: {len(segment.block_ids)} blocks, not {expected}")
            has_context = segment.parent == NO_PARENT or segments[segment.parent].done
            _expect(has_context or not segment.block_ids, f"{label}: computed before its parent")
    if request.kind is RequestKind.SCORE:
        _expect(request.scores_left == _num_scores_left(request, state), f"{name}: `scores_left` is wrong")
    if not in_flight:
        _expect(state.open_chunk is None, f"{name}: a chunk is open between steps")
        path = _ancestors_of_front(state)
        _expect(state.decoding or holders <= path, f"{name}: {holders} have blocks, beyond its path {path}")


def _num_scores_left(request: Request, state: RequestState) -> int:
    return sum(
        segment.scored and not state.finished[index] and index not in state.delivered
        for index, segment in enumerate(request.segments)
    )


def _ancestors_of_front(state: RequestState) -> set[int]:
    path: set[int] = set()
    index = state.ready[0] if state.ready else NO_PARENT
    while index != NO_PARENT:
        path.add(index)
        index = state.request.segments[index].parent
    return path


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvariantViolation(otherwise)
