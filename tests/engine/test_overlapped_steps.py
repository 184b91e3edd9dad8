"""Steps that are launched before the last one's results are taken, and the parts around a device's steps: staging, buckets,
memory, options. No kernel runs here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.device_harness import DEVICE
from uma_engine.config import EngineConfig
from uma_engine.core import FinishReason, Request, RequestKind, SamplingParams, SchedulerOutput, Segment, StepResult
from uma_engine.engine import EngineLoop
from uma_engine.errors import DeviceOutOfMemory, InvalidRequest, ModelOverflow, TooLarge, UmaError
from uma_engine.kv_cache import BlockPool
from uma_engine.runner.graphs import buckets_up_to
from uma_engine.runner.memory import DeviceMemory, num_kv_blocks
from uma_engine.runner.staging import Staging
from uma_engine.runner.step_graphs import step_buckets
from uma_engine.scheduler import Scheduler


class Listener:
    """A sink that keeps everything."""

    def __init__(self, stop_at: int | None = None, at_end: Callable[[], object] = lambda: None) -> None:
        self.scores: dict[int, list[float]] = {}
        self.tokens: list[int] = []
        self.ends: list[tuple[FinishReason, UmaError | None]] = []
        self.done = threading.Event()
        self.stop_at = stop_at  # tokens
        self.at_end = at_end

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        assert not self.ends
        self.scores[segment_index] = logits

    def on_token(self, token_id: int) -> bool:
        assert not self.ends
        self.tokens.append(token_id)
        return len(self.tokens) == self.stop_at

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self.ends.append((reason, error))
        self.at_end()
        self.done.set()


class Scripted:
    """A runner without a model: scores are the chunk's first token, tokens are 7; `launch` and `result` are written down."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.bad: set[int] = set()  # first tokens whose row overflows
        self.fail_launches: set[int] = set()
        self.num_launched = 0

    def run(self, output: SchedulerOutput) -> StepResult:
        raise AssertionError("a runner that can launch is not run")

    def launch(self, output: SchedulerOutput) -> Scripted.Step:
        self.num_launched += 1
        if self.num_launched in self.fail_launches:
            raise DeviceOutOfMemory("injected", hint="none")
        self.log.append(f"launch {self.num_launched}")
        return Scripted.Step(self, self.num_launched, output)

    class Step:
        def __init__(self, runner: Scripted, number: int, output: SchedulerOutput) -> None:
            self.runner, self.number = runner, number
            # Taken now: by the time of `result` the scheduler may have given blocks to others.
            self.firsts = [(c.request.kind, c.segment.token_ids[0]) for c in output.chunks if c.wants_output]

        def result(self) -> StepResult:
            self.runner.log.append(f"result {self.number}")
            values: list[list[float] | int | UmaError] = []
            for kind, first in self.firsts:
                if first in self.runner.bad:
                    values.append(ModelOverflow("injected"))
                else:
                    values.append([float(first)] if kind is RequestKind.SCORE else 7)
            return StepResult(values)


@pytest.fixture
def scripted() -> Iterator[tuple[EngineLoop, Scripted, Scheduler]]:
    config = EngineConfig(max_num_batched_tokens=8, max_num_seqs=4, block_size=4)
    scheduler, runner = Scheduler(config, BlockPool(64, 4), max_model_len=64), Scripted()
    loop = EngineLoop(scheduler, runner, max_waiting=100)
    yield loop, runner, scheduler
    loop.call(lambda s: s.check_integrity())
    loop.call(lambda s: None)
    assert scheduler.block_pool.num_used == 0
    loop.close()


def _ranked(name: str, base: int, count: int) -> Request:
    segments = [Segment([base] * 5), *(Segment([base + 1 + i] * 6, parent=0, scored=True) for i in range(count))]
    return Request(name, RequestKind.SCORE, segments, label_token_ids=(1,))


def test_the_next_step_is_launched_before_the_scores_of_the_last_are_read(scripted: Any) -> None:
    loop, runner, _ = scripted
    listeners = [Listener() for _ in range(3)]
    for i, listener in enumerate(listeners):
        loop.submit(_ranked(f"r{i}", 100 * (i + 1), 5), listener)
    for i, listener in enumerate(listeners):
        assert listener.done.wait(20)
        assert listener.ends == [(FinishReason.SCORED, None)]
        assert listener.scores == {k: [100.0 * (i + 1) + k] for k in range(1, 6)}
    positions = {event: at for at, event in enumerate(runner.log)}
    ahead = [n for n in range(1, runner.num_launched) if positions[f"launch {n + 1}"] < positions[f"result {n}"]]
    assert len(ahead) >= runner.num_launched - 4, runner.log


def _generated(name: str, tokens: int, stop: int | None = None) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    stops = frozenset() if stop is None else frozenset([stop])
    return Request(name, RequestKind.GENERATE, [Segment([3] * 6)], sampling=params, stop_token_ids=stops)


@pytest.mark.parametrize("by_listener", [False, True])
def test_an_id_is_free_and_costs_are_final_once_a_request_has_ended(scripted: Any, by_listener: bool) -> None:
    """The scheduler learns later of what a token ended: that must not end who has the id by then, nor change what was added up."""
    loop, _, _ = scripted
    request, costs, second, beside = _generated("same", 9, None if by_listener else 7), [], Listener(), Listener()

    def again() -> None:
        costs.append(request.num_computed_tokens)
        loop.submit(_generated("same", 5), second)

    first = Listener(1 if by_listener else None, again)
    loop.submit(_generated("beside", 40), beside)
    loop.submit(request, first)
    for listener, tokens, reason in (
        (first, 1, FinishReason.STOP),
        (second, 5, FinishReason.LENGTH),
        (beside, 40, None),
    ):
        assert listener.done.wait(20)
        assert len(listener.tokens) == tokens
        assert listener.ends == [(reason or FinishReason.LENGTH, None)]
    assert costs == [request.num_computed_tokens]


def test_what_a_done_step_brought_does_not_wait_for_another_engine(scripted: Any) -> None:
    loop, runner, _ = scripted
    loop.give_way = lambda: runner.num_launched >= 3
    short, long = Listener(), Listener()
    loop.submit(_generated("long", 40), long)
    loop.submit(_generated("short", 2), short)
    began = time.perf_counter()
    assert short.done.wait(20)
    assert time.perf_counter() - began < 4  # an engine gives way for 5 s
    loop.give_way = None
    assert long.done.wait(20)


def test_tokens_that_a_step_begins_with_may_be_unknown_beside_scores(scripted: Any) -> None:
    loop, _, _ = scripted
    ranked, generated = Listener(), Listener()
    loop.submit(_ranked("rank", 10, 6), ranked)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    loop.submit(Request("gen", RequestKind.GENERATE, [Segment([3] * 6)], sampling=params), generated)
    assert ranked.done.wait(20)
    assert generated.done.wait(20)
    assert generated.tokens == [7] * 5
    assert len(ranked.scores) == 6


def test_a_row_that_overflows_while_later_steps_run_ends_its_request_alone(scripted: Any) -> None:
    loop, runner, _ = scripted
    runner.bad = {202}
    good, bad = Listener(), Listener()
    loop.submit(_ranked("bad", 200, 5), bad)
    loop.submit(_ranked("good", 300, 5), good)
    assert bad.done.wait(20)
    assert good.done.wait(20)
    assert good.ends == [(FinishReason.SCORED, None)]
    ((reason, error),) = bad.ends
    assert reason is FinishReason.ERROR
    assert isinstance(error, ModelOverflow)


def test_a_launch_that_fails_ends_its_requests_and_the_loop_goes_on(scripted: Any) -> None:
    loop, runner, _ = scripted
    runner.fail_launches = {2}
    first, second = Listener(), Listener()
    loop.submit(_ranked("first", 10, 5), first)
    assert first.done.wait(20)
    ((reason, error),) = first.ends
    assert reason is FinishReason.ERROR
    assert isinstance(error, DeviceOutOfMemory)
    loop.submit(_ranked("second", 20, 5), second)
    assert second.done.wait(20)
    assert second.ends == [(FinishReason.SCORED, None)]


def test_cancelled_with_a_step_under_way(scripted: Any) -> None:
    loop, _, scheduler = scripted
    listeners = [Listener() for _ in range(20)]
    for i, listener in enumerate(listeners):
        loop.submit(_ranked(f"r{i}", 10 * i + 10, 8), listener)
        if i % 2:
            loop.cancel(f"r{i}")
    for listener in listeners:
        assert listener.done.wait(20)
        assert len(listener.ends) == 1
    c = scheduler.counters
    assert c.accepted == c.finished + c.cancelled + c.failed


def test_staging_hands_over_what_it_was_given() -> None:
    staging = Staging(DEVICE)
    for n in (1, 7, 20000, 3):
        arrays: list[np.ndarray] = [
            np.arange(n, dtype=np.int64),
            np.arange(2 * n, dtype=np.int32).reshape(2, n),
            np.empty((0, 4), np.int32),
        ]
        for array, tensor in zip(arrays, staging.upload(arrays), strict=True):
            assert tensor.device == DEVICE
            assert np.array_equal(tensor.cpu().numpy(), array)


def test_buckets_hold_every_batch() -> None:
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(5) == [1, 2, 4, 8]
    assert buckets_up_to(256)[-3:] == [128, 192, 256]
    assert step_buckets(1) == [16]
    assert step_buckets(100) == [16, 32, 64, 80, 96, 112]
    sizes = step_buckets(8192)
    assert sizes[-2:] == [7680, 8192]
    assert all(after <= 1.125 * before for before, after in itertools.pairwise(sizes) if before >= 512)


def test_the_cache_gets_what_is_left() -> None:
    memory = DeviceMemory(total=1000, free=700, step=150, graphs=50)
    assert num_kv_blocks(memory, 10, 0.9, None) == (900 - 300 - 150 - 50) // 10
    assert num_kv_blocks(memory, 10, 0.9, 95) == 9
    assert num_kv_blocks(DeviceMemory(2**40, 2**40, 0, 0), 10, 0.9, None) == 2**20
    with pytest.raises(TooLarge, match=r"401.*400"):
        num_kv_blocks(memory, 10, 0.9, 401)
    with pytest.raises(TooLarge, match="gpu_memory_utilization") as caught:
        num_kv_blocks(memory, 10, 0.5, None)
    assert caught.value.hint


def test_options_of_a_device_are_checked() -> None:
    for options, word in (
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"mode": "slow"}, "mode"),
        ({"lora_storage": "int8"}, "lora_storage"),
        ({"quantization": "int8"}, "quantization"),
        ({"quantization": "fp8"}, "quantization"),  # on the CPU
        ({"quantization": "fp8", "device": "cuda", "dtype": "float16"}, "quantization"),
        ({"lora_storage": "int4"}, "lora_storage"),  # the CPU has float32 alone
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization"),
        ({"enforce_eager": 1}, "enforce_eager"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            EngineConfig(**options)
    assert EngineConfig(device="cuda").compute_dtype == "bfloat16"
    assert EngineConfig(device="cuda", quantization="fp8").quantization == "fp8"
    assert EngineConfig().compute_dtype == "float32"
