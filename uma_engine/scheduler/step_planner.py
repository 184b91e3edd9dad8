"""One step's plan: who is admitted, which tokens are computed, who gives blocks up for whom.

Knows running and waiting requests, blocks and the budget; does not know results, time, or how requests end.
"""

from __future__ import annotations

from uma_engine.config import EngineConfig
from uma_engine.core import Request, ScheduledChunk
from uma_engine.kv_cache import BlockPool, PrefixCache
from uma_engine.scheduler.events import Counters
from uma_engine.scheduler.request_queue import RequestQueue
from uma_engine.scheduler.state import Phase, RequestState

__all__ = ["StepPlanner"]

PATIENCE = 16  # steps


class StepPlanner:
    """Plans steps over the requests in `running` and `waiting`, which it shares with the Scheduler.

    Order in a step: one token for each decoding request; then prefill. Prefill's share of the budget is first divided
    equally among the requests that have work, least served first, and what is left goes to the earliest arrival. Background requests
    come after all others, and a step with their prefill has about `background_tokens` at most: who arrives next waits for no
    more. One that was passed over for `PATIENCE` steps counts as any other in the next.

    The earliest request always gets on: it may take the blocks of all others, and alone it fits the pool.
    """

    def __init__(self, config: EngineConfig, block_pool: BlockPool, counters: Counters) -> None:
        self.config = config
        self.block_pool = block_pool
        self.prefix_cache = PrefixCache(block_pool, config.enable_prefix_cache)
        self.counters = counters
        self.waiting = RequestQueue()
        self.running: list[RequestState] = []  # in order of arrival
        self.background_tokens = (
            config.max_num_batched_tokens
        )  # changed between steps by who measures how long they take
        self.step = 0  # number of the step planned last
        self._least_served = 0  # where a newcomer's `served_tokens` begins: neither ahead of nor behind the others
        # of the step being planned
        self._chunks: list[ScheduledChunk] = []
        self._tokens_left = 0
        self._prefill_tokens = 0
        self._keys_in_step: set[bytes] = set()  # of blocks that this step computes

    def plan(self) -> tuple[list[ScheduledChunk], int]:
        """The chunks of the next step and their number of tokens. Without chunks only if there are no requests."""
        self.step += 1
        self._chunks = []
        self._tokens_left = self.config.max_num_batched_tokens
        self._prefill_tokens = 0
        self._keys_in_step.clear()
        self._admit()
        self._schedule_decodes()
        self._schedule_prefills()
        return self._chunks, self.config.max_num_batched_tokens - self._tokens_left

    def _admit(self) -> None:
        running = self.running
        if not len(self.waiting) or len(running) >= self.config.max_num_seqs:
            return
        needed = self._num_blocks_outstanding()
        while len(self.waiting) and len(running) < self.config.max_num_seqs:
            state = self.waiting.head
            out_of_order = bool(running) and state.order < running[-1].order
            needed += self._num_blocks_to_start(state)
            if needed > self.block_pool.num_free and running and not out_of_order:
                return  # it would soon be preempted; those that run will make room
            self.waiting.remove(state)
            state.phase = Phase.RUNNING
            state.served_tokens = max(state.served_tokens, self._least_served)
            running.append(state)
            if out_of_order:
                running.sort(key=lambda other: other.order)

    def _num_blocks_outstanding(self) -> int:
        """Blocks that running requests are about to take: exact for the segments in hand, one for each that decodes."""
        total = 0
        for state in self.running:
            if state.decoding:
                total += 1
            elif state.ready:
                total += self._num_blocks_to_start(state)
        return total

    def _num_blocks_to_start(self, state: RequestState) -> int:
        """Free blocks that the segment in front still needs."""
        request, front = state.request, state.ready[0]
        segment = request.segments[front]
        if segment.transient:
            return 0
        if segment.block_ids:
            return -(-len(segment.token_ids) // self.block_pool.block_size) - len(segment.block_ids)
        return self.prefix_cache.num_blocks_to_allocate(request, front, state.needs_output(front))

    def _schedule_decodes(self) -> None:
        block_size, step, chunks = self.block_pool.block_size, self.step, self._chunks
        for state in tuple(self.running):
            if not state.decoding:  # prefill, or preempted a moment ago
                continue
            if self._tokens_left <= 0:
                return
            request = state.request
            segments = request.segments
            index = len(segments) - 1
            segment = segments[index]
            start = segment.num_computed_tokens
            if start == len(segment.block_ids) * block_size and not self._take_blocks(state, index, 1):
                continue
            state.last_step = step
            self._tokens_left -= 1
            chunks.append(ScheduledChunk(request, index, start, 1, True, decodes=True))

    def _schedule_prefills(self) -> None:
        active = [state for state in self.running if state.ready]
        if not active or self._tokens_left <= 0:
            return
        self._least_served = min(state.served_tokens for state in active)
        last = [state for state in active if state.request.background and state.passed_over < PATIENCE]
        self._divide([state for state in active if state not in last] if last else active, self._tokens_left)
        if last:
            self._divide(last, self.background_tokens - (self.config.max_num_batched_tokens - self._tokens_left))
            for state in last:
                state.passed_over = 0 if state.last_step == self.step else state.passed_over + 1
        for state in active:
            if state.passed_over >= PATIENCE and state.last_step == self.step:
                state.passed_over = 0

    def _divide(self, active: list[RequestState], tokens: int) -> None:
        """Prefill of these requests, together about `tokens` of what is left in the step."""
        end = self._tokens_left - tokens
        if not active or tokens <= 0:
            return
        share = max(1, tokens // len(active))
        for state in sorted(active, key=lambda state: state.served_tokens):
            if state.phase is Phase.RUNNING and self._tokens_left > end:
                self._fill(state, share)
        for state in active:
            if state.phase is Phase.RUNNING and self._tokens_left > end:
                self._fill(state, self._tokens_left - end)

    def _fill(self, state: RequestState, quota: int) -> None:
        """Schedule prefill of one request until it has `quota` tokens more, or the last piece goes a little beyond."""
        segments, ready = state.request.segments, state.ready
        while quota > 0 and self._tokens_left > 0 and ready:
            if segments[ready[0]].transient:
                taken = self._schedule_transients(state, quota)
            else:
                taken = self._schedule_kept(state, ready[0], quota)
            if taken is None:
                return
            quota -= taken
            if taken:
                state.last_step = self.step
                state.served_tokens += taken
                self._prefill_tokens += taken
                self._tokens_left -= taken

    def _schedule_transients(self, state: RequestState, quota: int) -> int | None:
        """Schedule the transient segments in front, each whole; None when not even the first fits this step."""
        request, ready = state.request, state.ready
        segments, chunks, room = request.segments, self._chunks, self._tokens_left
        taken = 0
        while ready and taken < quota:
            index = ready[0]
            segment = segments[index]
            num_tokens = len(segment.token_ids)
            # the first prefill of a step may push decode tokens over the budget: it would never fit otherwise
            if not segment.transient or (taken + num_tokens > room and (taken or self._prefill_tokens)):
                break
            ready.popleft()
            chunks.append(ScheduledChunk(request, index, 0, num_tokens, True))
            taken += num_tokens
        return taken or None

    def _schedule_kept(self, state: RequestState, index: int, quota: int) -> int | None:
        """Schedule tokens of a segment that owns blocks, from the cache where possible; the number to be computed.

        None when the segment must wait: no block is free, the next one is being computed in this step by another
        request, or there is less room than a block.
        """
        request, block_size = state.request, self.block_pool.block_size
        segment = request.segments[index]
        num_tokens = len(segment.token_ids)
        needs_output = state.needs_output(index)
        chunk = state.open_chunk
        if chunk is None:
            self._reuse_blocks(state, index, needs_output)
            if segment.done:
                state.open_children()
                if not segment.children_left:
                    state.finish_segment(index, self.block_pool)
                return 0
            start = segment.num_computed_tokens
        else:
            start = chunk.start + chunk.num_tokens
        if self._is_in_step(request, index, start, needs_output):
            return None
        # whole blocks, so that another request can go on where this one stands
        end = min(start + min(max(quota, block_size), self._tokens_left), num_tokens)
        if end < num_tokens:
            aligned = end - end % block_size
            if aligned > start:
                end = aligned
            elif self._prefill_tokens:
                return None
        missing = -(-end // block_size) - len(segment.block_ids)
        if missing > 0 and self._take_blocks(state, index, missing) < missing:
            end = len(segment.block_ids) * block_size
            if end <= start:
                return None
        if chunk is None:
            chunk = state.open_chunk = ScheduledChunk(request, index, start, 0, False)
            self._chunks.append(chunk)
        chunk.num_tokens = end - chunk.start
        if self.prefix_cache.enabled:
            keys = self.prefix_cache.keys(request, index, len(segment.block_ids))
            self._keys_in_step.update(keys[start // block_size : len(segment.block_ids)])
        if end == num_tokens:
            chunk.wants_output = needs_output
            state.open_chunk = None
            state.open_children()
        return end - start

    def _reuse_blocks(self, state: RequestState, index: int, needs_output: bool) -> None:
        request = state.request
        gained = self.prefix_cache.extend(request, index, needs_output)
        if gained:
            state.held.add(index)
            request.num_cached_tokens += gained
            self.counters.cached_tokens += gained

    def _is_in_step(self, request: Request, index: int, start: int, needs_output: bool) -> bool:
        """Whether the block at `start` could be taken from the cache if this segment waited for one step."""
        position, inside = divmod(start, self.block_pool.block_size)
        if inside or not self._keys_in_step:
            return False
        if position >= self.prefix_cache.num_matchable_blocks(request, index, needs_output):
            return False
        return self.prefix_cache.keys(request, index, position + 1)[position] in self._keys_in_step

    def _take_blocks(self, state: RequestState, index: int, num_blocks: int) -> int:
        """Give a segment up to `num_blocks` free blocks; later arrivals are preempted where it would get none."""
        pool = self.block_pool
        while not pool.num_free:
            victim = self._latest_holder()
            if victim is None or victim.order <= state.order:
                return 0
            self._preempt(victim)
        block_ids = pool.allocate(min(num_blocks, pool.num_free))
        assert block_ids is not None
        state.request.segments[index].block_ids.extend(block_ids)
        state.held.add(index)
        return len(block_ids)

    def _latest_holder(self) -> RequestState | None:
        return next((state for state in reversed(self.running) if state.held), None)

    def _preempt(self, victim: RequestState) -> None:
        """Free what a running request holds and put it back in the queue; what it has delivered stays delivered."""
        if victim.last_step == self.step:
            for chunk in self._chunks:
                if chunk.request is victim.request:
                    self._tokens_left += chunk.num_tokens
                    if not victim.decoding:
                        self._prefill_tokens -= chunk.num_tokens
            self._chunks[:] = [chunk for chunk in self._chunks if chunk.request is not victim.request]
            victim.last_step = -1
        for index in victim.held:
            segment = victim.request.segments[index]
            segment.num_computed_tokens = segment.num_cached_tokens = 0
        victim.release_all(self.block_pool)
        self.running.remove(victim)
        victim.phase = Phase.WAITING
        victim.request.num_preemptions += 1
        victim.restart()
        self.waiting.put_back(victim)
        self.counters.preempted += 1
