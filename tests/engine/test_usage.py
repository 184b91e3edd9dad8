"""What a call cost: counted by hand, split by stages that add up, shared out among calls in one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uma_engine import Candidate, Engine, SamplingParams
from uma_engine.config import ModelConfig
from uma_engine.core import Request, RequestKind, ScheduledChunk, Segment
from uma_engine.engine.meter import StepMeter, attended_keys
from uma_engine.ranking.factors import Fact, Linear
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks.results import Stage, Usage
from uma_engine.tasks.usage import Clock, joined

JOB = "We need a Rust engineer who knows databases."
PEOPLE = [
    Candidate(f"p{i}", f"{word} " * (5 + 9 * i)) for i, word in enumerate(("Rust", "Linux", "nursing", "payroll"))
]
READS = (
    Read("skills", "Answer {labels}: do the skills match?"),
    Read("years", "Answer {labels}: are the years enough?"),
)
COUNTED = (
    "computed_tokens",
    "cached_tokens",
    "output_tokens",
    "flops",
    "attention_flops",
    "core_seconds",
    "gpu_seconds",
)


def assert_adds_up(usage: Usage) -> None:
    for name in COUNTED:
        assert getattr(usage, name) == sum(getattr(stage, name) for stage in usage.stages), name
    assert usage.total_time == pytest.approx(sum(stage.seconds for stage in usage.stages))


def flops_by_hand(engine: Engine, lengths: list[tuple[int, int]]) -> float:
    """Attention of the tiny model over runs of tokens (first position, number): each looks at all before it and itself."""
    c = engine._stack.model_config
    return sum(
        4.0 * c.num_layers * c.num_heads * c.head_dim * (p + 1) for first, n in lengths for p in range(first, first + n)
    )


def test_the_stages_of_a_rank_add_up_and_its_attention_is_what_hands_count(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(enable_prefix_cache=False)
    usage = engine.rank(JOB, PEOPLE).usage
    assert [stage.name for stage in usage.stages] == ["tokenize", "score"]
    assert_adds_up(usage)
    assert usage.flops == usage.computed_tokens * engine.flops_per_token
    # From totals alone: the shared part by what one candidate computes less their own part of it.
    alone = [engine.rank(JOB, [p]).usage for p in PEOPLE]
    shared = (sum(a.computed_tokens for a in alone) - usage.computed_tokens) // (len(PEOPLE) - 1)
    runs = [(0, shared)] + [(shared, a.computed_tokens - shared) for a in alone]
    assert usage.attention_flops == flops_by_hand(engine, runs)
    tokenize, score = usage.stages
    assert tokenize.computed_tokens == 0
    assert 0 < tokenize.core_seconds <= tokenize.seconds + 0.05
    assert score.core_seconds > 0
    assert usage.gpu_seconds == 0


def test_cached_tokens_cost_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    first, second = (engine.rank(JOB, PEOPLE).usage for _ in range(2))
    assert second.cached_tokens > 0
    assert second.computed_tokens + second.cached_tokens == first.computed_tokens
    cached = second.cached_tokens
    assert first.attention_flops - second.attention_flops == flops_by_hand(engine, [(0, cached)])
    assert_adds_up(second)


def test_surfaces_generation_and_empty_calls_add_up(
    make_engine: Callable[..., Engine], adapter_dirs: dict[str, Path]
) -> None:
    engine = make_engine(enable_prefix_cache=False)
    engine.load_adapter("alpha", adapter_dirs["alpha"])
    two = (READS[0], Read("fit", "Answer {labels}: is it a fit?", adapter="alpha"))
    fact = Fact("x", "x", Linear(0, 1), missing=0.5)
    for surface in (Surface("s", reads=READS), Surface("t", reads=two), Surface("u", facts=(fact,))):
        usage = engine.rank(JOB, PEOPLE, surface=surface).usage
        assert_adds_up(usage)
        assert (usage.attention_flops > 0) == bool(surface.reads)
    assert_adds_up(engine.rank(JOB, []).usage)
    assert [s.name for s in engine.rank(JOB, []).usage.stages] == ["tokenize"]
    (done,) = engine.generate("We need a Rust", SamplingParams(max_tokens=7, ignore_eos=True))
    assert [s.name for s in done.usage.stages] == ["tokenize", "generate"]
    assert_adds_up(done.usage)
    assert done.usage.output_tokens == 7
    assert done.usage.attention_flops == flops_by_hand(engine, [(0, done.usage.computed_tokens)])
    assert done.usage.reused_tokens == 0


def test_steps_that_calls_share_are_charged_by_tokens_and_nothing_twice(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(enable_prefix_cache=False, max_num_batched_tokens=64, num_threads=2)
    engine.rank(JOB, PEOPLE)
    meter = engine._stack.meter
    before = meter.core_seconds, meter.tokens, meter.attention_flops
    began = time.process_time()
    usages: list[Usage] = []

    def work(number: int) -> None:
        usages.extend(engine.rank(f"{JOB} {number}", PEOPLE).usage for _ in range(3))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.process_time() - began
    charged = sum(u.stages[1].core_seconds for u in usages)
    assert charged == pytest.approx(meter.core_seconds - before[0])
    assert sum(u.computed_tokens for u in usages) == meter.tokens - before[1]
    assert sum(u.attention_flops for u in usages) == meter.attention_flops - before[2]
    assert 0 < charged <= spent * 1.02 + 0.05, "no more than the process used"
    assert charged > 0.2 * spent
    for usage in usages:
        assert_adds_up(usage)


def test_other_threads_of_the_process_are_not_charged(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(enable_prefix_cache=False, num_threads=1)
    done = threading.Event()

    def burn() -> None:
        while not done.is_set():
            sum(range(1000))

    thread = threading.Thread(target=burn)
    thread.start()
    began = time.process_time()
    usage = [engine.rank(JOB, PEOPLE).usage for _ in range(10)]
    spent = time.process_time() - began
    done.set()
    thread.join()
    assert sum(u.core_seconds for u in usage) < 0.9 * spent


def test_preempted_work_is_paid_for_again(make_engine: Callable[..., Engine]) -> None:
    """A cache so small that requests take each other's blocks: computed tokens and attention grow together."""
    engine = make_engine(kv_cache_bytes=2**17, max_model_len=256, max_num_batched_tokens=32, enable_prefix_cache=False)
    prompts = ["a b c d e f g h " * 4] * 6
    done = engine.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    assert engine._stack.scheduler.counters.preempted > 0
    meter = engine._stack.meter
    assert (
        sum(c.usage.computed_tokens for c in done) == meter.tokens == engine._stack.scheduler.counters.computed_tokens
    )
    assert sum(c.usage.attention_flops for c in done) == meter.attention_flops


@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("first", [0, 1, 2, 5, 63, 64, 90])
def test_attended_keys(first: int, window: int | None) -> None:
    for n in range(1, 12):
        expected = sum(p + 1 if window is None else min(p + 1, window) for p in range(first, first + n))
        assert attended_keys(first, n, window) == expected


def test_a_device_is_charged_for_each_moment_once_although_steps_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = ModelConfig(
        "llama", 10, 8, 8, 2, 2, 1, 4, 1e-5, 1e4, 64, True, layer_types=("sliding", "full"), sliding_window=2
    )
    meter = StepMeter(config, on_device=True)
    requests = [
        Request(str(i), RequestKind.SCORE, [Segment([1] * 6, scored=True)], label_token_ids=(1, 2)) for i in range(2)
    ]
    now = 0.0
    monkeypatch.setattr("uma_engine.engine.meter.time.perf_counter", lambda: now)
    meter.begin()
    now = 3.0  # launched at 1, seen to be over at 3; the next one was launched at 2
    meter.charge([ScheduledChunk(requests[0], 0, 0, 3, False), ScheduledChunk(requests[1], 0, 0, 1, False)], 1.0)
    now = 4.0
    meter.charge([ScheduledChunk(requests[1], 0, 1, 5, True)], 2.0)
    assert (requests[0].gpu_seconds, requests[1].gpu_seconds) == (1.5, 1.5)
    assert meter.gpu_seconds == 3.0
    per_key = 4 * 2 * 4
    assert requests[0].attention_flops == per_key * ((1 + 2 + 3) + (1 + 2 + 2))
    assert requests[1].attention_flops == per_key * ((1 + 2 + 3 + 4 + 5 + 6) + (1 + 2 * 5))


def test_usages_of_phases_join_into_one(engine: Engine) -> None:
    usages = [engine.rank(JOB, PEOPLE).usage, engine.generate("Rust", SamplingParams(max_tokens=3))[0].usage]
    clock = Clock()
    time.sleep(0.01)
    cut = clock.stage("first stage")
    whole = joined(usages, before=[cut])
    assert [s.name for s in whole.stages] == ["first stage", "tokenize", "score", "tokenize", "generate"]
    assert_adds_up(whole)
    assert whole.prompt_tokens == sum(u.prompt_tokens for u in usages)
    assert whole.computed_tokens == sum(u.computed_tokens for u in usages)
    assert whole.total_time == pytest.approx(cut.seconds + sum(u.total_time for u in usages))
    assert joined([]) == Usage(0, 0, 0, 0, 0, 0, 0)
    assert Usage(1, 1, 0, 0, 0.0, 0.0, 0.0).stages == ()
    assert Stage("x").flops == 0
