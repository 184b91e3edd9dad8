"""Decode steps without Python in between: the first of each shape is recorded, the next ones are played.

Knows the tensors of a decode step; does not know layers: whatever the model calls is recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import cast

import torch

from uma_engine.layers.batch_input import BatchInput, DecodeBatch, KVCacheTensors
from uma_engine.layers.linear import Adapters, AdapterSites
from uma_kernels.lora import LoraRouting
from uma_kernels.tape import NotTapeable, Tape, TapeMemory, can_tape

__all__ = ["TapedDecode"]

MOST_TAPES = 16  # kept; recording one again costs about one step

Layers = Callable[[BatchInput, KVCacheTensors, Adapters | None], torch.Tensor]


class TapedDecode:
    """Plays what a model does with a step that is decodes alone. One thread calls it.

    A tape belongs to a number of rows, to their tables' block size, to which adapter each row has, and to one KV cache;
    it reads a step's tensors from buffers of its own. All are forgotten when another KV cache comes or an adapter's place has changed.
    """

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions
        self._memory = TapeMemory()
        self._tapes: OrderedDict[Hashable, _Recorded] = OrderedDict()  # last used last
        self._kv: KVCacheTensors | None = None
        self._adapters_version = 0
        self._possible = True

    def takes(self, batch: BatchInput) -> bool:
        """Whether the step may be played: compiled ops, and every row a decode."""
        return (
            self._possible
            and batch.decode is not None
            and batch.num_decodes == batch.positions.shape[0]
            and can_tape(batch.positions.device.type)
        )

    def __call__(
        self, layers: Layers, batch: BatchInput, kv: KVCacheTensors, adapters: Adapters | None
    ) -> torch.Tensor | None:
        """What `layers` returns, until the next call; None when it has to be asked itself."""
        routing = batch.lora_routing
        version = self._adapters_version if routing is None else cast(AdapterSites, adapters).version
        if kv is not self._kv or version != self._adapters_version:
            self._tapes.clear()
            self._kv, self._adapters_version = kv, version
        key: Hashable = (batch.num_decodes, batch.decode.block_size if batch.decode else 0)
        if isinstance(routing, LoraRouting):
            key = (key, routing.slots, routing.order.numpy().tobytes(), routing.offsets.numpy().tobytes())
        recorded = self._tapes.get(key)
        if recorded is not None:
            self._tapes.move_to_end(key)
            recorded.take(batch)
            # An op that refuses its input is asked again without the tape, to say why.
            return recorded.tape.result if recorded.tape.play() else None
        try:
            recorded = _Recorded(layers, batch, kv, adapters, self._max_positions, self._memory)
        except NotTapeable:
            self._possible = False
            return None
        self._tapes[key] = recorded
        if len(self._tapes) > MOST_TAPES:
            self._tapes.popitem(last=False)
        return recorded.tape.result


class _Recorded:
    """A tape and the buffers that it reads."""

    def __init__(
        self,
        layers: Layers,
        batch: BatchInput,
        kv: KVCacheTensors,
        adapters: Adapters | None,
        max_positions: int,
        memory: TapeMemory,
    ) -> None:
        assert batch.decode is not None
        rows, block_size = batch.num_decodes, batch.decode.block_size
        table = torch.zeros(rows, -(-max_positions // block_size), dtype=torch.int32)
        self.decode = DecodeBatch(table, torch.empty_like(batch.decode.context_lens), block_size)
        self.batch = BatchInput(
            input_ids=torch.empty_like(batch.input_ids),
            positions=torch.empty_like(batch.positions),
            attention=batch.attention,
            slot_mapping=torch.empty_like(batch.slot_mapping),
            output_rows=batch.output_rows,
            decode=self.decode,
            lora_routing=batch.lora_routing,
        )
        self.take(batch)
        self.tape = Tape(lambda: layers(self.batch, kv, adapters), memory)

    def take(self, batch: BatchInput) -> None:
        """The step's tensors into the buffers."""
        decode = batch.decode
        assert decode is not None
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.positions.copy_(batch.positions)
        self.batch.slot_mapping.copy_(batch.slot_mapping)
        self.decode.context_lens.copy_(decode.context_lens)
        self.decode.block_table[:, : decode.block_table.shape[1]].copy_(decode.block_table)
