"""Runs the model on a device: launches a step without waiting for it, and hands its results over when they are wanted.

Knows tensors of one step and the device's memory; does not know queues, text or threads. One thread calls it.

The residual stream and all activations are of the weights' dtype; sums inside ops, rotary tables and label logits are fp32.
A step is laid out on the host, copied in one piece, and launched; the host is then free until `Launched.result`. It may begin with
tokens that the step before has yet to draw: they stay on the device. Steps replay CUDA graphs where one has room for them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from uma_engine.config import EngineConfig
from uma_engine.core import RequestKind, ScheduledChunk, SchedulerOutput, StepResult
from uma_engine.errors import DeviceOutOfMemory, TooLarge, UmaError
from uma_engine.layers.batch_input import BatchInput, DecodeBatch, KVCacheTensors
from uma_engine.layers.linear import SiteGroup
from uma_engine.models.weights import Placement
from uma_engine.runner.decode_tables import DecodeTables
from uma_engine.runner.device_adapters import DeviceAdapters
from uma_engine.runner.graphs import NOT_FINITE, DecodeGraphs, likeliest
from uma_engine.runner.memory import DeviceMemory, num_kv_blocks
from uma_engine.runner.model_runner import (
    Model,
    accepted,
    allowed_tokens,
    not_finite,
    sampling_columns,
    sampling_of,
    token_counts,
)
from uma_engine.runner.prepare import StepArrays, attention_batch, block_tables, is_decode, lay_out
from uma_engine.runner.staging import Staging
from uma_engine.runner.step_graphs import StepGraphs, on_host, step_buckets
from uma_engine.runner.token_feed import TokenFeed, in_order
from uma_kernels.attention.plan import TreePlan, schedule
from uma_kernels.sampling import SamplingBatch, sample

__all__ = ["DeviceRunner", "Launched"]

MAX_GRAPH_ROWS = 256
MAX_GRAPH_TOKENS = 16384  # beyond this the device has more to do in a step than the host


class DeviceModel(Model, Protocol):
    placement: Placement
    max_positions: int

    def site_groups(self) -> list[SiteGroup]: ...


class Launched:
    """A step under way. `result` waits for it."""

    def __init__(self, chunks: list[ScheduledChunk], parts: list[_Part], done: torch.cuda.Event | None) -> None:
        self._chunks = chunks
        self._parts = parts
        self._done = done

    def result(self) -> StepResult:
        """A row whose logits are not finite gives an error in place of its result."""
        if self._done is not None:
            self._done.synchronize()
        results: list[list[float] | int | UmaError] = [0] * len(self._chunks)
        for part in self._parts:
            values = part.values.numpy()
            if part.failed is not None:
                for place, token in zip(part.places, values.tolist(), strict=True):
                    chunk = self._chunks[place]
                    if token == NOT_FINITE:
                        results[place] = not_finite(chunk)
                    else:
                        results[place] = part.failed[place] if place in part.failed else accepted(chunk, token)
            else:
                finite = np.isfinite(values).all(-1).tolist()
                for place, logits, good in zip(part.places, values.tolist(), finite, strict=True):
                    results[place] = logits if good else not_finite(self._chunks[place])
        return StepResult(results)


class _Part:
    """Some outputs on the host, once the step is done: label logits [n, L] fp32, or tokens [n] int64, then with the outputs that
    `failed` before anything was drawn.
    """

    __slots__ = ("failed", "places", "values")

    def __init__(self, places: Sequence[int], values: torch.Tensor, failed: dict[int, UmaError] | None = None) -> None:
        self.places = places
        self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self.values.copy_(values, non_blocking=True)
        self.failed = failed


class DeviceRunner:
    """Owns the KV cache and the adapters' pools of one model on one device.

    Made in two steps, because the size of the KV cache follows from what the rest takes: `DeviceRunner(...)` measures,
    then `allocate(num_blocks)`. With adapters (`max_loras` above 0) their pools are made first.
    """

    def __init__(self, model: DeviceModel, config: EngineConfig, max_model_len: int) -> None:
        self._model = model
        self._config = config
        self._max_len = max_model_len
        self.device = model.placement.device
        self._dtype = model.placement.dtype
        # Decode tokens may come on top of the budget: see SchedulerOutput.
        self._max_tokens = config.max_num_batched_tokens + config.max_num_seqs
        self._max_tokens = max(self._max_tokens, max_model_len + config.max_num_seqs)
        self._max_graph_tokens = min(MAX_GRAPH_TOKENS, config.max_num_batched_tokens)
        self._staging = Staging(self.device)
        self._feed = TokenFeed(self._max_tokens, self.device)
        self._kv = KVCacheTensors([], [])
        self._graphs: DecodeGraphs | None = None
        self._step_graphs: StepGraphs | None = None
        self._labels: dict[tuple[int, ...], torch.Tensor] = {}
        self._batches = (
            attention_batch([], []),
            attention_batch([], []),
        )  # of the last step: of all layers, of the last one
        self.adapters: DeviceAdapters | None = None
        if config.max_loras:
            self.adapters = DeviceAdapters(
                model.site_groups(),
                max_loras=config.max_loras,
                max_rank=config.max_lora_rank,
                max_tokens=max(self._max_tokens, step_buckets(self._max_graph_tokens)[-1]),
                dtype=self._dtype,
                device=self.device,
                storage=config.lora_storage,
            )

    # ---- memory ----

    def block_bytes(self) -> int:
        """Bytes of one block, keys and values of all layers."""
        c = self._model.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self._dtype.itemsize * self._config.block_size

    def measure(self) -> DeviceMemory:
        """Run the largest step and the largest decode over nothing, and see what they take. Only on CUDA."""
        self._new_kv(1)
        torch.cuda.synchronize()
        self._profile_prefill()  # compiles, which takes memory of its own
        step = _peak_of(self._profile_prefill)
        graphs = 0
        if not self._config.enforce_eager:
            graphs = _peak_of(lambda: self._profile_decode(min(MAX_GRAPH_ROWS, self._config.max_num_seqs)))
            # Graphs of scoring steps keep what such a step takes beside what one takes that has no graph.
            graphs = max(graphs, step * min(MAX_GRAPH_TOKENS, self._max_tokens) // self._max_tokens)
        self._new_kv(0)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(total, free, step, graphs)

    def fit(self) -> int:
        """The number of KV blocks that fit. Errors: TooLarge"""
        try:
            memory = self.measure()
        except torch.OutOfMemoryError as error:
            raise TooLarge(
                f"a step of `max_num_batched_tokens` {self._config.max_num_batched_tokens} tokens does not fit beside the weights",
                hint="lower `max_num_batched_tokens` or `max_loras`, or take a smaller model",
                param="max_num_batched_tokens",
            ) from error
        config = self._config
        return num_kv_blocks(memory, self.block_bytes(), config.gpu_memory_utilization, config.kv_cache_bytes)

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache and, unless `enforce_eager`, the graphs; from here on steps can run."""
        self._new_kv(num_blocks)
        rows = min(MAX_GRAPH_ROWS, self._config.max_num_seqs, self._config.max_num_batched_tokens)
        if not self._config.enforce_eager:
            tables = DecodeTables(rows, self._max_len, self._config.block_size, self.device, self._staging)
            self._graphs = DecodeGraphs(
                self._model,
                self._kv,
                self.device,
                tables=tables,
                feed=self._feed,
                adapters=self.adapters,
                staging=self._staging,
            )
            self._max_graph_rows = rows
            if self.device.type == "cuda":
                with torch.inference_mode():
                    self._graphs.capture()
            self._step_graphs = StepGraphs(
                self._model,
                self._kv,
                self.device,
                max_tokens=self._max_graph_tokens,
                tables=tables,
                feed=self._feed,
                adapters=self.adapters,
                staging=self._staging,
                memory=self._graphs.memory,
            )
            if self.device.type == "cuda":
                with torch.inference_mode():
                    self._step_graphs.capture()
        # What lives as long as the engine is not walked by every full collection from now on.
        gc.collect()
        gc.freeze()

    def wipe(self, block_ids: Sequence[int]) -> None:
        """Zeros over the keys and values of blocks that nobody uses. Between two steps."""
        self._kv.wipe(block_ids, self._config.block_size)

    def release(self) -> None:
        """Let go of weights, KV cache, graphs and adapters; nothing can run afterwards."""
        self._kv = KVCacheTensors([], [])
        self._graphs = self._step_graphs = None
        if self.adapters is not None:
            self.adapters.release()
        self.adapters = None
        self.__dict__.pop("_model", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _new_kv(self, num_blocks: int) -> None:
        c = self._model.config
        self._kv.k.clear()
        self._kv.v.clear()
        shape = (num_blocks * self._config.block_size, c.num_kv_heads, c.head_dim)
        for tensors in (self._kv.k, self._kv.v):
            tensors += [torch.empty(shape, dtype=self._dtype, device=self.device) for _ in range(c.num_layers)]

    @torch.inference_mode()
    def _profile_prefill(self) -> None:
        """A step as large as one can be, in segments as long as they may be, none of which touches the cache."""
        tokens = self._max_tokens
        lengths = [min(self._max_len, tokens - first) for first in range(0, tokens, self._max_len)]
        contexts, first = [], 0
        for n in lengths:
            contexts.append(-1 - np.arange(first, first + n, dtype=np.int32))
            first += n
        wanted = np.arange(min(len(lengths), self._config.max_num_seqs), dtype=np.int64)
        arrays = StepArrays(
            input_ids=np.zeros(tokens, np.int64),
            positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            slot_mapping=np.full(tokens, -1, np.int32),
            lora_slots=np.full(tokens, -1, np.int32),
            output_rows=np.cumsum(lengths)[: len(wanted)] - 1,
            decodes=[],
            context_lens=np.zeros(0, np.int32),
            query_lens=lengths,
            contexts=contexts,
            last_contexts=contexts[: len(wanted)],
            output_chunks=[],
            output_places=[],
        )
        batch, _ = self._upload(arrays, [])
        hidden = self._model.forward(batch, self._kv, None)
        rows = min(self._config.max_num_seqs, tokens)
        likeliest(self._model.logits(hidden[:1].expand(rows, -1).contiguous()))

    @torch.inference_mode()
    def _profile_decode(self, rows: int) -> None:
        width = -(-self._max_len // self._config.block_size)
        zeros = np.zeros(rows, np.int64)
        arrays = StepArrays(
            input_ids=zeros,
            positions=zeros,
            slot_mapping=np.full(rows, -1, np.int32),
            lora_slots=np.full(rows, -1, np.int32),
            output_rows=np.arange(rows),
            decodes=[],
            context_lens=np.ones(rows, np.int32),
            query_lens=[],
            contexts=[],
            last_contexts=[],
            output_chunks=[],
            output_places=[],
        )
        batch, _ = self._upload(arrays, [], np.zeros((rows, width), np.int32))
        likeliest(self._model.logits(self._model.forward(batch, self._kv, None)))

    # ---- steps ----

    def run(self, output: SchedulerOutput) -> StepResult:
        """`launch` and wait."""
        return self.launch(output).result()

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> Launched:
        """Begin a step. One may be under way: the new one follows it on the device, and may begin with its tokens (`unknown_token`).

        Errors:  DeviceOutOfMemory: nothing of the step is kept, and the next one can run
        """
        try:
            return self._launch(output)
        except torch.OutOfMemoryError as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise DeviceOutOfMemory(
                f"a step of {output.num_tokens} tokens needed more memory than the device has left",
                hint="lower `max_num_batched_tokens` or `gpu_memory_utilization`: another program may use the device too",
            ) from error

    def _launch(self, output: SchedulerOutput) -> Launched:
        if self.adapters is not None:
            self.adapters.publish()
        chunks = output.chunks
        if self._graphs is not None and len(chunks) <= self._max_graph_rows and all(map(is_decode, chunks)):
            tokens, logits = self._graphs.run(chunks)
            return Launched(chunks, [self._drawn(tokens, logits, chunks, range(len(chunks)))], self._event())
        arrays = lay_out(output, self._config.block_size)
        groups = _group_outputs(arrays.output_chunks)
        hidden = self._step_graphs.run(arrays) if self._step_graphs is not None else None
        if hidden is None:
            batch, rows_of = self._upload(arrays, list(groups.values()))
            adapters = self.adapters if batch.lora_routing is not None else None
            hidden = self._model.forward(batch, self._kv, adapters)
        else:
            rows_of = [hidden] * len(groups)  # of one group: all of them
            if len(groups) > 1:
                rows_of = self._staging.upload([np.array(rows, np.int64) for rows in groups.values()])
        # Before tokens are drawn: that uploads things of its own, over these rows' numbers.
        wanted = [hidden if len(groups) == 1 else hidden.index_select(0, index) for index in rows_of]
        parts = []
        for (labels, rows), states in zip(groups.items(), wanted, strict=True):
            places = [arrays.output_places[row] for row in rows]
            if labels is None:
                logits = self._model.logits(states)
                own = [arrays.output_chunks[row] for row in rows]
                parts.append(self._drawn(likeliest(logits), logits, own, places))
            else:
                parts.append(_Part(places, self._model.label_logits(states, self._label_ids(labels))))
        return Launched([chunk for chunk in chunks if chunk.wants_output], parts, self._event())

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _drawn(
        self, tokens: torch.Tensor, logits: torch.Tensor, chunks: Sequence[ScheduledChunk], places: Sequence[int]
    ) -> _Part:
        """`tokens`, the likeliest, where a row takes that; other rows are sampled. The next step finds all of them in the feed."""
        failed: dict[int, UmaError] = {}
        rows = [row for row, chunk in enumerate(chunks) if not _takes_likeliest(chunk)]
        if rows:
            own = [chunks[row] for row in rows]
            masks, errors = allowed_tokens(own, logits.shape[1])
            failed = {places[rows[i]]: error for i, error in errors.items()}
            columns = sampling_columns(own)
            arrays = [np.array(rows, np.int64), np.array(list(masks), np.int64), *columns.values(), *masks.values()]
            index, masked, *parts = self._staging.upload(arrays)
            batch = SamplingBatch(**dict(zip(columns, parts, strict=False)))
            mask = None
            if masks:
                mask = torch.ones(len(rows), logits.shape[1], dtype=torch.bool, device=self.device)
                mask.index_copy_(0, masked, _unpacked(torch.stack(parts[len(columns) :]), logits.shape[1]))
            counts = [token_counts(chunk) if sampling_of(chunk).penalises else None for chunk in own]
            on_device = [None if c is None else (c[0].to(self.device), c[1].to(self.device)) for c in counts]
            finite = tokens.index_select(0, index) != NOT_FINITE
            scores = torch.where(finite[:, None], logits.index_select(0, index).float(), 0.0)
            sampled = sample(scores, batch, on_device, mask)
            tokens = tokens.index_copy(0, index, torch.where(finite, sampled, NOT_FINITE))
        if in_order(places):
            self._feed.keep(tokens)
        else:
            self._feed.keep(tokens, *self._staging.upload([np.array(places, np.int64)]))
        return _Part(places, tokens, failed)

    def _label_ids(self, labels: tuple[int, ...]) -> torch.Tensor:
        found = self._labels.get(labels)
        if found is None:
            if len(self._labels) > 256:
                self._labels.clear()
            found = self._labels[labels] = torch.tensor(labels, dtype=torch.int64, device=self.device)
        return found

    def _upload(
        self, a: StepArrays, groups: list[list[int]], table: np.ndarray | None = None
    ) -> tuple[BatchInput, list[torch.Tensor]]:
        """The step on the device: its batch, and the row numbers of each group of outputs. One copy. `table`: in place of its
        decodes' own."""
        batches = (
            attention_batch(a.query_lens, a.contexts),
            attention_batch([1] * len(a.last_contexts), a.last_contexts),
        )
        # Layers ask for plans by tile size and window: those of the steps before are made here, and travel with the rest.
        plans = [
            (batch, key, (*schedule(*on_host(batch), *key[1:]), on_host(batch)[2]))
            for batch, before in zip(batches, self._batches, strict=True)
            for key in before.plans
        ]
        self._batches = batches
        if table is None:
            table, _ = block_tables(a.decodes, self._config.block_size)
        arrays = [a.input_ids, a.positions, a.slot_mapping, a.lora_slots, a.output_rows, table, a.context_lens]
        arrays += [a.lora_slots[a.output_rows], *(np.array(rows, np.int64) for rows in groups)]
        for _, _, parts in plans:
            arrays += parts
        tensors = iter(self._staging.upload(arrays))
        ids, positions, slots, lora_slots, rows, on_device, lens, output_slots = (next(tensors) for _ in range(8))
        indices = [next(tensors) for _ in groups]
        for batch, key, _ in plans:
            batch.plans[key] = TreePlan(*(next(tensors) for _ in range(4)))
        routing, output_routing = None, None
        if self.adapters is not None and a.has_adapters:
            routing, output_routing = self.adapters.routing, self.adapters.output_routing
            routing.build(lora_slots)
            output_routing.build(output_slots)
        return BatchInput(
            input_ids=self._feed.resolve(ids),
            positions=positions,
            attention=batches[0],
            slot_mapping=slots,
            output_rows=rows,
            last_attention=batches[1],
            decode=DecodeBatch(on_device, lens, self._config.block_size) if a.num_decodes else None,
            lora_routing=routing,
            output_lora_routing=output_routing,
        ), indices


def _group_outputs(chunks: Sequence[ScheduledChunk]) -> dict[tuple[int, ...] | None, list[int]]:
    """Output rows by the labels that are wanted of them; None: a token."""
    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for row, chunk in enumerate(chunks):
        request = chunk.request
        labels = request.label_token_ids if request.kind is RequestKind.SCORE else None
        groups.setdefault(labels, []).append(row)
    return groups


def _takes_likeliest(chunk: ScheduledChunk) -> bool:
    return sampling_of(chunk).temperature == 0 and not chunk.request.reads_tokens


def _unpacked(bits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Rows of bits [n, ceil(V / 8)] uint8, lowest first, as [n, V] bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocabulary]


def _peak_of(call: Callable[[], None]) -> int:
    """Bytes that the allocator took for a call, beyond what was taken before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before
