"""Decode steps that are recorded once and then played: the bits of steps that are not, in every architecture."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

import pytest
import torch
from parity_checkpoints import CHECKPOINTS, Checkpoint
from parity_helpers import NUM_SLOTS, Cache, Chunk, Path, make_batch
from test_quantised_precision import Quantised

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine.adapters import AdapterRegistry
from uma_engine.catalog import open_model
from uma_engine.models import DecoderModel, load_model
from uma_engine.models.taped_decode import TapedDecode
from uma_kernels import dispatch
from uma_kernels.linear import PRECISIONS
from uma_kernels.tape import NotTapeable, Tape, TapeMemory
from uma_kernels.testing import assert_exact, assert_invariant

Make = Callable[[str], Checkpoint]
pytestmark = pytest.mark.skipif(dispatch.C is None, reason="a tape plays compiled ops")


def decode(
    model: DecoderModel, tokens: Sequence[int], slots: Sequence[int], adapters: AdapterRegistry | None = None
) -> list[torch.Tensor]:
    """Hidden states of steps in which one, three, one, ... sequences grow by a token: all from one state of chance."""
    random.seed(3)
    cache = Cache(model.config)
    paths = [Path(cache) for _ in range(3)]
    for n, path in enumerate(paths):
        model.forward(make_batch([Chunk(path, tokens[: 3 + n])]), cache.tensors)
    steps = []
    for step in range(12):
        chunks = [Chunk(p, [random.choice(tokens)], slot) for p, slot in zip(paths, slots, strict=True)]
        chunks = chunks if step % 2 else chunks[step // 2 % 3 :][:1]
        steps.append(model.forward(make_batch(chunks, num_decodes=len(chunks)), cache.tensors, adapters))
    return steps


def unrecorded(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(TapedDecode, "takes", lambda *_: False)
        return run()


def assert_played_as_unrecorded(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[torch.Tensor]], times: int
) -> None:
    plain = unrecorded(monkeypatch, run)
    played: list[bool] = []
    play = Tape.play
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "play", lambda self: played.append(play(self)) or played[-1])
        for ours, theirs in zip(run(), plain, strict=True):
            assert_invariant(ours, theirs)
    assert played == [True] * times


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_architecture_is_played(name: str, checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoint(name)
    model = made.load()
    # Of twelve steps two are recorded: the first of one row and the first of three.
    assert_played_as_unrecorded(monkeypatch, lambda: decode(model, made.prefix, (-1, -1, -1)), times=10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_played(precision: str, checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoint("llama")
    model = load_model(Quantised(made), max_positions=128, precision=precision)
    assert_played_as_unrecorded(monkeypatch, lambda: decode(model, made.prefix, (-1, -1, -1)), times=10)


def test_adapters_are_played_until_a_slot_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath) -> None:
    model = load_model(open_model(make_tiny_model(tmp_path / "model")), max_positions=128)
    registry = AdapterRegistry(NUM_SLOTS, max_rank=16, sites=model.sites())
    slots = [registry.load(f"a{n}", make_tiny_adapter(tmp_path / f"a{n}", seed=n, rank=3 + n)).slot for n in range(2)]

    def run() -> list[torch.Tensor]:
        return decode(model, range(1, 60), (slots[1], -1, slots[0]), registry)

    # Recorded: the three together, and each of them alone.
    assert_played_as_unrecorded(monkeypatch, run, times=8)
    before = run()
    registry.unload("a0")
    assert registry.load("other", make_tiny_adapter(tmp_path / "other", seed=9)).slot == slots[0]
    assert_played_as_unrecorded(monkeypatch, run, times=8)
    after = run()
    assert torch.equal(before[1][:2], after[1][:2])
    assert not torch.equal(before[1][2], after[1][2])


def test_an_op_that_refuses_its_input_says_so(checkpoint: Make) -> None:
    made = checkpoint("llama")
    model = made.load()
    cache = Cache(model.config)
    path = Path(cache)
    model.forward(make_batch([Chunk(path, made.prefix)]), cache.tensors)
    for token in made.left[:2]:
        model.forward(make_batch([Chunk(path, [token])], num_decodes=1), cache.tensors)
    good = make_batch([Chunk(path, made.left[2:3])], num_decodes=1)
    bad = make_batch([Chunk(path, made.left[2:3])], num_decodes=1)
    bad.input_ids = torch.tensor([model.config.vocab_size])
    with pytest.raises(IndexError, match="ids"):
        model.forward(bad, cache.tensors)
    assert torch.isfinite(model.forward(good, cache.tensors)).all()


def test_what_a_tape_cannot_play_again_is_refused() -> None:
    for run in (lambda: torch.zeros(2), lambda: torch.empty(2).fill_(1), lambda: torch.empty(1) + 1):
        with pytest.raises(NotTapeable):
            Tape(run, TapeMemory())


def test_memory_on_the_way_is_used_again_and_results_stay() -> None:
    memory = TapeMemory()

    def run() -> torch.Tensor:
        x = torch.empty(4, 8)
        for _ in range(20):
            x = torch.empty(4, 8)[:2]
        return x

    first, second = Tape(run, memory), Tape(run, memory)
    assert memory.num_bytes <= 4 * 128
    assert first.result.data_ptr() != second.result.data_ptr()
    first.result.fill_(1)
    second.result.fill_(2)
    assert_exact(first.result, torch.ones(2, 8))
