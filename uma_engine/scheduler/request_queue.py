"""Requests that do not run: first come, first served, with preempted ones in front; and who is due when.

Knows order and time; does not know budgets or blocks.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator

from uma_engine.scheduler.state import Phase, RequestState

__all__ = ["DeadlineQueue", "RequestQueue"]


class RequestQueue:
    """Waiting requests in order of arrival.

    A preempted request was admitted before all that have not started, so it arrived before them: the preempted form a
    short sorted list of their own in front. Adding and removing others is O(1) anywhere in the queue.
    """

    def __init__(self) -> None:
        self._preempted: list[RequestState] = []
        self._fresh: OrderedDict[str, RequestState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._preempted) + len(self._fresh)

    def __iter__(self) -> Iterator[RequestState]:
        yield from self._preempted
        yield from self._fresh.values()

    @property
    def head(self) -> RequestState:
        """The next to be admitted; the queue must not be empty."""
        return self._preempted[0] if self._preempted else next(iter(self._fresh.values()))

    def append(self, state: RequestState) -> None:
        self._fresh[state.request.request_id] = state

    def put_back(self, state: RequestState) -> None:
        """Take a preempted request back, in front of all that have not started."""
        insort(self._preempted, state, key=lambda other: other.order)

    def remove(self, state: RequestState) -> None:
        if self._fresh.pop(state.request.request_id, None) is None:
            self._preempted.remove(state)


class DeadlineQueue:
    """A heap of deadlines.

    Entries of requests that have ended are cleared out once they outnumber the others, so that a far deadline does not
    keep a finished request in memory.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestState]] = []
        self._num_live = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, state: RequestState) -> None:
        heapq.heappush(self._heap, (deadline, state.order, state))
        self._num_live += 1

    def pop_due(self, now: float) -> list[RequestState]:
        """Requests that have not ended and whose deadline is not after `now`, earliest deadline first."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            state = heapq.heappop(self._heap)[2]
            if state.phase is not Phase.ENDED:
                due.append(state)
        return due

    def note_ended(self) -> None:
        """A request that was added has ended, for whatever reason."""
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].phase is not Phase.ENDED]
            heapq.heapify(self._heap)
