"""Steps with prefill as CUDA graphs: the model's forward pass, one graph for each size, and fewer for steps that decode besides.

Knows a step's arrays, attention schedules and buffers with fixed addresses; does not know labels, text or why a row is there.

A step of T tokens replays the graph of the next larger bucket. Rows beyond T look up token 0, write nowhere, take no adapter and
are attended by nobody: what is computed of them is not read. A graph for decodes besides computes paged attention of its first
rows, as many as there may be decodes, and then that of the others over whatever it made of theirs. A step's attention schedule is
copied over the one that the graph was captured with; where it has more programs, pieces or slots than the bucket has room for,
`run` says so and the step runs eagerly. Without CUDA the same code runs eagerly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uma_engine.layers.batch_input import BatchInput, DecodeBatch, KVCacheTensors
from uma_engine.runner.decode_tables import DecodeTables
from uma_engine.runner.graphs import recorded
from uma_engine.runner.prepare import StepArrays, attention_batch
from uma_engine.runner.staging import Layout, Staging
from uma_engine.runner.token_feed import TokenFeed
from uma_kernels.attention import AttentionBatch
from uma_kernels.attention.plan import PIECE_FIELDS, PROGRAM_FIELDS, Ints, TreePlan, schedule

if TYPE_CHECKING:
    from uma_engine.runner.device_adapters import DeviceAdapters
    from uma_engine.runner.model_runner import Model

__all__ = ["StepGraphs", "step_buckets"]

PlanKey = tuple[torch.device, int, int, int | None]
LEAST = 16  # tokens of the smallest bucket
MIXED_PARTS = 2  # buckets to an octave of steps with decodes: each costs memory and a moment at the start


def step_buckets(most: int, finest: int = 8) -> list[int]:
    """Numbers of tokens, ascending, `finest` to an octave from 512 on and fewer below: few rows are computed for nothing."""
    found: list[int] = []
    power = LEAST
    while not found or found[-1] < most:
        parts = min(finest, 8 if power >= 512 else 4 if power >= 64 else 1)
        found += [power + power * i // parts for i in range(parts)]
        power *= 2
    return [size for i, size in enumerate(found) if i == 0 or found[i - 1] < most]


@dataclass(frozen=True, slots=True)
class Kind:
    """Which graph: up to `tokens` rows, `decodes` of which may decode (0: none does)."""

    tokens: int
    decodes: int
    with_adapters: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What the graph of a bucket holds: output rows, programs and pieces of a schedule, slots of all contexts."""

    tokens: int
    outputs: int
    programs: int
    pieces: int
    slots: int

    @classmethod
    def of(cls, tokens: int, decodes: int) -> Room:
        """Programs that do nothing cost time, so there is room for few: whose leaves are tiny runs eagerly."""
        return cls(tokens, tokens // 8 + 8 + decodes, tokens // 32 + 16, tokens // 4 + 64, 16 * tokens + 4096)

    def of_outputs(self) -> Room:
        """The same for the last layer's attention, whose chunks are the output rows."""
        return Room(self.outputs, self.outputs, self.outputs, 2 * self.outputs, self.slots)


class StepGraphs:
    """The forward passes of one model over one KV cache, up to `max_tokens` tokens a step."""

    def __init__(
        self,
        model: Model,
        kv: KVCacheTensors,
        device: torch.device,
        *,
        max_tokens: int,
        tables: DecodeTables,
        feed: TokenFeed,
        adapters: DeviceAdapters | None,
        staging: Staging,
        memory: Any = None,
    ) -> None:
        """`memory`: the pool of other graphs, which never run at the same time."""
        self._model = model
        self._kv = kv
        self._device = device
        self._tables = tables
        self._feed = feed
        self._adapters = adapters
        self._staging = staging
        self._memory = memory
        self._buckets = step_buckets(max_tokens)
        most = self._buckets[-1]  # what the adapters' routing has room for
        self._mixed_buckets = [min(size, most) for size in step_buckets(max_tokens, MIXED_PARTS)]
        self._keys: tuple[list[PlanKey], list[PlanKey]] = ([], [])  # of all layers' attention, of the last one's
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._inputs = torch.empty(0, dtype=torch.uint8, device=device)
        # Of all graphs: each copies its result here, so that none keeps memory of its own.
        outputs = Room.of(most, self._most_decodes(most)).outputs
        self._hidden = torch.zeros(outputs, model.config.hidden_size, dtype=kv.k[0].dtype, device=device)
        self._graphs: dict[Kind, Callable[[], None]] = {}

    def capture(self) -> None:
        """Capture every bucket, largest first so that the smaller ones fit into its memory."""
        self._prepare()
        for size, decodes in sorted(self._layouts, reverse=True):
            for with_adapters in (False, True) if self._adapters is not None else (False,):
                self._graph(Kind(size, decodes, with_adapters))

    def run(self, a: StepArrays) -> torch.Tensor | None:
        """The hidden states of the output rows, overwritten by the next step; None where no graph has room for the step."""
        buckets = self._mixed_buckets if a.num_decodes else self._buckets
        if not a.query_lens or a.num_tokens > buckets[-1]:
            return None
        self._prepare()
        size = next(size for size in buckets if size >= a.num_tokens)
        decodes = self._most_decodes(size) if a.num_decodes else 0
        if a.num_decodes > decodes:
            return None
        batches = (
            attention_batch(a.query_lens, a.contexts),
            attention_batch([1] * len(a.last_contexts), a.last_contexts),
        )
        room, outputs = Room.of(size, decodes), len(a.output_rows)
        schedules = self._schedules(room, batches)
        if schedules is None or outputs > room.outputs:
            return None
        slots = self._kv.k[0].shape[0]
        for batch in batches:
            batch.check_slots(a.num_tokens, slots)
        replay = self._graph(Kind(size, decodes, a.has_adapters))  # making one clears the inputs
        layout = self._layouts[size, decodes]
        entries = np.empty(decodes, np.int64), np.empty(decodes, np.int32)
        if decodes:
            starts = a.positions[: a.num_decodes].copy()
            self._tables.advance([chunk.request for chunk in a.decodes], starts, *entries)
        host = self._staging.fill(layout.num_bytes)
        self._fill(layout.arrays(host), a, batches, schedules, entries)
        self._staging.upload_into(self._inputs[: layout.num_bytes], host[: layout.num_bytes])
        replay()
        return self._hidden[:outputs]

    # ---- layouts ----

    def _prepare(self) -> None:
        """Ask the layers which schedules they want, then lay out every bucket."""
        if self._layouts:
            return
        batch = self._batch_of_nothing(LEAST, Room.of(LEAST, 0).outputs)
        self._model.forward(batch, self._kv, None)
        assert batch.last_attention is not None
        self._keys = (list(batch.attention.plans), list(batch.last_attention.plans))
        kinds = [(size, 0) for size in self._buckets]
        if self._tables.max_rows > 1:  # who decodes alone has nobody beside it
            kinds += [(size, self._most_decodes(size)) for size in self._mixed_buckets]
        self._layouts = {kind: self._layout(*kind) for kind in kinds}
        most = max(layout.num_bytes for layout in self._layouts.values())
        self._inputs = torch.zeros(most, dtype=torch.uint8, device=self._device)

    def _most_decodes(self, size: int) -> int:
        """Of a mixed step of `size` tokens, one of which at least is prefill."""
        return min(self._tables.max_rows, size - 1)

    def _layout(self, size: int, decodes: int) -> Layout:
        i32, i64, room = np.dtype(np.int32), np.dtype(np.int64), Room.of(size, decodes)
        specs: list[tuple[np.dtype, tuple[int, ...]]] = [(i64, (size,)), (i64, (size,)), (i32, (size,)), (i32, (size,))]
        specs += [(i64, (room.outputs,)), (i32, (room.outputs,))]
        specs += [(i64, (decodes,)), (i32, (decodes,)), (i32, (decodes,))]  # places and blocks of the tables, lens
        for part, keys in zip((room, room.of_outputs()), self._keys, strict=True):
            specs.append((i32, (part.slots,)))
            for _ in keys:
                specs += [
                    (i32, (part.programs, len(PROGRAM_FIELDS))),
                    (i32, (part.pieces, len(PIECE_FIELDS))),
                    (i32, (part.tokens,)),
                ]
        return Layout(specs)

    def _schedules(
        self, room: Room, batches: tuple[AttentionBatch, AttentionBatch]
    ) -> list[list[tuple[Ints, Ints, Ints]]] | None:
        """The programs, pieces and positions of each kind of layer; None where the bucket has no room for them."""
        found: list[list[tuple[Ints, Ints, Ints]]] = []
        for part, batch, keys in zip((room, room.of_outputs()), batches, self._keys, strict=True):
            starts_q, starts_k, slots = on_host(batch)
            if len(slots) > part.slots:
                return None
            found.append([schedule(starts_q, starts_k, slots, *key[1:]) for key in keys])
            if any(len(p) > part.programs or len(m) > part.pieces for p, m, _ in found[-1]):
                return None
        return found

    def _fill(
        self,
        arrays: Sequence[np.ndarray],
        a: StepArrays,
        batches: tuple[AttentionBatch, AttentionBatch],
        schedules: list[list[tuple[Ints, Ints, Ints]]],
        entries: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Write the step's inputs into the host's arrays. Slots and positions beyond the step's are never read."""
        tokens, outputs, decodes, parts = a.num_tokens, len(a.output_rows), a.num_decodes, iter(arrays)
        for values, unused in ((a.input_ids, 0), (a.positions, 0), (a.slot_mapping, -1), (a.lora_slots, -1)):
            target = next(parts)
            target[:tokens], target[tokens:] = values, unused
        for values, unused in ((a.output_rows, 0), (a.lora_slots[a.output_rows], -1)):
            target = next(parts)
            target[:outputs], target[outputs:] = values, unused
        for target, values in zip((next(parts), next(parts)), entries, strict=True):
            target[:] = values
        target = next(parts)
        target[:decodes], target[decodes:] = a.context_lens, 1
        for batch, of_batch in zip(batches, schedules, strict=True):
            slots = on_host(batch)[2]
            next(parts)[: len(slots)] = slots
            for programs, pieces, positions in of_batch:
                programs[:, 0] += decodes  # their rows come after those
                for values, unused in ((programs, 0), (pieces, 0)):
                    target = next(parts)
                    target[: len(values)], target[len(values) :] = values, unused  # a program without rows does nothing
                next(parts)[decodes : decodes + len(positions)] = positions

    # ---- graphs ----

    def _graph(self, kind: Kind) -> Callable[[], None]:
        found = self._graphs.get(kind)
        if found is None:
            found = self._graphs[kind] = self._make(kind)
        return found

    def _make(self, kind: Kind) -> Callable[[], None]:
        def step() -> None:
            hidden = self._step(kind)
            self._hidden[: len(hidden)].copy_(hidden)

        if self._device.type != "cuda":
            return step
        self._rest(kind)
        replay, _, self._memory = recorded(step, self._memory)
        return replay

    def _rest(self, kind: Kind) -> None:
        """Inputs of a step in which nothing is written or attended, while kernels are compiled and a graph is made."""
        tensors = self._layouts[kind.tokens, kind.decodes].tensors(self._inputs)
        _, _, slots, lora_slots, _, output_slots, places, _, lens, *_ = tensors
        self._inputs.zero_()
        for tensor, value in (
            (slots, -1),
            (lora_slots, -1),
            (output_slots, -1),
            (places, self._tables.nowhere),
            (lens, 1),
        ):
            tensor.fill_(value)

    def _step(self, kind: Kind) -> torch.Tensor:
        tensors = iter(self._layouts[kind.tokens, kind.decodes].tensors(self._inputs))
        ids, positions, slots, lora_slots, rows, output_slots, places, blocks, lens = (next(tensors) for _ in range(9))
        batch = self._batch_of_nothing(kind.tokens, len(rows))
        assert batch.last_attention is not None
        batch.positions, batch.slot_mapping, batch.output_rows = positions, slots, rows
        batch.input_ids = self._feed.resolve(ids)
        if kind.decodes:
            self._tables.write(places, blocks)
            table = self._tables.tensor[: kind.decodes]
            batch.decode = DecodeBatch(table, lens, self._tables.block_size, padded=True)
        for attention, keys in zip((batch.attention, batch.last_attention), self._keys, strict=True):
            context = next(tensors)
            for key in keys:
                attention.plans[key] = TreePlan(next(tensors), next(tensors), next(tensors), context)
        adapters = None
        if kind.with_adapters:
            adapters = self._adapters
            assert adapters is not None
            batch.lora_routing, batch.output_lora_routing = adapters.routing, adapters.output_routing
            adapters.routing.build(lora_slots)
            adapters.output_routing.build(output_slots)
        return self._model.forward(batch, self._kv, adapters)

    def _batch_of_nothing(self, tokens: int, outputs: int) -> BatchInput:
        """A step of the right sizes, in which each row sees itself."""
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        own = -1 - np.arange(tokens, dtype=np.int32)
        return BatchInput(
            input_ids=zeros,
            positions=zeros,
            attention=attention_batch([1] * tokens, [own[i : i + 1] for i in range(tokens)]),
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int32, device=self._device),
            output_rows=zeros[:outputs],
            last_attention=attention_batch([1] * outputs, [own[:1]] * outputs),
        )


def on_host(batch: AttentionBatch) -> tuple[Ints, Ints, Ints]:
    return batch.cu_seqlens_q.numpy(), batch.cu_seqlens_k.numpy(), batch.context_slots.numpy()
