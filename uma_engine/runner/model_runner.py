"""Runs the model once a step: KV tensors, the forward pass, label logits and sampled tokens.

Knows tensors of one step; does not know queues, text or threads. One thread calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from uma_engine.config import EngineConfig, ModelConfig
from uma_engine.core import RequestKind, SamplingParams, ScheduledChunk, SchedulerOutput, StepResult
from uma_engine.errors import ModelOverflow, UmaError
from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
from uma_engine.layers.linear import Adapters, AdapterSites
from uma_engine.runner.prepare import prepare
from uma_kernels.sampling import SamplingBatch, sample

__all__ = [
    "Model",
    "ModelRunner",
    "accepted",
    "allowed_tokens",
    "draw_tokens",
    "not_finite",
    "sampling_columns",
    "sampling_of",
    "token_counts",
]


class Model(Protocol):
    """What the runner asks of a model; `models/` provides it."""

    config: ModelConfig

    def forward(self, batch: BatchInput, kv: KVCacheTensors, adapters: Adapters | None) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
    def label_logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor: ...


class ModelRunner:
    """Owns the KV tensors of one base and turns scheduled chunks into label logits and tokens."""

    def __init__(self, model: Model, config: EngineConfig, num_blocks: int, adapters: AdapterSites) -> None:
        self._model = model
        self._config = config
        self._adapters = adapters
        c = model.config
        shape = (num_blocks * config.block_size, c.num_kv_heads, c.head_dim)
        # Untouched pages of a fresh allocation cost no memory: the cache grows as it is used.
        self._kv = KVCacheTensors(
            k=[torch.empty(shape, dtype=torch.float32) for _ in range(c.num_layers)],
            v=[torch.empty(shape, dtype=torch.float32) for _ in range(c.num_layers)],
        )

    def wipe(self, block_ids: Sequence[int]) -> None:
        """Zeros over the keys and values of blocks that nobody uses. Between two steps."""
        self._kv.wipe(block_ids, self._config.block_size)

    def release(self) -> None:
        """Let go of the weights and the KV cache; nothing can run afterwards."""
        self._kv = KVCacheTensors([], [])
        self.__dict__.pop("_model", None)

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> StepResult:
        """Compute one step. A row whose logits are not finite gives an error in place of its result: its request alone
        ends, its neighbours never see the difference.
        """
        step = prepare(output, block_size=self._config.block_size, max_loras=self._config.max_loras)
        adapters = self._adapters if step.batch.lora_routing is not None else None
        hidden = self._model.forward(step.batch, self._kv, adapters)  # [R, hidden], rows of output_chunks
        results: list[list[float] | int | UmaError] = [0] * len(step.output_chunks)
        score_rows: dict[tuple[int, ...], list[int]] = {}
        generate_rows: list[int] = []
        for row, chunk in enumerate(step.output_chunks):
            if chunk.request.kind is RequestKind.SCORE:
                score_rows.setdefault(chunk.request.label_token_ids, []).append(row)
            else:
                generate_rows.append(row)
        for labels, rows in score_rows.items():
            wanted = hidden if len(rows) == len(hidden) else hidden[rows]
            logits = self._model.label_logits(wanted, torch.tensor(labels, dtype=torch.int64))
            for row, values, finite in zip(rows, logits.tolist(), _finite_rows(logits), strict=True):
                results[row] = values if finite else not_finite(step.output_chunks[row])
        if generate_rows:
            wanted = hidden if len(generate_rows) == len(hidden) else hidden[generate_rows]
            chunks = [step.output_chunks[row] for row in generate_rows]
            for row, drawn in zip(generate_rows, draw_tokens(self._model.logits(wanted), chunks), strict=True):
                results[row] = drawn
        return StepResult(results)


def draw_tokens(logits: torch.Tensor, chunks: Sequence[ScheduledChunk]) -> list[int | UmaError]:
    """The token of each row of logits [B, V] of the CPU, in place of it the error that ends its request: logits that are not finite, a
    grammar that failed. Rows without a grammar have the bits that they have without such neighbours.
    """
    failed: dict[int, UmaError] = {
        place: not_finite(chunks[place]) for place, finite in enumerate(_finite_rows(logits)) if not finite
    }
    masks, errors = allowed_tokens(chunks, logits.shape[1])
    failed = errors | failed
    mask: torch.Tensor | None = None
    if masks:
        mask = torch.ones(logits.shape, dtype=torch.bool)
        for place, bits in masks.items():
            allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[1]]
            mask[place] = torch.from_numpy(allowed.astype(np.bool_))
    for place in failed:
        logits[place] = 0  # sampled like the others, then thrown away
    batch = SamplingBatch(**{name: torch.from_numpy(column) for name, column in sampling_columns(chunks).items()})
    counts = [token_counts(chunk) if sampling_of(chunk).penalises else None for chunk in chunks]
    tokens = sample(logits, batch, counts, mask).tolist()
    return [
        failed[place] if place in failed else accepted(chunk, token)
        for place, (chunk, token) in enumerate(zip(chunks, tokens, strict=True))
    ]


def allowed_tokens(
    chunks: Sequence[ScheduledChunk], vocabulary: int
) -> tuple[dict[int, np.ndarray], dict[int, UmaError]]:
    """Which tokens may come next in each row that has a grammar: one bit a token, lowest first, [ceil(V / 8)] uint8; and the rows whose
    grammar failed. Ids beyond the end of what it knows are not allowed.
    """
    masks: dict[int, np.ndarray] = {}
    failed: dict[int, UmaError] = {}
    for place, chunk in enumerate(chunks):
        if (grammar := chunk.request.grammar) is None:
            continue
        try:
            known = np.frombuffer(grammar.mask(), np.uint8)
        except UmaError as error:
            failed[place] = error
            continue
        bits = masks[place] = np.zeros(-(-vocabulary // 8), np.uint8)
        bits[: len(known)] = known[: len(bits)]
    return masks, failed


def accepted(chunk: ScheduledChunk, token: int) -> int | UmaError:
    """The token that stands after the chunk's grammar, if any, has taken the one that was drawn."""
    grammar = chunk.request.grammar
    if grammar is None:
        return token
    try:
        return grammar.accept(token)
    except UmaError as error:
        return error


def sampling_columns(chunks: Sequence[ScheduledChunk]) -> dict[str, np.ndarray]:
    """The fields of a SamplingBatch for one row a chunk."""
    params: list[SamplingParams] = [sampling_of(chunk) for chunk in chunks]
    f32, i32, i64 = np.float32, np.int32, np.int64
    return {
        "temperature": np.array([p.temperature for p in params], f32),
        "top_k": np.array([p.top_k for p in params], i32),
        "top_p": np.array([p.top_p for p in params], f32),
        "min_p": np.array([p.min_p for p in params], f32),
        "repetition_penalty": np.array([p.repetition_penalty for p in params], f32),
        "presence_penalty": np.array([p.presence_penalty for p in params], f32),
        "frequency_penalty": np.array([p.frequency_penalty for p in params], f32),
        "seeds": np.array([p.seed or 0 for p in params], i64),
        "steps": np.array([len(chunk.request.output_token_ids) for chunk in chunks], i64),
    }


def _finite_rows(logits: torch.Tensor) -> list[bool]:
    finite = torch.isfinite(logits.sum(-1))  # one pass; a sum is finite unless a logit is not, or they are huge
    return torch.isfinite(logits).all(-1).tolist() if not finite.all() else [True] * len(logits)


def not_finite(chunk: ScheduledChunk) -> UmaError:
    """What ends a request whose logits overflowed."""
    return ModelOverflow(
        f"a logit of request `{chunk.request.request_id}` is not finite",
        hint="the adapter's weights overflow in fp32"
        if chunk.request.adapter
        else "the base's weights overflow in fp32",
    )


def sampling_of(chunk: ScheduledChunk) -> SamplingParams:
    """The parameters of a GENERATE chunk."""
    params = chunk.request.sampling
    assert params is not None  # a GENERATE request always has them: Request checks it
    return params


def token_counts(chunk: ScheduledChunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids seen so far with how often each was *generated*: a prompt's token counts 0, which only the repetition penalty minds."""
    counts = dict.fromkeys((token for segment in chunk.request.segments for token in segment.token_ids), 0)
    for token in chunk.request.output_token_ids:
        counts[token] += 1
    return torch.tensor(list(counts), dtype=torch.int64), torch.tensor(list(counts.values()), dtype=torch.int32)
