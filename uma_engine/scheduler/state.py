"""What the scheduler remembers about one request.

Knows the request's tree, where its work stands and the blocks it holds; does not know other requests or budgets.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from uma_engine.core import NO_PARENT, FinishReason, Request, RequestKind, ScheduledChunk
from uma_engine.kv_cache import BlockPool

__all__ = ["Phase", "RequestState"]


class Phase(Enum):
    WAITING = "waiting"  # never started, or preempted
    RUNNING = "running"
    ENDED = "ended"


class RequestState:
    """The scheduler's side of a request.

    `ready` is a depth-first stack of segments whose ancestors are all computed or scheduled in this step: the tree is
    walked one branch at a time, so that only the ancestors of its front hold blocks between steps.
    """

    __slots__ = (
        "children",
        "decoding",
        "delivered",
        "ended_as",
        "finished",
        "held",
        "last_step",
        "max_tokens",
        "open_chunk",
        "order",
        "passed_over",
        "phase",
        "ready",
        "request",
        "served_tokens",
        "stop_token_ids",
    )

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order  # of arrival: the smaller, the higher the priority
        self.phase = Phase.WAITING
        self.decoding = False  # GENERATE with its prefill done
        self.served_tokens = 0  # prefill tokens so far, for dividing the budget; see StepPlanner
        self.passed_over = 0  # steps in which a background request had work and got nothing
        self.last_step = -1  # the last step with a chunk of this request
        self.ended_as: FinishReason | None = None  # ended while its step was in flight: takes effect at update
        self.open_chunk: ScheduledChunk | None = None  # of this step, ends before its segment does
        self.held: set[int] = set()  # segments with blocks
        self.delivered: set[int] = set()  # scored segments with children whose logits are out
        self.finished = bytearray(len(request.segments))  # 1: computed, and so are all its descendants
        self.children: dict[int, list[int]] = {}  # NO_PARENT: the roots
        for index, segment in enumerate(request.segments):
            self.children.setdefault(segment.parent, []).append(index)
        self.ready: deque[int] = deque()
        self.stop_token_ids = request.stop_token_ids
        self.max_tokens = 0
        if request.sampling is not None:
            self.max_tokens = request.sampling.max_tokens
            self.stop_token_ids = request.stop_token_ids.union(request.sampling.stop_token_ids)
        self.restart()

    def restart(self) -> None:
        """Put the roots of all unfinished work on the stack."""
        self.ready = deque(root for root in self.children[NO_PARENT] if not self.finished[root])
        self.open_chunk = None
        self.decoding = False

    def open_children(self) -> None:
        """The segment in front is scheduled to its end: its unfinished children take its place."""
        children = self.children.get(self.ready.popleft())
        if children:
            if self.request.num_preemptions:
                children = [child for child in children if not self.finished[child]]
            self.ready.extendleft(reversed(children))

    def needs_output(self, index: int) -> bool:
        """Whether the last token of a segment must still be run for its output."""
        if self.request.kind is RequestKind.GENERATE:
            return index == self.request.growing
        return self.request.segments[index].scored and index not in self.delivered

    def finish_segment(self, index: int, pool: BlockPool) -> None:
        """If a segment is computed and no child is left: free its blocks, tell its parent, and so on to the root."""
        segments = self.request.segments
        while index != NO_PARENT:
            segment = segments[index]
            if segment.children_left or not segment.done:
                return
            self.finished[index] = 1
            if segment.block_ids:
                self._release(index, pool)
            index = segment.parent
            if index != NO_PARENT:
                segments[index].children_left -= 1

    def release_all(self, pool: BlockPool) -> None:
        """Free every block of the request, descendants first: they are of least use to others."""
        for index in sorted(self.held, reverse=True):
            self._release(index, pool)

    def _release(self, index: int, pool: BlockPool) -> None:
        segment = self.request.segments[index]
        pool.free(segment.block_ids)
        segment.block_ids = []
        self.held.discard(index)
