"""Scoring steps as CUDA graphs: the model's forward pass of every step without decode rows, one graph for each size.

Knows a step's arrays, attention schedules and buffers with fixed addresses; does not know labels, text or why a row is there.

A step of T tokens replays the graph of the next larger bucket. Rows beyond T look up token 0, write nowhere, take no adapter and
are attended by nobody: what is computed of them is not read. A step's attention schedule is copied over the one that the graph
was captured with; where it has more programs, pieces or slots than the bucket has room for, `fits` says so and the step runs
eagerly. Without CUDA the same code runs eagerly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
from uma_engine.runner.graphs import recorded
from uma_engine.runner.prepare import StepArrays, attention_batch
from uma_engine.runner.staging import Layout, Staging
from uma_kernels.attention import AttentionBatch
from uma_kernels.attention.plan import PIECE_FIELDS, PROGRAM_FIELDS, Ints, TreePlan, schedule

if TYPE_CHECKING:
    from uma_engine.runner.device_adapters import DeviceAdapters
    from uma_engine.runner.model_runner import Model

__all__ = ["StepGraphs", "step_buckets"]

PlanKey = tuple[torch.device, int, int, int | None]
LEAST = 16  # tokens of the smallest bucket


def step_buckets(most: int) -> list[int]:
    """Numbers of tokens, ascending, eight to an octave from 512 on and fewer below: few rows are computed for nothing."""
    found: list[int] = []
    power = LEAST
    while not found or found[-1] < most:
        parts = 8 if power >= 512 else 4 if power >= 64 else 1
        found += [power + power * i // parts for i in range(parts)]
        power *= 2
    return [size for i, size in enumerate(found) if i == 0 or found[i - 1] < most]


@dataclass(frozen=True, slots=True)
class Room:
    """What the graph of a bucket holds: output rows, programs and pieces of a schedule, slots of all contexts."""

    tokens: int
    outputs: int
    programs: int
    pieces: int
    slots: int

    @classmethod
    def of(cls, tokens: int) -> Room:
        """Programs that do nothing cost time, so there is room for few: whose leaves are tiny runs eagerly."""
        return cls(tokens, tokens // 8 + 8, tokens // 32 + 16, tokens // 4 + 64, 16 * tokens + 4096)

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
        adapters: DeviceAdapters | None,
        staging: Staging,
        memory: Any = None,
    ) -> None:
        """`memory`: the pool of other graphs, which never run at the same time."""
        self._model = model
        self._kv = kv
        self._device = device
        self._adapters = adapters
        self._staging = staging
        self._memory = memory
        self._buckets = step_buckets(max_tokens)
        self._keys: tuple[list[PlanKey], list[PlanKey]] = ([], [])  # of all layers' attention, of the last one's
        self._layouts: dict[int, Layout] = {}
        self._inputs = torch.empty(0, dtype=torch.uint8, device=device)
        # Of all graphs: each copies its result here, so that none keeps memory of its own.
        outputs = Room.of(self._buckets[-1]).outputs
        self._hidden = torch.zeros(outputs, model.config.hidden_size, dtype=kv.k[0].dtype, device=device)
        self._graphs: dict[tuple[int, bool], Callable[[], None]] = {}

    def capture(self) -> None:
        """Capture every bucket, largest first so that the smaller ones fit into its memory."""
        self._prepare()
        for size in reversed(self._buckets):
            for with_adapters in (False, True) if self._adapters is not None else (False,):
                self._graph(size, with_adapters)

    def run(self, a: StepArrays) -> torch.Tensor | None:
        """The hidden states of the output rows, overwritten by the next step; None where no graph has room for the step."""
        if a.num_decodes or not a.query_lens or a.num_tokens > self._buckets[-1]:
            return None
        self._prepare()
        size = next(size for size in self._buckets if size >= a.num_tokens)
        batches = (
            attention_batch(a.query_lens, a.contexts),
            attention_batch([1] * len(a.last_contexts), a.last_contexts),
        )
        schedules = self._schedules(size, batches)
        outputs = len(a.output_rows)
        if schedules is None or outputs > Room.of(size).outputs:
            return None
        slots = self._kv.k[0].shape[0]
        for batch in batches:
            batch.check_slots(a.num_tokens, slots)
        replay = self._graph(size, a.has_adapters)  # making one clears the inputs
        layout = self._layouts[size]
        host = self._staging.fill(layout.num_bytes)
        self._fill(layout.arrays(host), a, batches, schedules)
        self._staging.upload_into(self._inputs[: layout.num_bytes], host[: layout.num_bytes])
        replay()
        return self._hidden[:outputs]

    # ---- layouts ----

    def _prepare(self) -> None:
        """Ask the layers which schedules they want, then lay out every bucket."""
        if self._layouts:
            return
        batch = self._batch_of_nothing(LEAST, Room.of(LEAST).outputs)
        self._model.forward(batch, self._kv, None)
        assert batch.last_attention is not None
        self._keys = (list(batch.attention.plans), list(batch.last_attention.plans))
        self._layouts = {size: self._layout(size) for size in self._buckets}
        most = max(layout.num_bytes for layout in self._layouts.values())
        self._inputs = torch.zeros(most, dtype=torch.uint8, device=self._device)

    def _layout(self, size: int) -> Layout:
        i32, i64, room = np.dtype(np.int32), np.dtype(np.int64), Room.of(size)
        specs: list[tuple[np.dtype, tuple[int, ...]]] = [(i64, (size,)), (i64, (size,)), (i32, (size,)), (i32, (size,))]
        specs += [(i64, (room.outputs,)), (i32, (room.outputs,))]
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
        self, size: int, batches: tuple[AttentionBatch, AttentionBatch]
    ) -> list[list[tuple[Ints, Ints, Ints]]] | None:
        """The programs, pieces and positions of each kind of layer; None where the bucket has no room for them."""
        found: list[list[tuple[Ints, Ints, Ints]]] = []
        room = Room.of(size)
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
    ) -> None:
        """Write the step's inputs into the host's arrays. Slots and positions beyond the step's are never read."""
        tokens, outputs, parts = a.num_tokens, len(a.output_rows), iter(arrays)
        for values, unused in ((a.input_ids, 0), (a.positions, 0), (a.slot_mapping, -1), (a.lora_slots, -1)):
            target = next(parts)
            target[:tokens], target[tokens:] = values, unused
        for values, unused in ((a.output_rows, 0), (a.lora_slots[a.output_rows], -1)):
            target = next(parts)
            target[:outputs], target[outputs:] = values, unused
        for batch, of_batch in zip(batches, schedules, strict=True):
            slots = on_host(batch)[2]
            next(parts)[: len(slots)] = slots
            for programs, pieces, positions in of_batch:
                for values, unused in ((programs, 0), (pieces, 0)):
                    target = next(parts)
                    target[: len(values)], target[len(values) :] = values, unused  # a program without rows does nothing
                next(parts)[: len(positions)] = positions

    # ---- graphs ----

    def _graph(self, size: int, with_adapters: bool) -> Callable[[], None]:
        found = self._graphs.get((size, with_adapters))
        if found is None:
            found = self._graphs[size, with_adapters] = self._make(size, with_adapters)
        return found

    def _make(self, size: int, with_adapters: bool) -> Callable[[], None]:
        def step() -> None:
            hidden = self._step(size, with_adapters)
            self._hidden[: len(hidden)].copy_(hidden)

        if self._device.type != "cuda":
            return step
        self._rest(size)
        replay, _, self._memory = recorded(step, self._memory)
        return replay

    def _rest(self, size: int) -> None:
        """Inputs of a step in which nothing is written or attended, while kernels are compiled and a graph is made."""
        _, _, slots, lora_slots, _, output_slots, *_ = self._layouts[size].tensors(self._inputs)
        self._inputs.zero_()
        for tensor in (slots, lora_slots, output_slots):
            tensor.fill_(-1)

    def _step(self, size: int, with_adapters: bool) -> torch.Tensor:
        tensors = iter(self._layouts[size].tensors(self._inputs))
        ids, positions, slots, lora_slots, rows, output_slots = (next(tensors) for _ in range(6))
        batch = self._batch_of_nothing(size, len(rows))
        assert batch.last_attention is not None
        batch.input_ids, batch.positions, batch.slot_mapping, batch.output_rows = ids, positions, slots, rows
        for attention, keys in zip((batch.attention, batch.last_attention), self._keys, strict=True):
            context = next(tensors)
            for key in keys:
                attention.plans[key] = TreePlan(next(tensors), next(tensors), next(tensors), context)
        adapters = None
        if with_adapters:
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
