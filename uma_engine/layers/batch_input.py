"""The tensors of one step: what the runner hands to a model.

Knows rows, slots and who attends to what; does not know requests, weights or why a row is in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uma_kernels.attention import AttentionBatch
from uma_kernels.lora import DeviceRouting, LoraRouting

__all__ = ["BatchInput", "DecodeBatch", "KVCacheTensors", "Routing"]

Routing = LoraRouting | DeviceRouting  # on the CPU, on a device


@dataclass(frozen=True, slots=True)
class KVCacheTensors:
    """Keys and values of every layer: `k[layer]`, `v[layer]` [S, Hkv, D], S slots of one token each."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @torch.inference_mode()
    def wipe(self, block_ids: Sequence[int], block_size: int) -> None:
        """Overwrite the slots of these blocks with zeros. On a device behind the steps launched before, in their stream."""
        if not block_ids:
            return
        for tensors in (self.k, self.v):
            for tensor in tensors:
                blocks = tensor.view(-1, block_size, *tensor.shape[1:])
                blocks[torch.tensor(block_ids, dtype=torch.int64, device=tensor.device)] = 0


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Rows 0..B-1 of a step, one new token per sequence: block_table [B, M] int32, context_lens [B] int32.

    A context includes the row's own token, whose key is written before it is read. `padded`: of these rows some may belong to the
    attention after them, which then counts from row 0 and overwrites what was computed of its rows here.
    """

    block_table: torch.Tensor
    context_lens: torch.Tensor
    block_size: int
    padded: bool = False

    @property
    def num_rows(self) -> int:
        return self.context_lens.shape[0]


@dataclass(slots=True)
class BatchInput:
    """One flat batch of T rows (tokens), R of which are wanted as output.

    Shapes:  input_ids, positions [T] int64 . slot_mapping [T] int32, -1 where the key lives for this layer only .
             output_rows [R] int64
    `decode` covers the first rows when it is given; `attention` covers the rows after them, its `cu_seqlens_q`
    counted from the first of those. Negative context slots name rows of the whole step. `last_attention` holds one
    chunk of one query for each output row but those of `decode`, which come first, its context cut at that row: with it the last
    layer computes queries for the output rows alone; None computes all of them. The LoRA routings are None when no row has an adapter;
    `output_lora_routing` is `lora_routing` restricted to the output rows.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    slot_mapping: torch.Tensor
    output_rows: torch.Tensor
    last_attention: AttentionBatch | None = None
    decode: DecodeBatch | None = None
    lora_routing: Routing | None = None
    output_lora_routing: Routing | None = None

    @property
    def num_decodes(self) -> int:
        return 0 if self.decode is None else self.decode.num_rows
