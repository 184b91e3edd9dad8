"""The device's runner: on a GPU where there is one, else the same code on the CPU in Triton's interpreter, graphs replaced by
the calls they would hold.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine
from uma_engine.adapters import AdapterRegistry
from uma_engine.catalog import open_model
from uma_engine.config import EngineConfig
from uma_engine.core import (
    AdapterRef,
    FinishReason,
    Request,
    RequestKind,
    SamplingParams,
    SchedulerOutput,
    Segment,
    StepResult,
)
from uma_engine.engine import EngineLoop
from uma_engine.errors import DeviceOutOfMemory, InvalidRequest, ModelOverflow, TooLarge, UmaError
from uma_engine.kv_cache import BlockPool
from uma_engine.models import load_model
from uma_engine.models.weights import Placement
from uma_engine.runner import DeviceRunner, ModelRunner
from uma_engine.runner.graphs import buckets_up_to
from uma_engine.runner.memory import DeviceMemory, num_kv_blocks
from uma_engine.runner.staging import Staging
from uma_engine.scheduler import Finished, Scheduler, ScoreReady
from uma_kernels import dispatch
from uma_kernels.testing import assert_near, assert_reduction

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
LABELS = (5, 9, 300)
MAX_LEN, BLOCK_SIZE, NUM_BLOCKS = 96, 4, 64
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 48,
    "max_num_seqs": 4,
    "block_size": BLOCK_SIZE,
    "max_loras": 2,
    "max_lora_rank": 16,
}

pytestmark = pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with dispatch.use_backend("triton"):
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("device") / "tiny")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("device-adapters")
    return [make_tiny_adapter(root / str(seed), seed=seed, rank=rank) for seed, rank in ((1, 4), (2, 8), (3, 16))]


@dataclass
class Machine:
    """A scheduler over a runner, driven by hand."""

    runner: Any
    registry: AdapterRegistry
    config: EngineConfig
    scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    ends: dict[str, tuple[FinishReason, BaseException | None]] = field(default_factory=dict)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(self.config, self.pool, max_model_len=MAX_LEN)

    def add(
        self, kind: RequestKind, segments: list[Segment], adapter: AdapterRef | None = None, **options: Any
    ) -> Request:
        request = Request(f"r{self.num_requests}", kind, segments, adapter=adapter, **options)
        self.num_requests += 1
        self.scheduler.add_request(request)
        return request

    def rank(self, adapter: AdapterRef | None = None, seed: int = 0) -> Request:
        """A job with three candidates of different lengths."""
        draw = np.random.default_rng(seed)
        segments = [Segment(draw.integers(3, 400, 21).tolist())]
        segments += [Segment(draw.integers(3, 400, n).tolist(), parent=0, scored=True) for n in (1, 9, 6)]
        return self.add(RequestKind.SCORE, segments, adapter, label_token_ids=LABELS)

    def generate(self, num_prompt: int, max_tokens: int, adapter: AdapterRef | None = None, **params: Any) -> Request:
        ids = np.random.default_rng(num_prompt).integers(3, 400, num_prompt).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        return self.add(RequestKind.GENERATE, [Segment(ids)], adapter, sampling=sampling)

    def run(self, steps: int = 1000) -> None:
        while steps and self.scheduler.has_unfinished():
            steps -= 1
            output = self.scheduler.schedule()
            try:
                events = self.scheduler.update(output, self.runner.run(output))
            except DeviceOutOfMemory as error:
                events = self.scheduler.abort_step(output, error)
            for event in events:
                name = event.request.request_id
                if isinstance(event, ScoreReady):
                    self.scores.setdefault(name, {})[event.segment_index] = event.logits
                elif isinstance(event, Finished):
                    self.ends[name] = event.reason, event.error

    def scores_of(self, request: Request) -> torch.Tensor:
        return torch.tensor([self.scores[request.request_id][i] for i in sorted(self.scores[request.request_id])])


def make(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Machine:
    """The device's runner, on whatever device there is."""
    config = EngineConfig(**(OPTIONS | options))
    files = open_model(path)
    with torch.inference_mode():
        model = load_model(files, max_positions=MAX_LEN, placement=Placement(DEVICE, dtype))
    runner = DeviceRunner(model, config, MAX_LEN)
    runner.allocate(NUM_BLOCKS)
    registry = AdapterRegistry(config.max_loras, config.max_lora_rank, model.sites(), runner.adapters)
    return Machine(runner, registry, config)


def make_plain(path: Path) -> Machine:
    """The CPU's runner over the reference back end, in fp32: what is expected."""
    config = EngineConfig(**OPTIONS)
    with dispatch.use_backend("reference"):
        model = load_model(open_model(path), max_positions=MAX_LEN)
    registry = AdapterRegistry(config.max_loras, config.max_lora_rank, model.sites())
    return Machine(Forced(ModelRunner(model, config, NUM_BLOCKS, registry)), registry, config)


class Forced:
    """A runner whose steps take the reference back end."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def run(self, output: Any) -> Any:
        with dispatch.use_backend("reference"):
            return self._runner.run(output)


def load(machine: Machine, name: str, path: Path) -> AdapterRef:
    with dispatch.use_backend("reference" if isinstance(machine.runner, Forced) else "triton"):
        machine.registry.load(name, path)
        return machine.registry.lease(name)


def test_scores_are_those_of_the_cpu(model_dir: Path) -> None:
    expected, machine = make_plain(model_dir), make(model_dir, max_loras=0)
    for m in (expected, machine):
        m.requests = [m.rank(seed=seed) for seed in (0, 1)]  # type: ignore[attr-defined]
        m.run()
        assert m.pool.num_used == 0
    for ours, theirs in zip(machine.requests, expected.requests, strict=True):  # type: ignore[attr-defined]
        assert_near(machine.scores_of(ours), expected.scores_of(theirs))


def test_bf16_scores_are_as_near_to_fp32_as_torch_is(model_dir: Path) -> None:
    expected, ours, theirs = make_plain(model_dir), make(model_dir, torch.bfloat16, max_loras=0), None
    with dispatch.use_backend("reference"):
        theirs = make(model_dir, torch.bfloat16, max_loras=0)
        by_torch = theirs.rank()
        theirs.run()
    requests = [m.rank() for m in (expected, ours)]
    expected.run()
    ours.run()
    assert_reduction(
        ours.scores_of(requests[1]), theirs.scores_of(by_torch), expected.scores_of(requests[0]), torch.bfloat16
    )


@pytest.mark.parametrize("eager", [False, True] if ON_GPU else [False])  # in the interpreter the same calls
def test_generated_tokens_are_those_of_the_cpu(model_dir: Path, eager: bool) -> None:
    """Over block borders, with sequences that come and go, beside a rank request; one of them draws at random."""
    outputs = []
    for machine in (make_plain(model_dir), make(model_dir, max_loras=0, enforce_eager=eager)):
        first = machine.generate(6, 8)
        machine.run(3)
        second = machine.generate(3, 4, temperature=0.7, seed=4)
        third = machine.generate(9, 4, repetition_penalty=1.3)
        machine.run(2)
        machine.rank()
        machine.run()
        outputs.append([r.output_token_ids for r in (first, second, third)])
        assert machine.pool.num_used == 0
    assert outputs[0] == outputs[1]
    assert [len(tokens) for tokens in outputs[1]] == [8, 4, 4]


def test_adapters_are_applied_and_replaced_between_replays(model_dir: Path, adapters: list[Path]) -> None:
    """Decode steps go on while an adapter is replaced: the captured graph sees the new one, other rows see nothing."""
    outputs, scores = [], []
    for machine in (make_plain(model_dir), make(model_dir)):
        alpha, beta = load(machine, "alpha", adapters[0]), load(machine, "beta", adapters[1])
        ranked = machine.rank(alpha)
        running = machine.generate(5, 7, beta)
        plain = machine.generate(4, 5)
        short = machine.generate(7, 2, alpha)
        while ranked.request_id not in machine.ends or short.request_id not in machine.ends:
            machine.run(1)
        assert running.request_id not in machine.ends
        for ref in (alpha,):
            machine.registry.release(ref)
        new = load(machine, "alpha", adapters[2])
        assert new.slot == alpha.slot, "the slot was meant to be used again"
        again = machine.generate(7, 3, new)
        machine.run()
        outputs.append([r.output_token_ids for r in (running, plain, short, again)])
        scores.append(machine.scores_of(ranked))
    assert outputs[0] == outputs[1]
    assert_near(scores[1], scores[0], products=2)


def test_running_out_of_memory_ends_a_step_and_not_the_engine(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make(model_dir, max_loras=0)
    model = machine.runner._model
    lost, forward = machine.rank(), model.forward

    def fails(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(model, "forward", fails)
    machine.run(1)
    reason, error = machine.ends[lost.request_id]
    assert reason is FinishReason.ERROR
    assert isinstance(error, DeviceOutOfMemory)
    assert error.hint
    assert machine.pool.num_used == 0
    monkeypatch.setattr(model, "forward", forward)
    found = machine.rank()
    machine.run()
    assert machine.ends[found.request_id] == (FinishReason.SCORED, None)


def test_a_row_that_overflows_ends_alone(model_dir: Path) -> None:
    machine = make(model_dir, max_loras=0)
    good, bad = machine.generate(4, 6), machine.generate(5, 6)
    machine.run(2)
    # NaN into the cache of one sequence: its next logits are not finite, its neighbour's are.
    block = bad.segments[0].block_ids[0]
    machine.runner._kv.v[0][block * BLOCK_SIZE].fill_(float("nan"))
    machine.run()
    assert machine.ends[good.request_id][0] is FinishReason.LENGTH
    assert machine.ends[bad.request_id][0] is FinishReason.ERROR


def test_two_steps_may_be_under_way(model_dir: Path) -> None:
    """A step is launched before the results of the one before are taken: its own buffers do not touch theirs."""
    machine = make(model_dir, max_loras=0)
    request = machine.rank()
    output = machine.scheduler.schedule()
    launched = [machine.runner.launch(output) for _ in range(3)]
    first, *others = [step.result().outputs for step in launched]
    assert first == others[0] == others[1]
    machine.scheduler.update(output, launched[0].result())
    assert len(first) == len([s for s in request.segments if s.scored])


class Listener:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}
        self.tokens: list[int] = []
        self.ends: list[tuple[FinishReason, UmaError | None]] = []
        self.done = threading.Event()

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        assert not self.ends
        self.scores[segment_index] = logits

    def on_token(self, token_id: int) -> bool:
        assert not self.ends
        self.tokens.append(token_id)
        return False

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self.ends.append((reason, error))
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


def test_tokens_are_waited_for_beside_scores(scripted: Any) -> None:
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
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization"),
        ({"enforce_eager": 1}, "enforce_eager"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            EngineConfig(**options)
    assert EngineConfig(device="cuda").compute_dtype == "bfloat16"
    assert EngineConfig().compute_dtype == "float32"


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_a_missing_device_is_said_so(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="no CUDA device"):
        Engine(model_dir, device="cuda")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_engine_on_a_gpu(model_dir: Path, adapters: list[Path]) -> None:
    """End to end: measured cache, captured graphs, adapters; the same bits alone, in company and again."""
    with Engine(model_dir, device="cuda", max_model_len=2048, gpu_memory_utilization=0.3) as engine:
        assert engine._stack.block_pool.num_blocks > 1000
        engine.load_adapter("a", adapters[0])
        people = [f"Candidate {i} knows Rust and Linux " * (1 + i % 3) for i in range(9)]
        together = [s.logits for s in engine.score("We need a Rust engineer.", people)]
        assert [s.logits for s in engine.score("We need a Rust engineer.", people[3:4])] == together[3:4]
        assert [s.logits for s in engine.score("We need a Rust engineer.", people, adapter="a")] != together
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        alone = engine.generate(people[0], params)[0].token_ids
        assert engine.generate(people, params)[0].token_ids == alone
    assert torch.cuda.memory_allocated() < 2**28
