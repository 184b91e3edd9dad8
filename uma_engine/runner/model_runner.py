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
from uma_kernels import dispatch
from uma_kernels.sampling import SamplingBatch, sample

__all__ = ["Model", "ModelRunner", "draw_tokens", "not_finite", "penalised", "sample_tokens", "sampling_of"]


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
    """The token of each row of logits [B, V], in place of it the error that ends its request: logits that are not finite, a
    grammar that failed. Rows without a grammar have the bits that they have without such neighbours.
    """
    failed: dict[int, UmaError] = {
        place: not_finite(chunks[place]) for place, finite in enumerate(_finite_rows(logits)) if not finite
    }
    mask: torch.Tensor | None = None
    for place, chunk in enumerate(chunks):
        grammar = chunk.request.grammar
        if grammar is None or place in failed:
            continue
        try:
            allowed = _unpacked(grammar.mask(), logits.shape[1])
        except UmaError as error:
            failed[place] = error
            continue
        if mask is None:
            mask = torch.ones(logits.shape, dtype=torch.bool)
        mask[place] = allowed
    for place in failed:
        logits[place] = 0  # sampled like the others, then thrown away
    tokens: list[int] = sample_tokens(logits, chunks, mask).tolist()
    found: list[int | UmaError] = list(tokens)
    for place, (chunk, token) in enumerate(zip(chunks, tokens, strict=True)):
        if place in failed:
            found[place] = failed[place]
        elif (grammar := chunk.request.grammar) is not None:
            try:
                found[place] = grammar.accept(token)
            except UmaError as error:
                found[place] = error
    return found


def _unpacked(bits: bytes, vocabulary: int) -> torch.Tensor:
    """A grammar's mask as [V] bool; ids beyond its end are not allowed."""
    allowed = np.zeros(vocabulary, np.bool_)
    known = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:vocabulary]
    allowed[: len(known)] = known
    return torch.from_numpy(allowed)


def sample_tokens(
    logits: torch.Tensor, chunks: Sequence[ScheduledChunk], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One token for each row of logits [B, V] fp32, by the chunks' sampling parameters, of those that `mask` [B, V] allows:
    [B] int64.

    Rows of a device are drawn on the host where the op has no kernel for the device.
    """
    backends = dispatch.OPS["sampling"]
    if "triton" not in backends:
        logits = logits.cpu()
    device = logits.device
    params: list[SamplingParams] = [sampling_of(chunk) for chunk in chunks]

    def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    batch = SamplingBatch(
        temperature=column([p.temperature for p in params], f32),
        top_k=column([p.top_k for p in params], i32),
        top_p=column([p.top_p for p in params], f32),
        min_p=column([p.min_p for p in params], f32),
        repetition_penalty=column([p.repetition_penalty for p in params], f32),
        presence_penalty=column([p.presence_penalty for p in params], f32),
        frequency_penalty=column([p.frequency_penalty for p in params], f32),
        seeds=column([p.seed or 0 for p in params], i64),
        steps=column([len(chunk.request.output_token_ids) for chunk in chunks], i64),
    )
    counts = [_token_counts(chunk) if penalised(p) else None for p, chunk in zip(params, chunks, strict=True)]
    on_device = [None if c is None else (c[0].to(device), c[1].to(device)) for c in counts]
    forced = dispatch.forced_backend()
    with dispatch.use_backend(forced if forced in backends else None):
        return sample(logits, batch, on_device, None if mask is None else mask.to(device))


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


def penalised(p: SamplingParams) -> bool:
    """Whether tokens seen before count."""
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _token_counts(chunk: ScheduledChunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids seen so far with how often each was *generated*: a prompt's token counts 0, which only the repetition penalty minds."""
    counts = dict.fromkeys((token for segment in chunk.request.segments for token in segment.token_ids), 0)
    for token in chunk.request.output_token_ids:
        counts[token] += 1
    return torch.tensor(list(counts), dtype=torch.int64), torch.tensor(list(counts.values()), dtype=torch.int32)
