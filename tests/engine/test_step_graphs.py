"""Graphs of scoring steps: the same bits as steps without graphs, whatever the size, the tree and the adapters; without a GPU the
calls that the graphs would hold, interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.device_harness import ON_GPU, Machine, load, make
from uma_engine.core import FinishReason
from uma_engine.runner.prepare import is_decode
from uma_kernels import dispatch
from uma_kernels.testing import assert_invariant

pytestmark = pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with dispatch.use_backend("triton"):
        yield


class Counting:
    """Step graphs that write down which steps they took."""

    def __init__(self, machine: Machine) -> None:
        self.graphs, self.taken = machine.runner._step_graphs, []
        machine.runner._step_graphs = self

    def run(self, arrays: Any) -> torch.Tensor | None:
        hidden = self.graphs.run(arrays)
        self.taken.append((arrays.num_tokens, hidden is not None))
        return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_have_the_bits_of_steps_without_graphs(
    tiny_dir: Path, adapter_dirs: dict[str, Path], dtype: torch.dtype
) -> None:
    """Several requests, chunked, with and without adapters; an adapter is replaced between replays of one graph."""
    scores = []
    for eager in (True, False):
        machine = make(tiny_dir, dtype, enforce_eager=eager)
        counting = None if eager else Counting(machine)
        alpha, _ = (load(machine, name, adapter_dirs[name]) for name in ("alpha", "beta"))
        found = [machine.rank(), machine.rank(alpha, seed=1)]
        machine.run()
        machine.registry.release(alpha)
        new = load(machine, "alpha", adapter_dirs["gamma"])
        assert new.slot == alpha.slot
        found.append(machine.rank(new, seed=1))
        machine.run()
        scores.append([machine.scores_of(request) for request in found])
        assert machine.pool.num_used == 0
        if counting is not None:
            assert all(taken for _, taken in counting.taken)
            assert len({tokens for tokens, _ in counting.taken}) > 2
    for ours, plain in zip(scores[1], scores[0], strict=True):
        assert_invariant(ours, plain)
    assert not torch.equal(scores[0][1], scores[0][2])


def test_a_step_with_no_room_in_its_graph_runs_without(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uma_engine.runner import step_graphs

    scores = []
    for room in (None, step_graphs.Room(48, 8, 1, 2, 64)):
        if room is not None:
            monkeypatch.setattr(step_graphs.Room, "of", classmethod(lambda cls, tokens, decodes, room=room: room))
        machine = make(tiny_dir, max_loras=0)
        counting = Counting(machine)
        request = machine.rank()
        machine.run()
        assert machine.ends[request.request_id] == (FinishReason.SCORED, None)
        assert all(taken for _, taken in counting.taken) is (room is None)
        scores.append(machine.scores_of(request))
    assert_invariant(scores[1], scores[0])


class Recording:
    """A model that keeps the hidden states of which it was asked for logits, by the request that they belong to."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.logits_of = machine, machine.runner._model.logits
        self.rows: dict[str, list[torch.Tensor]] = {}
        machine.runner._model.logits = self.logits
        self.chunks: list[Any] = []
        launch = machine.runner._launch

        def noted(output: Any) -> Any:
            wanted = [chunk for chunk in output.chunks if chunk.wants_output and chunk.request.sampling is not None]
            self.chunks = sorted(wanted, key=lambda chunk: not is_decode(chunk))  # as they are laid out
            return launch(output)

        machine.runner._launch = noted

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        for chunk, row in zip(self.chunks, hidden, strict=False):
            self.rows.setdefault(chunk.request.request_id, []).append(row.clone())
        return self.logits_of(hidden)


@pytest.mark.parametrize("eager", [False, True])
def test_a_decoding_row_has_its_bits_beside_prefill_and_paths(
    tiny_dir: Path, adapter_dirs: dict[str, Path], eager: bool
) -> None:
    """Alone, and beside requests that prefill, score, decode on a path of segments before it, and join in its middle."""
    found = []
    for company in (False, True):
        machine = make(tiny_dir, enforce_eager=eager)
        counting, recording = None if eager else Counting(machine), Recording(machine)
        alpha = load(machine, "alpha", adapter_dirs["alpha"])
        if company:
            machine.generate_on_path(6, 9, cut=3)
            machine.run(1)
        request, adapted = machine.generate(9, 8), machine.generate(5, 8, alpha)
        for seed in range(4):
            machine.run(2)
            if company:
                machine.rank(alpha if seed % 2 else None, seed=seed)
        machine.run()
        assert machine.pool.num_used == 0
        found.append([torch.stack(recording.rows[r.request_id]) for r in (request, adapted)])
        if company and counting is not None:
            assert all(taken for _, taken in counting.taken), "a step beside decodes has no graph"
            assert len({tokens for tokens, _ in counting.taken}) > 3
    for alone, beside in zip(*found, strict=True):
        assert alone.shape == (8, alone.shape[1])
        assert_invariant(beside, alone)


@pytest.mark.parametrize("budget", [100, 600, 1500, 2500])
def test_no_graph_has_more_rows_than_the_adapters_routing(tiny_dir: Path, budget: int) -> None:
    """Whatever the budget: captured graphs begin with the largest, and with adapters."""
    machine = make(tiny_dir, max_num_batched_tokens=budget)
    graphs = machine.runner._step_graphs
    graphs._prepare()
    assert max(size for size, _ in graphs._layouts) <= machine.runner.adapters.routing.max_num_tokens
    assert any(decodes for _, decodes in graphs._layouts)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_captured_steps_have_the_bits_of_eager_ones(tiny_dir: Path, adapter_dirs: dict[str, Path]) -> None:
    """Real sizes: hundreds of candidates, all buckets up to the budget, replays two steps ahead."""
    scores = []
    for eager in (True, False):
        machine = make(tiny_dir, torch.bfloat16, enforce_eager=eager, max_num_batched_tokens=1000)
        ref = load(machine, "alpha", adapter_dirs["alpha"])
        found = [machine.rank(ref if i % 3 else None, seed=i) for i in range(40)]
        machine.run()
        scores.append(torch.cat([machine.scores_of(request) for request in found]))
    assert_invariant(scores[1], scores[0])
