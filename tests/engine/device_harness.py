"""A scheduler over a runner, driven by hand: the device's runner, and beside it the CPU's over the reference back end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uma_engine.adapters import AdapterRegistry
from uma_engine.catalog import open_model
from uma_engine.config import EngineConfig
from uma_engine.core import AdapterRef, FinishReason, Grammar, Request, RequestKind, SamplingParams, Segment
from uma_engine.errors import DeviceOutOfMemory
from uma_engine.kv_cache import BlockPool
from uma_engine.models import load_model
from uma_engine.models.weights import Placement
from uma_engine.runner import DeviceRunner, ModelRunner
from uma_engine.scheduler import Finished, Scheduler, ScoreReady
from uma_kernels import dispatch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
LABELS = (5, 9, 300)
MAX_LEN, BLOCK_SIZE, NUM_BLOCKS = 96, 4, 64
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 24,
    "max_num_seqs": 4,
    "block_size": BLOCK_SIZE,
    "max_loras": 2,
    "max_lora_rank": 16,
}


@dataclass(eq=False)
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
        segments = [Segment(draw.integers(3, 400, 13).tolist())]
        segments += [Segment(draw.integers(3, 400, n).tolist(), parent=0, scored=True) for n in (1, 7, 4)]
        return self.add(RequestKind.SCORE, segments, adapter, label_token_ids=LABELS)

    def generate(
        self,
        num_prompt: int,
        max_tokens: int,
        adapter: AdapterRef | None = None,
        grammar: Grammar | None = None,
        **params: Any,
    ) -> Request:
        ids = np.random.default_rng(num_prompt).integers(3, 400, num_prompt).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        return self.add(RequestKind.GENERATE, [Segment(ids)], adapter, sampling=sampling, grammar=grammar)

    def generate_on_path(self, num_prompt: int, max_tokens: int, cut: int, **params: Any) -> Request:
        """As `generate`, the prompt cut into two segments."""
        ids = np.random.default_rng(num_prompt).integers(3, 400, num_prompt).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        path = [Segment(ids[:cut]), Segment(ids[cut:], parent=0)]
        return self.add(RequestKind.GENERATE, path, sampling=sampling)

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


def make(path: Path, dtype: torch.dtype = torch.float32, fp8: bool = False, **options: Any) -> Machine:
    """The device's runner, on whatever device there is."""
    config = EngineConfig(**(OPTIONS | options))
    files = open_model(path)
    with torch.inference_mode():
        model = load_model(files, max_positions=MAX_LEN, placement=Placement(DEVICE, dtype, fp8=fp8))
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
