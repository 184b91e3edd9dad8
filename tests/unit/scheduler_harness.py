"""A runner without a model: it keeps what each slot of each block holds, and checks every promise made to a real one.

Knows blocks and requests; computes, instead of keys and values, a fingerprint of everything a token may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from uma_engine.config import EngineConfig
from uma_engine.core import (
    NO_PARENT,
    Request,
    RequestKind,
    SamplingParams,
    ScheduledChunk,
    SchedulerOutput,
    Segment,
    StepResult,
    unknown_token,
)
from uma_engine.kv_cache import BlockPool
from uma_engine.scheduler import Event, Finished, Scheduler, TokenReady

VOCABULARY = 50


def output_of(request: Request, fingerprint: int) -> list[float] | int:
    """What the model would say after a token: a pure function of the token's context."""
    if request.kind is RequestKind.GENERATE:
        return fingerprint % VOCABULARY
    return [float(fingerprint % 1009), float(fingerprint % 1013)]


def fingerprints(request: Request, index: int) -> list[int]:
    """One number for each token of a segment: a hash over the cache root and the path down to that token.

    They are kept in `request.user_data` and grow with the segment.
    """
    if request.user_data is None:
        request.user_data = {}
    known: list[int] = request.user_data.setdefault(index, [])
    segment = request.segments[index]
    if len(known) < len(segment):
        if known:
            value = known[-1]
        elif segment.parent == NO_PARENT:
            value = int.from_bytes(blake2b(request.cache_root, digest_size=7).digest(), "little")
        else:
            value = fingerprints(request, segment.parent)[-1]
        for token_id in segment.token_ids[len(known) :]:
            value = hash((value, token_id))
            known.append(value)
    return known


def expected_scores(request: Request) -> dict[int, list[float]]:
    return {
        index: output_of(request, fingerprints(request, index)[-1])
        for index, segment in enumerate(request.segments)
        if segment.scored
    }


def expected_tokens(prompt: Sequence[int], sampling: SamplingParams, stops: Sequence[int] = (), root: bytes = b""):
    """What a generate request alone, without limits, would answer."""
    request = generate_request("alone", prompt, sampling=sampling, cache_root=root)
    tokens: list[int] = []
    while len(tokens) < sampling.max_tokens and not (tokens and tokens[-1] in stops):
        tokens.append(output_of(request, fingerprints(request, 0)[-1]))
        request.segments[0].token_ids.append(tokens[-1])
    return tokens


class CheckingRunner:
    """Runs steps as a real runner does: all chunks write, then all read. A broken promise is an AssertionError."""

    def __init__(self, pool: BlockPool, config: EngineConfig) -> None:
        self.pool = pool
        self.config = config
        self.blocks: list[list[Any]] = [[None] * pool.block_size for _ in range(pool.num_blocks)]

    def run(self, output: SchedulerOutput) -> StepResult:
        assert output.num_tokens == sum(chunk.num_tokens for chunk in output.chunks)
        self._check_budget(output)
        known: dict[tuple[int, int], list[int]] = {}
        seen: dict[tuple[int, int], ScheduledChunk] = {}
        for chunk in output.chunks:
            place = (id(chunk.request), chunk.segment_index)
            assert place not in seen, "a segment has two chunks in one step"
            seen[place] = chunk
            parent = chunk.segment.parent
            while parent != NO_PARENT:
                if (id(chunk.request), parent) in seen:
                    ancestor = seen[id(chunk.request), parent]
                    assert ancestor.start + ancestor.num_tokens == len(ancestor.segment), "a parent's chunk ends early"
                parent = chunk.request.segments[parent].parent
            known[place] = fingerprints(chunk.request, chunk.segment_index)
        written: set[tuple[int, int]] = set()
        for chunk in output.chunks:
            self._write(chunk, known[id(chunk.request), chunk.segment_index], written)
        outputs = []
        for chunk in output.chunks:
            self._read(chunk, known)
            if chunk.wants_output:
                outputs.append(output_of(chunk.request, known[id(chunk.request), chunk.segment_index][-1]))
        return StepResult(outputs)

    def _check_budget(self, output: SchedulerOutput) -> None:
        budget = self.config.max_num_batched_tokens
        if output.num_tokens > budget:
            prefills = [c for c in output.chunks if c.segment.transient or c.num_tokens > 1]
            num_decodes = len(output.chunks) - len(prefills)
            assert len(prefills) == 1, "only a single transient segment may go beyond the budget"
            assert prefills[0].segment.transient, "only a single transient segment may go beyond the budget"
            assert output.num_tokens - budget <= num_decodes < self.config.max_num_seqs

    def _write(self, chunk: ScheduledChunk, values: list[int], written: set[tuple[int, int]]) -> None:
        segment, size = chunk.segment, self.pool.block_size
        end = chunk.start + chunk.num_tokens
        assert 0 <= chunk.start < end <= len(segment)
        ends_segment = end == len(segment)
        if segment.transient:
            assert chunk.start == 0, "a transient segment is cut"
            assert ends_segment, "a transient segment is cut"
            assert not segment.block_ids, "a transient segment has blocks"
        else:
            assert len(segment.block_ids) == -(-end // size)
            for position in range(chunk.start, end):
                slot = (segment.block_ids[position // size], position % size)
                assert slot not in written, "two chunks write to one slot"
                assert self.pool.ref_count(slot[0]) == 1, "a chunk writes to a block that others read"
                written.add(slot)
                self.blocks[slot[0]][slot[1]] = values[position]
        if chunk.wants_output:
            assert ends_segment
            assert segment.scored or chunk.request.kind is RequestKind.GENERATE

    def _read(self, chunk: ScheduledChunk, known: dict[tuple[int, int], list[int]]) -> None:
        request = chunk.request
        if not chunk.segment.transient:
            self._check_present(chunk.segment, known[id(request), chunk.segment_index], chunk.start)
        index = chunk.segment.parent
        while index != NO_PARENT:
            place = (id(request), index)
            if place not in known:
                known[place] = fingerprints(request, index)
            ancestor = request.segments[index]
            assert not ancestor.transient, "an ancestor is transient"
            self._check_present(ancestor, known[place], len(ancestor))
            index = ancestor.parent

    def _check_present(self, segment: Segment, values: list[int], num_tokens: int) -> None:
        size = self.pool.block_size
        for start in range(0, num_tokens, size):
            stop = min(start + size, num_tokens)
            held = self.blocks[segment.block_ids[start // size]]
            assert held[: stop - start] == values[start:stop], "a block does not hold what a chunk reads"


class Ahead:
    """As the engine's loop over a device: a step counts as done when it is launched, and its outputs are known a step later."""

    def __init__(self, scheduler: Scheduler, runner: CheckingRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.underway: list[tuple[Event, Any]] = []

    def update(self, output: SchedulerOutput) -> list[Event]:
        """Take a planned step for done; the events of the one before."""
        landed = self.land()
        outputs = self.runner.run(output).outputs  # the device knows what the host has yet to see
        wanted = [chunk for chunk in output.chunks if chunk.wants_output]
        unknown = [
            unknown_token(place) if chunk.request.kind is RequestKind.GENERATE else []
            for place, chunk in enumerate(wanted)
        ]
        values = {(id(c.request), c.segment_index): value for c, value in zip(wanted, outputs, strict=True)}
        for event in self.scheduler.update(output, StepResult(unknown)):
            index = event.request.growing if isinstance(event, TokenReady) else getattr(event, "segment_index", None)
            self.underway.append((event, values.get((id(event.request), index))))
        return landed

    def land(self) -> list[Event]:
        underway, self.underway = self.underway, []
        for event, value in underway:
            if isinstance(event, TokenReady):
                assert event.token_id < 0
                self.scheduler.settle(event, value)
                assert event.token_id == value
            elif not isinstance(event, Finished):
                event.logits = value
        return [event for event, _ in underway]


def score_request(
    request_id: str, tree: Sequence[tuple[Sequence[int], int, bool]], cache_root: bytes = b"", **options: Any
) -> Request:
    """`tree` lists (token ids, parent, scored)."""
    segments = [Segment(list(tokens), parent, scored) for tokens, parent, scored in tree]
    return Request(request_id, RequestKind.SCORE, segments, cache_root=cache_root, label_token_ids=(1, 2), **options)


def rank_request(request_id: str, prefix: Sequence[int], leaves: Sequence[Sequence[int]], **options: Any) -> Request:
    """A prefix with scored leaves."""
    tree = [(prefix, NO_PARENT, False), *((leaf, 0, True) for leaf in leaves)]
    return score_request(request_id, tree, **options)


def generate_request(
    request_id: str, prompt: Sequence[int], max_tokens: int = 4, cuts: Sequence[int] = (), **options: Any
) -> Request:
    """`cuts`: where the prompt is cut into the segments of a path."""
    options.setdefault("sampling", SamplingParams(max_tokens=max_tokens))
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(prompt)}), len(prompt)]
    path, start = [], 0
    for end in ends:
        path.append(Segment(list(prompt[start:end]), parent=len(path) - 1))
        start = end
    return Request(request_id, RequestKind.GENERATE, path, **options)


class Engine:
    """Scheduler, pool, runner and a clock that only moves when told to."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, max_model_len: int = 512, **options: Any) -> None:
        options.setdefault("max_num_batched_tokens", 32)
        self.config = EngineConfig(block_size=block_size, **options)
        self.pool = BlockPool(num_blocks, block_size)
        self.now = 0.0
        self.scheduler = Scheduler(self.config, self.pool, max_model_len=max_model_len, clock=lambda: self.now)
        self.runner = CheckingRunner(self.pool, self.config)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add_request(request)

    def step(self) -> tuple[SchedulerOutput, list[Event]]:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        events = self.scheduler.update(output, self.runner.run(output))
        self.scheduler.check_integrity()
        return output, events

    def drain(self, max_steps: int = 2000) -> tuple[list[SchedulerOutput], list[Event]]:
        """Step until nothing is left; every step that has work does some."""
        outputs, events = [], []
        while self.scheduler.has_unfinished():
            assert len(outputs) < max_steps, "the scheduler does not come to an end"
            output, new = self.step()
            assert output.chunks or not self.scheduler.has_unfinished(), "a step computes nothing while requests wait"
            outputs.append(output)
            events.extend(new)
        assert self.pool.num_used == 0, "blocks are held while idle"
        return outputs, events
