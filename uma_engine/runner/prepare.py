"""From a SchedulerOutput to the tensors of one step.

Knows segments, blocks and slots; does not know weights, schedulers' reasons or what the outputs are for.

A token's key lives at `block_id * block_size + offset` when its segment holds blocks, and is named by its row of this
step (-row - 1) while its segment is transient. Ancestors always hold blocks: their keys are in the cache before any
layer's attention runs, also when they are computed in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from uma_engine.core import NO_PARENT, Request, ScheduledChunk, SchedulerOutput
from uma_engine.layers.batch_input import BatchInput, DecodeBatch
from uma_kernels.attention import AttentionBatch
from uma_kernels.lora import LoraRouting

__all__ = ["PreparedStep", "StepArrays", "attention_batch", "block_tables", "is_decode", "lay_out", "prepare"]


@dataclass(slots=True)
class StepArrays:
    """One step as arrays of the host; the names are those of `BatchInput`.

    Shapes:  input_ids, positions [T] int64 . slot_mapping, lora_slots [T] int32 . output_rows [R] int64 . context_lens [B] int32
             of the first B rows, which are those of `decodes` and the first output rows . contexts: slots of each chunk
             after those, and last_contexts of each output row after those . output_chunks: the chunk of each output row, and
             output_places: its number among the outputs in the order of the step's chunks
    """

    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    lora_slots: np.ndarray
    output_rows: np.ndarray
    decodes: list[ScheduledChunk]
    context_lens: np.ndarray
    query_lens: list[int]
    contexts: list[np.ndarray]
    last_contexts: list[np.ndarray]
    output_chunks: list[ScheduledChunk]
    output_places: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_decodes(self) -> int:
        return len(self.context_lens)

    @property
    def has_adapters(self) -> bool:
        return bool((self.lora_slots >= 0).any())


@dataclass(slots=True)
class PreparedStep:
    """The model's input and the chunks whose output is wanted, in the order of `batch.output_rows`."""

    batch: BatchInput
    output_chunks: list[ScheduledChunk]


def prepare(output: SchedulerOutput, *, block_size: int, max_loras: int) -> PreparedStep:
    """Build the flat batch of one step on the CPU.

    Decode rows come first (the scheduler puts them there, so outputs are in the order of the chunks); every other chunk attends
    through its path of slots.
    """
    a = lay_out(output, block_size, decode_paths=True)
    lora_slots = torch.from_numpy(a.lora_slots)
    output_rows = torch.from_numpy(a.output_rows)
    decode, routing, output_routing = None, None, None
    if a.num_decodes:
        table, size = block_tables(a.decodes, block_size)
        decode = DecodeBatch(torch.from_numpy(table), torch.from_numpy(a.context_lens), size)
    if a.has_adapters:
        routing = LoraRouting.build(lora_slots, max_loras)
        output_routing = LoraRouting.build(lora_slots[output_rows], max_loras)
    batch = BatchInput(
        input_ids=torch.from_numpy(a.input_ids),
        positions=torch.from_numpy(a.positions),
        attention=attention_batch(a.query_lens, a.contexts),
        slot_mapping=torch.from_numpy(a.slot_mapping),
        decode=decode,
        lora_routing=routing,
        output_rows=output_rows,
        last_attention=attention_batch([1] * len(a.last_contexts), a.last_contexts),
        output_lora_routing=output_routing,
    )
    return PreparedStep(batch, a.output_chunks)


def lay_out(output: SchedulerOutput, block_size: int, *, decode_paths: bool = False) -> StepArrays:
    """The arrays of one step: the rows of its decodes, then those of its other chunks in their order.

    The tail block of a segment may be partly filled, so a sequence that grows at the end of a path does not lie in whole
    blocks. `decode_paths`: it is a decode all the same (see `block_tables`); else its tokens are chunks among the others.
    """
    decodes = [chunk for chunk in output.chunks if is_decode(chunk, decode_paths)]
    num_decodes = len(decodes)
    chunks = decodes + [chunk for chunk in output.chunks if not is_decode(chunk, decode_paths)]
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    input_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slot_mapping = np.empty(num_tokens, np.int32)
    lora_slots = np.full(num_tokens, -1, np.int32)
    paths = _Paths(block_size)
    contexts: list[np.ndarray] = []  # of the chunks that go through tree attention
    last_contexts: list[np.ndarray] = []  # of their output rows, for the last layer
    output_rows: list[int] = []
    output_chunks: list[ScheduledChunk] = []
    row = 0
    for index, chunk in enumerate(chunks):
        segment, n = chunk.segment, chunk.num_tokens
        end, rows = chunk.start + n, slice(row, row + n)
        input_ids[rows] = segment.token_ids[chunk.start : end]
        first_position = segment.path_offset + chunk.start
        positions[rows] = np.arange(first_position, first_position + n)
        if chunk.request.adapter is not None:
            lora_slots[rows] = chunk.request.adapter.slot
        if index < num_decodes:
            position = chunk.start
            slot_mapping[row] = segment.block_ids[position // block_size] * block_size + position % block_size
            output_rows.append(row)
            output_chunks.append(chunk)
            row += 1
            continue
        ancestors = paths.ancestors(chunk.request, chunk.segment_index)
        if segment.transient:
            own = -1 - np.arange(row, row + n, dtype=np.int32)
            slot_mapping[rows] = -1
        else:
            own = paths.slots_of(segment.block_ids, end)
            slot_mapping[rows] = own[chunk.start :]
        context = np.concatenate((ancestors, own)) if len(ancestors) else own
        contexts.append(context)
        if chunk.wants_output:
            output_rows.append(row + n - 1)
            output_chunks.append(chunk)
            last_contexts.append(context)
        row += n

    places = {id(chunk): place for place, chunk in enumerate(c for c in output.chunks if c.wants_output)}
    return StepArrays(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        lora_slots=lora_slots,
        output_rows=np.array(output_rows, np.int64),
        decodes=decodes,
        context_lens=np.array([c.segment.path_offset + c.start + 1 for c in decodes], np.int32),
        query_lens=[chunk.num_tokens for chunk in chunks[num_decodes:]],
        contexts=contexts,
        last_contexts=last_contexts,
        output_chunks=output_chunks,
        output_places=[places[id(chunk)] for chunk in output_chunks],
    )


def is_decode(chunk: ScheduledChunk, decode_paths: bool = False) -> bool:
    """Whether a chunk is a row of paged decoding: of a sequence without ancestors, unless `decode_paths`."""
    return chunk.decodes and (decode_paths or chunk.segment.parent == NO_PARENT)


def block_tables(decodes: Sequence[ScheduledChunk], block_size: int) -> tuple[np.ndarray, int]:
    """The block table of each decode [B, M] int32, and the size of its blocks: 1, so that the tables of all name single slots, where
    one of them ends a path.
    """
    paths = _Paths(block_size)
    by_slot = any(chunk.segment.parent != NO_PARENT for chunk in decodes)
    tables: list[np.ndarray] = [
        paths.whole(chunk) if by_slot else np.asarray(chunk.segment.block_ids, np.int32) for chunk in decodes
    ]
    block_table = np.zeros((len(decodes), max(map(len, tables), default=0)), np.int32)
    for row, table in zip(block_table, tables, strict=True):
        row[: len(table)] = table
    return block_table, 1 if by_slot else block_size


def attention_batch(query_lens: list[int], contexts: list[np.ndarray]) -> AttentionBatch:
    """Chunks of `query_lens` rows, each with its context's slots; on the host."""
    slots = np.concatenate(contexts) if contexts else np.empty(0, np.int32)
    return AttentionBatch(
        cu_seqlens_q=torch.from_numpy(_offsets(query_lens)),
        context_slots=torch.from_numpy(slots),
        cu_seqlens_k=torch.from_numpy(_offsets([len(c) for c in contexts])),
    )


def _offsets(lengths: list[int]) -> np.ndarray:
    """Where each part begins, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts


class _Paths:
    """Slots of whole paths, each path computed once a step however many leaves hang on it."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._offsets = np.arange(block_size, dtype=np.int32)
        self._known: dict[tuple[int, int], np.ndarray] = {}
        self._none = np.empty(0, np.int32)

    def slots_of(self, block_ids: list[int], num_tokens: int) -> np.ndarray:
        blocks = np.asarray(block_ids, np.int32)[: -(-num_tokens // self._block_size)]
        return (blocks[:, None] * self._block_size + self._offsets).reshape(-1)[:num_tokens]

    def whole(self, chunk: ScheduledChunk) -> np.ndarray:
        """Slots of every token down to the chunk's last one, in path order."""
        above = self.ancestors(chunk.request, chunk.segment_index)
        own = self.slots_of(chunk.segment.block_ids, chunk.start + chunk.num_tokens)
        return np.concatenate((above, own)) if len(above) else own

    def ancestors(self, request: Request, segment_index: int) -> np.ndarray:
        """Slots of every token above the segment, in path order."""
        parent = request.segments[segment_index].parent
        if parent == NO_PARENT:
            return self._none
        key = (id(request), parent)
        found = self._known.get(key)
        if found is None:
            segment = request.segments[parent]
            own = self.slots_of(segment.block_ids, len(segment.token_ids))
            above = self.ancestors(request, parent)
            found = self._known[key] = np.concatenate((above, own)) if len(above) else own
        return found
