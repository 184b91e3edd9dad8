"""Decode steps as CUDA graphs: one for each size of batch, replayed with what changes copied in first.

Knows rows and buffers with fixed addresses; does not know queues, text or why a row is there.

A step of B sequences replays the graph of the next larger bucket; rows beyond B look at one cached token, write nowhere and
are not read. Without CUDA the same code runs eagerly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from uma_engine.core import Request, ScheduledChunk
from uma_engine.layers.batch_input import BatchInput, DecodeBatch, KVCacheTensors
from uma_engine.runner.decode_tables import DecodeTables
from uma_engine.runner.prepare import attention_batch
from uma_engine.runner.staging import Layout, Staging
from uma_engine.runner.token_feed import TokenFeed
from uma_kernels.lora import DeviceRouting

if TYPE_CHECKING:
    from uma_engine.runner.device_adapters import DeviceAdapters
    from uma_engine.runner.model_runner import Model

__all__ = ["NOT_FINITE", "DecodeGraphs", "buckets_up_to", "likeliest", "recorded"]

Outputs = TypeVar("Outputs")

NOT_FINITE = -1  # in place of a token


def buckets_up_to(most: int) -> list[int]:
    """1, 2, 4, 8, then 1.5 and 2 times a power of two, ascending; the last holds `most`."""
    found = [1, 2, 4, 8]
    while found[-1] < most:
        found += [found[-1] * 3 // 2, found[-1] * 2]
    return [size for i, size in enumerate(found) if i == 0 or found[i - 1] < most]


class DecodeGraphs:
    """The decode steps of one model over one KV cache, as many sequences as `tables` holds."""

    def __init__(
        self,
        model: Model,
        kv: KVCacheTensors,
        device: torch.device,
        *,
        tables: DecodeTables,
        feed: TokenFeed,
        adapters: DeviceAdapters | None,
        staging: Staging,
    ) -> None:
        self._model = model
        self._kv = kv
        self._tables = tables
        self._feed = feed
        self._adapters = adapters
        self._staging = staging
        self._buckets = [min(size, tables.max_rows) for size in buckets_up_to(tables.max_rows)]
        most = self._buckets[-1]
        self._rows = torch.arange(most, device=device)
        self._layouts = {size: _layout(size) for size in self._buckets}
        self._inputs = torch.zeros(self._layouts[most].num_bytes, dtype=torch.uint8, device=device)
        self._no_attention = attention_batch([], [])
        self._graphs: dict[tuple[int, bool], tuple[Callable[[], None], torch.Tensor, torch.Tensor]] = {}
        self._captured = device.type == "cuda"
        self.memory: Any = None  # of all graphs

    def capture(self) -> None:
        """Capture every bucket, largest first so that the smaller ones fit into its memory."""
        for size in reversed(self._buckets):
            for with_adapters in (False, True) if self._adapters is not None else (False,):
                self._graph(size, with_adapters)

    def run(self, chunks: Sequence[ScheduledChunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute one decode step: the most likely token of each row [B] int64, `NOT_FINITE` where the logits are not,
        and the logits [B, V]. Both are overwritten by the next step.
        """
        rows = len(chunks)
        size = next(size for size in self._buckets if size >= rows)
        layout = self._layouts[size]
        entries = np.empty(size, np.int64), np.empty(size, np.int32)
        requests = [chunk.request for chunk in chunks]
        starts = np.fromiter([chunk.start for chunk in chunks], np.int64, rows)
        slots = self._tables.advance(requests, starts, *entries)
        host = self._staging.fill(layout.num_bytes)
        with_adapters = self._fill(layout.arrays(host), requests, starts, slots, entries)
        self._staging.upload_into(self._inputs[: layout.num_bytes], host[: layout.num_bytes])
        replay, tokens, logits = self._graph(size, with_adapters)
        replay()
        return tokens[:rows], logits[:rows]

    def _fill(
        self,
        arrays: Sequence[np.ndarray],
        requests: Sequence[Request],
        starts: np.ndarray,
        slots: np.ndarray,
        entries: tuple[np.ndarray, np.ndarray],
    ) -> bool:
        """Write the step's inputs into the host's arrays; whether any row has an adapter. Rows without a sequence do nothing."""
        input_ids, positions, places, all_slots, lora_slots, lens, blocks = arrays
        rows = len(requests)
        places[:], blocks[:] = entries
        input_ids[:rows] = [request.segments[0].token_ids[-1] for request in requests]
        positions[:rows], lens[:rows], all_slots[:rows] = starts, starts + 1, slots
        lora_slots[:rows] = -1
        if self._adapters is not None:
            lora_slots[:rows] = [-1 if r.adapter is None else r.adapter.slot for r in requests]
        for array, unused in ((input_ids, 0), (positions, 0), (lens, 1), (all_slots, -1), (lora_slots, -1)):
            array[rows:] = unused
        return bool((lora_slots[:rows] >= 0).any())

    def _graph(self, size: int, with_adapters: bool) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
        found = self._graphs.get((size, with_adapters))
        if found is None:
            found = self._graphs[size, with_adapters] = self._make(size, with_adapters)
        return found

    def _make(self, size: int, with_adapters: bool) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
        if not self._captured:
            vocab = self._model.config.vocab_size
            tokens = torch.zeros(size, dtype=torch.int64, device=self._inputs.device)
            logits = torch.zeros(size, vocab, dtype=self._kv.k[0].dtype, device=self._inputs.device)

            def step() -> None:
                for kept, new in zip((tokens, logits), self._step(size, with_adapters), strict=True):
                    kept.copy_(new)

            return step, tokens, logits
        inputs = self._inputs.clone()
        layout = self._layouts[size]
        # What a stale step left must not be written anywhere while kernels are compiled and the graph is made.
        _, _, places, slots, lora_slots, lens, _ = layout.tensors(self._inputs)
        places.fill_(self._tables.nowhere)
        slots.fill_(-1)
        lora_slots.fill_(-1)
        lens.fill_(1)
        replay, (tokens, logits), self.memory = recorded(lambda: self._step(size, with_adapters), self.memory)
        self._inputs.copy_(inputs)
        return replay, tokens, logits

    def _step(self, size: int, with_adapters: bool) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, positions, places, slots, lora_slots, lens, blocks = self._layouts[size].tensors(self._inputs)
        self._tables.write(places, blocks)
        routing: DeviceRouting | None = None
        if with_adapters:
            assert self._adapters is not None
            routing = self._adapters.routing
            routing.build(lora_slots)
        batch = BatchInput(
            input_ids=self._feed.resolve(input_ids),
            positions=positions,
            attention=self._no_attention,
            slot_mapping=slots,
            output_rows=self._rows[:size],
            decode=DecodeBatch(self._tables.tensor[:size], lens, self._tables.block_size),
            lora_routing=routing,
        )
        hidden = self._model.forward(batch, self._kv, self._adapters if with_adapters else None)
        logits = self._model.logits(hidden)
        return likeliest(logits), logits


def recorded(step: Callable[[], Outputs], memory: Any) -> tuple[Callable[[], None], Outputs, Any]:
    """Capture `step`: what replays it, what it returns, overwritten at each replay, and the memory (`memory`, unless None)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        outputs = step()
    return graph.replay, outputs, memory or graph.pool()


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit's token of each row (of equals the first), `NOT_FINITE` where a logit is not finite."""
    return torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), NOT_FINITE)


def _layout(size: int) -> Layout:
    i32, i64 = np.dtype(np.int32), np.dtype(np.int64)
    # input_ids, positions, places, slots, lora_slots, lens, blocks
    return Layout([(dtype, (size,)) for dtype in (i64, i64, i64, i32, i32, i32, i32)])
