"""The device's runner: on a GPU where there is one, else the same code on the CPU in Triton's interpreter, graphs replaced by
the calls they would hold.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.device_harness import BLOCK_SIZE, DEVICE, ON_GPU, load, make, make_plain
from uma_engine import Engine
from uma_engine.adapters import AdapterRegistry
from uma_engine.core import FinishReason, Request, SamplingParams
from uma_engine.engine import EngineLoop
from uma_engine.errors import DeviceOutOfMemory, InvalidRequest, UmaError
from uma_engine.runner.device_adapters import DeviceAdapters
from uma_kernels import dispatch
from uma_kernels.testing import assert_exact, assert_near, assert_reduction

pytestmark = pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with dispatch.use_backend("triton"):
        yield


@pytest.fixture
def model_dir(tiny_dir: Path) -> Path:
    return tiny_dir


@pytest.fixture
def adapters(adapter_dirs: dict[str, Path]) -> list[Path]:
    return list(adapter_dirs.values())


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
        theirs = make(model_dir, torch.bfloat16, max_loras=0, enforce_eager=True)  # a graph holds kernels alone
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


def test_a_path_of_segments_generates_what_one_segment_does(model_dir: Path) -> None:
    machine = make(model_dir, max_loras=0)
    expected = machine.generate(7, 5)
    machine.run()
    beside, on_path = machine.generate(6, 6), machine.generate_on_path(7, 5, cut=3)
    machine.run()
    assert on_path.output_token_ids == expected.output_token_ids
    assert len(beside.output_token_ids) == 6
    assert machine.pool.num_used == 0


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


def test_a_row_of_the_base_has_its_bits_beside_adapters(model_dir: Path, adapters: list[Path]) -> None:
    """Alone its step takes other kernels: no pools, and the MLP's activation at the end of a product."""
    machine = make(model_dir, torch.bfloat16)
    alpha = load(machine, "alpha", adapters[0])
    alone = machine.rank()
    machine.run()
    _, beside = machine.rank(alpha, seed=1), machine.rank()
    machine.run()
    assert_exact(machine.scores_of(beside), machine.scores_of(alone))


def test_adapters_are_kept_as_asked_for(model_dir: Path, adapters: list[Path]) -> None:
    machine = make(model_dir, max_loras=0)
    model, sizes = machine.runner._model, []
    for storage in ("dense", "fp8", "int4"):
        held = DeviceAdapters(
            model.site_groups(),
            max_loras=2,
            max_rank=16,
            max_tokens=8,
            dtype=torch.bfloat16,
            device=DEVICE,
            storage=storage,
        )
        AdapterRegistry(2, 16, model.sites(), held).load("a", adapters[0])
        pools = [held.pool_of(members[0].name) for _, members in model.site_groups()]
        assert {(pool.storage, pool.resident) for pool in pools} == {(storage, (0,))}
        sizes.append(sum(pool.a.nbytes + pool.b.nbytes for pool in pools))
    assert [sizes[0] // size for size in sizes] == [1, 2, 4]


def test_8_bit_products_are_near_and_take_adapters(model_dir: Path, adapters: list[Path]) -> None:
    """As near as torch's 8-bit products, half the memory of the blocks, embeddings in full; with adapters, alone and in company."""
    machine, plain = make(model_dir, torch.bfloat16, fp8=True), make(model_dir, torch.bfloat16)
    with dispatch.use_backend("reference"):
        by_torch = make(model_dir, torch.bfloat16, fp8=True, max_loras=0, enforce_eager=True)
        expected = by_torch.rank()
        by_torch.run()
    ref = load(machine, "alpha", adapters[0])
    requests = [machine.rank(), machine.rank(ref, seed=1), plain.rank()]
    machine.run()
    plain.run()
    ours, in_full = machine.scores_of(requests[0]), plain.scores_of(requests[2])
    error, torch_error = ((scores - in_full).abs().max() for scores in (ours, by_torch.scores_of(expected)))
    assert 0 < error <= 1.5 * torch_error
    assert torch_error < 0.3 * in_full.abs().max()  # random weights of 64 columns: real ones are in docs/gpu.md
    assert not torch.equal(machine.scores_of(requests[1]), plain.scores_of(requests[2]))
    alone = machine.rank(ref, seed=1)
    machine.run()
    assert torch.equal(machine.scores_of(alone), machine.scores_of(requests[1]))
    blocks = {m: m.runner._model.num_bytes - m.runner._model.embedding.weight.nbytes for m in (machine, plain)}
    assert machine.runner._model.embedding.weight.data.dtype is torch.bfloat16
    assert blocks[machine] < 0.75 * blocks[plain]


def test_running_out_of_memory_ends_a_step_and_not_the_engine(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make(model_dir, max_loras=0, enforce_eager=True)  # a replayed graph takes no memory
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
    assert 0 < len(first) <= len([s for s in request.segments if s.scored])  # what fits in one step


class Ends:
    """A sink that keeps tokens and scores, and ends its request at a token where it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.tokens: list[int] = []
        self.scores: dict[int, list[float]] = {}
        self.stop_at = stop_at
        self.end: tuple[FinishReason, UmaError | None] | None = None
        self.done = threading.Event()

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        self.scores[segment_index] = logits

    def on_token(self, token_id: int) -> bool:
        self.tokens.append(token_id)
        return len(self.tokens) == self.stop_at

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self.end = reason, error
        self.done.set()


@pytest.mark.parametrize("eager", [False, True] if ON_GPU else [False])
def test_steps_that_begin_with_unseen_tokens_draw_what_others_draw(model_dir: Path, eager: bool) -> None:
    """The engine's loop launches each step before it has read the last one's tokens; by hand each is waited for. Stop tokens, stops by
    the listener, random draws, penalties and a grammar that wait, requests that join and scores beside them: the same tokens."""

    def prompts(machine: Any) -> list[Request]:
        found = [
            machine.generate(6, 8, stop_token_ids=(stop,) if stop is not None else ()),
            machine.generate(3, 7, temperature=0.7, seed=4, top_k=40),
            machine.generate(9, 5, repetition_penalty=1.3),
            machine.generate_on_path(7, 5, cut=3),
            machine.generate(5, 6),
            machine.rank(),
            machine.generate(4, 6, grammar=OnlyEven()),
        ]
        return found

    stop = None
    by_hand = make(model_dir, max_loras=0, enforce_eager=eager)
    requests = prompts(by_hand)
    by_hand.run()
    stop = requests[0].output_token_ids[3]  # a token that it will draw
    assert all(token % 2 == 0 for token in requests[6].output_token_ids)
    expected = [request.output_token_ids for request in requests]
    expected[0] = expected[0][: expected[0].index(stop) + 1]
    expected[4] = expected[4][:2]

    machine = make(model_dir, max_loras=0, enforce_eager=eager)
    ahead: list[bool] = []
    launch = machine.runner.launch
    machine.runner.launch = lambda output: (
        ahead.append(any(c.segment.token_ids[-1] < 0 for c in output.chunks)),
        launch(output),
    )[1]
    submitted: list[Request] = []
    machine.scheduler.add_request = submitted.append  # the loop adds them
    sinks = [Ends(stop_at=2 if number == 4 else None) for number, _ in enumerate(prompts(machine))]
    del machine.scheduler.add_request
    loop = EngineLoop(machine.scheduler, machine.runner, max_waiting=100)
    try:
        for request, sink in zip(submitted, sinks, strict=True):
            loop.submit(request, sink)
        for sink in sinks:
            assert sink.done.wait(60)
    finally:
        loop.close()
    assert [sink.tokens for sink in sinks[:5]] == expected[:5]
    assert sinks[6].tokens == expected[6]
    assert [sink.end for sink in sinks] == [
        (FinishReason.STOP, None)
        if number in (0, 4)
        else (FinishReason.SCORED if number == 5 else FinishReason.LENGTH, None)
        for number in range(7)
    ]
    assert [sinks[5].scores[i] for i in sorted(sinks[5].scores)] == by_hand.scores_of(requests[5]).tolist()
    assert any(ahead), "no step began with a token that the host had not seen"
    assert machine.pool.num_used == 0
    machine.scheduler.check_integrity()


class OnlyEven:
    """A grammar of even token ids."""

    finished = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> bytes:
        return b"\x55" * 64

    def accept(self, token_id: int) -> int:
        assert token_id % 2 == 0
        self.taken.append(token_id)
        return token_id

    def forced(self) -> list[int]:
        return [8, 10] if len(self.taken) == 2 else []


class Broken(OnlyEven):
    """A grammar that fails before anything is drawn, and must not be asked again."""

    def mask(self) -> bytes:
        raise InvalidRequest("no token may come next")

    def accept(self, token_id: int) -> int:
        raise AssertionError("asked to accept what it never allowed")


def test_a_grammar_that_fails_ends_its_request_alone(model_dir: Path) -> None:
    machine = make(model_dir, max_loras=0)
    good, bad = machine.generate(4, 3), machine.generate(5, 3, grammar=Broken())
    machine.run()
    assert machine.ends[good.request_id] == (FinishReason.LENGTH, None)
    reason, error = machine.ends[bad.request_id]
    assert reason is FinishReason.ERROR
    assert isinstance(error, InvalidRequest)


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
