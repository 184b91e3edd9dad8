"""Models of real shapes with random weights made on the device, and an engine over token ids alone.

Knows shapes and the engine's layers below text; does not know tokenizers, files or clocks. Random weights give random scores:
what is measured is speed and memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from uma_engine.catalog.model_files import expected_shapes
from uma_engine.config import EngineConfig, ModelConfig, RopeScaling
from uma_engine.core import FinishReason, Request, RequestKind, SamplingParams, Segment
from uma_engine.engine import EngineLoop
from uma_engine.errors import UmaError
from uma_engine.kv_cache import BlockPool
from uma_engine.models import load_model
from uma_engine.models.weights import Placement
from uma_engine.runner import DeviceRunner
from uma_engine.scheduler import Scheduler

__all__ = ["SHAPES", "RandomWeights", "TokenEngine"]


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig("qwen3", 151_936, hidden, inner, layers, heads, 8, 128, 1e-6, 1e6, 40_960, tied)


LLAMA_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, False),
    "llama-3.1-8b": ModelConfig(
        "llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 1e-5, 5e5, 131_072, False, rope_scaling=LLAMA_ROPE
    ),
}


class RandomWeights:
    """A weight source that draws each tensor where it is needed: norms are 1, matrices normal with deviation 0.02."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.config = config
        self._shapes = expected_shapes(config)
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return drawn.normal_(0, 0.02, generator=self._generator).to(self._dtype)  # the same values for every dtype


class TokenEngine:
    """Scheduler, runner and loop over one model, for requests of token ids."""

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, max_model_len: int, **options: Any
    ) -> None:
        self.options = EngineConfig(**({"max_loras": 0, "device": device.type} | options))
        with torch.inference_mode():
            self.model = load_model(
                RandomWeights(config, device, dtype),
                max_positions=max_model_len,
                placement=Placement(device, dtype, self.options.mode, self.options.quantization == "fp8"),
            )
        self.runner = DeviceRunner(self.model, self.options, max_model_len)
        num_blocks = self.runner.fit() if device.type == "cuda" else 256
        self.runner.allocate(num_blocks)
        self.scheduler = Scheduler(self.options, BlockPool(num_blocks, self.options.block_size), max_model_len)
        self.loop = EngineLoop(self.scheduler, self.runner, max_waiting=4096)
        self._num_requests = 0

    def score(self, job: Sequence[int], candidates: Sequence[Sequence[int]], labels: tuple[int, ...]) -> _Waiter:
        """Begin to score candidates after a job."""
        segments = [Segment(list(job)), *(Segment(list(ids), parent=0, scored=True) for ids in candidates)]
        return self._submit(RequestKind.SCORE, segments, label_token_ids=labels)

    def generate(self, prompt: Sequence[int], max_tokens: int) -> _Waiter:
        """Begin to generate the likeliest tokens."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return self._submit(RequestKind.GENERATE, [Segment(list(prompt))], sampling=params)

    def request(self, kind: RequestKind, segments: list[Segment], **options: Any) -> Request:
        """A request with an id of its own, for a caller who drives the scheduler by hand."""
        self._num_requests += 1
        return Request(f"request-{self._num_requests}", kind, segments, **options)

    def close(self) -> None:
        self.loop.close()
        self.runner.release()
        del self.model

    def _submit(self, kind: RequestKind, segments: list[Segment], **options: Any) -> _Waiter:
        waiter = _Waiter()
        self.loop.submit(self.request(kind, segments, **options), waiter)
        return waiter


class _Waiter:
    """A sink that keeps what comes and lets one thread wait for the end."""

    def __init__(self) -> None:
        self.logits: dict[int, list[float]] = {}
        self.tokens: list[int] = []
        self._error: UmaError | None = None
        self._done = threading.Event()

    def on_scores(self, segment_index: int, logits: list[float]) -> None:
        self.logits[segment_index] = logits

    def on_token(self, token_id: int) -> bool:
        self.tokens.append(token_id)
        return False

    def on_finished(self, reason: FinishReason, error: UmaError | None) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> _Waiter:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self


def random_ids(generator: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    """Token ids that no earlier request had: nothing comes from the prefix cache."""
    ids: list[int] = generator.integers(1000, vocab_size - 1000, count).tolist()
    return ids
