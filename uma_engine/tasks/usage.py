"""Adds up what a call cost, stage by stage.

Knows requests' counters and clocks; does not know what the stages are for. A call in several phases makes a `Usage` of each and joins
them: `usage_of(...)` for what went through the model, `Clock().stage(name)` for what a thread of its own computed, `joined(...)` for
the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from uma_engine.core import Request, RequestKind
from uma_engine.tasks.results import Stage, Usage

__all__ = ["Clock", "joined", "usage_of"]


class Clock:
    """Starts now: the time, and the processor time of the calling thread."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def stage(self, name: str) -> Stage:
        """What this thread did since then."""
        return Stage(
            name,
            seconds=time.perf_counter() - self._began[0],
            core_seconds=time.thread_time() - self._began[1],
        )


def usage_of(
    requests: Sequence[Request],
    tokenized: Stage,
    started: float,
    flops_per_token: float,
    name: str = "score",
    ended: float | None = None,
) -> Usage:
    """The cost of requests that ended, submitted at `started`, as the stage `name` after `tokenized`. `ended`: now."""
    computed = sum(r.num_computed_tokens for r in requests)
    seconds = (time.perf_counter() if ended is None else ended) - started if requests else 0.0
    stage = Stage(
        name,
        computed_tokens=computed,
        cached_tokens=sum(r.num_cached_tokens for r in requests),
        output_tokens=sum(len(r.output_token_ids) for r in requests),
        flops=computed * flops_per_token,
        attention_flops=float(sum(r.attention_flops for r in requests)),
        seconds=seconds,
        core_seconds=sum(r.core_seconds for r in requests),
        gpu_seconds=sum(r.gpu_seconds for r in requests),
    )
    stages = (tokenized, stage) if requests else (tokenized,)
    return _total(stages, sum(map(_prompt_tokens, requests)), tokenized.seconds, seconds)


def joined(usages: Iterable[Usage], before: Iterable[Stage] = ()) -> Usage:
    """One call of several phases, one after the other: all stages in order, `before` in front; every counter their sum."""
    usages = list(usages)
    stages = (*before, *(stage for usage in usages for stage in usage.stages))
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    tokenization = sum(usage.tokenization_time for usage in usages)
    return _total(stages, prompt_tokens, tokenization, sum(s.seconds for s in stages) - tokenization)


def _total(stages: tuple[Stage, ...], prompt_tokens: int, tokenization_time: float, inference_time: float) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        computed_tokens=sum(s.computed_tokens for s in stages),
        cached_tokens=sum(s.cached_tokens for s in stages),
        output_tokens=sum(s.output_tokens for s in stages),
        flops=sum(s.flops for s in stages),
        tokenization_time=tokenization_time,
        inference_time=inference_time,
        attention_flops=sum(s.attention_flops for s in stages),
        core_seconds=sum(s.core_seconds for s in stages),
        gpu_seconds=sum(s.gpu_seconds for s in stages),
        stages=stages,
    )


def _prompt_tokens(request: Request) -> int:
    """Tokens that the request would have taken without sharing: every scored path by itself."""
    if request.kind is RequestKind.GENERATE:
        return request.num_prompt_tokens
    return sum(s.path_offset + len(s) for s in request.segments if s.scored)
