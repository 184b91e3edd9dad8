"""What each request costs, measured step by step: processor seconds, device seconds, the products of attention.

Knows chunks, clocks and the model's shape; does not know text, answers or money. A step that several requests share is charged to them by
their tokens in it, so that all charges together are what was spent.

Processor time is that of the engine's threads: the loop's own and those that no Python code runs on, which are the kernels' helpers (and
any other library's pool that computes at the same moment). Other threads of the process, such as a server's, are not in it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence

from uma_engine.config import ModelConfig
from uma_engine.core import ScheduledChunk

__all__ = ["StepMeter", "attended_keys"]


def attended_keys(first: int, num_tokens: int, window: int | None) -> int:
    """Keys that tokens at positions [first, first + num_tokens) of a path look at in one layer, themselves included."""
    growing = num_tokens if window is None else min(max(window - first, 0), num_tokens)
    total = growing * first + growing * (growing + 1) // 2
    return total + (num_tokens - growing) * (window or 0)


class StepMeter:
    """Charges steps to requests. One thread, the loop's, calls it; the totals may be read from any.

    `core_seconds`, `gpu_seconds`, `attention_flops`, `tokens`: all charges so far.
    """

    def __init__(self, config: ModelConfig, *, on_device: bool = False) -> None:
        windows = Counter(config.window_of(layer) for layer in range(config.num_layers))
        # A query against a key, and its weight times the value: a multiply and an add for each element of each.
        per_key = 4 * config.num_heads * config.head_dim
        self._layers = [(window, per_key * count) for window, count in windows.items()]
        self._on_device = on_device
        self._clock = _EngineClock()
        self._landed = 0.0
        self.core_seconds = 0.0
        self.gpu_seconds = 0.0
        self.attention_flops = 0
        self.tokens = 0

    def begin(self) -> None:
        """There is work again: what was before is nobody's."""
        self._clock.restart()

    def charge(self, chunks: Sequence[ScheduledChunk], launched: float) -> None:
        """A step is done that was begun at `launched` (`time.perf_counter`); its requests pay for the time since the last charge."""
        tokens = sum(chunk.num_tokens for chunk in chunks)
        core = self._clock.elapsed()
        gpu = 0.0
        if self._on_device:  # steps run one after the other: from when it could begin to when it was seen to be over
            now = time.perf_counter()
            gpu, self._landed = now - max(launched, self._landed), now
        self.core_seconds += core
        self.gpu_seconds += gpu
        self.tokens += tokens
        total = 0
        for chunk in chunks:
            request, num_tokens = chunk.request, chunk.num_tokens
            first = request.segments[chunk.segment_index].path_offset + chunk.start
            flops = 0
            for window, cost in self._layers:
                if num_tokens == 1:  # hundreds of decodes a step
                    flops += cost * (first + 1 if window is None or window > first else window)
                else:
                    flops += cost * attended_keys(first, num_tokens, window)
            share = num_tokens / tokens
            request.attention_flops += flops
            request.core_seconds += core * share
            request.gpu_seconds += gpu * share
            total += flops
        self.attention_flops += total


class _EngineClock:
    """Processor seconds of the calling thread and of the process's threads that are not Python's, since the last reading."""

    def __init__(self) -> None:
        self._own = 0.0
        self._native: dict[int, float] = {}

    def restart(self) -> None:
        self._own, self._native = time.thread_time(), _native_times()

    def elapsed(self) -> float:
        own, native = time.thread_time(), _native_times()
        spent = own - self._own
        spent += sum(seconds - self._native.get(thread, 0.0) for thread, seconds in native.items())
        self._own, self._native = own, native
        return max(0.0, spent)


def _native_times() -> dict[int, float]:
    """Processor seconds of each thread on which no Python code runs. Empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return {}
    python = {thread.native_id for thread in threading.enumerate()}
    times = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/task"):  # noqa: PTH208
            if (thread := int(name)) not in python:
                with contextlib.suppress(OSError):  # it may just have ended
                    # The kernel's name for the scheduling clock of a thread: see clock_getcpuclockid(3), and cpuclock in its sources.
                    times[thread] = time.clock_gettime(~thread << 3 | 6)
    return times
