"""Which rows take which adapter, as the device sees it: rows sorted by slot and cut into chunks, built once a step.

Knows slots and rows; does not know adapters, layers or requests. Nothing here reads the device back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from uma_kernels.check import ShapeError, check

if TYPE_CHECKING:
    from uma_kernels.lora.pool import LoraPool

__all__ = ["MAX_SLOTS", "DeviceRouting", "chunk_rows"]

MAX_SLOTS = 1024
SORT_ROWS = 256  # rows that one program of the counting sort places
SPLIT_TILES = 96  # with at most this many (chunk, rank tile) pairs, a pair's K is shared between programs


def chunk_rows(num_tokens: int) -> int:
    """Rows of one slot that are computed together: a function of the batch's size; no result depends on it."""
    return 16 if num_tokens <= 256 else 32 if num_tokens <= 1024 else 64


class DeviceRouting:
    """The routing of one step and the scratch that every site's kernels share. Made once; `build` refills it each step.

    All buffers have fixed sizes and addresses, and counts stay on the device: a CUDA graph captured over `build` and over
    the layers serves any mix of adapters of the same number of rows. One stream at a time may use an instance.
    """

    def __init__(self, max_num_tokens: int, num_slots: int, pools: Sequence[LoraPool]) -> None:
        """`pools`: every site that will be run with this routing; they size the scratch."""
        if not 0 < num_slots <= MAX_SLOTS or max_num_tokens <= 0 or not pools:
            raise ShapeError(
                f"`max_num_tokens` {max_num_tokens}, `num_slots` {num_slots} and {len(pools)} pools: the first two must be"
                f" positive, slots at most {MAX_SLOTS}, and one pool or more is needed"
            )
        for pool in pools:
            if pool.num_slots != num_slots or pool.device != pools[0].device or pool.dtype != pools[0].dtype:
                raise ShapeError("the pools of a routing must share `num_slots`, device and dtype")
        self.max_num_tokens = max_num_tokens
        self.num_slots = num_slots
        device = self.device = pools[0].device

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        blocks = -(-max_num_tokens // SORT_ROWS)
        self.histogram = int32(blocks, _power_of_2(num_slots))
        self.order = int32(max_num_tokens)
        self.slots = int32(max_num_tokens)  # of each row, -1 for the base
        sizes = [min(size, max_num_tokens) for size in (256, 1024, max_num_tokens)]  # the worst of each chunk size
        self.max_chunks = max(_max_chunks(size, num_slots) for size in sizes)
        self.chunks = int32(3, self.max_chunks)  # slot, first of `order`, rows
        self.count = int32(1)  # of chunks
        self.shrunk = torch.empty(
            max_num_tokens, max(p.max_stacked_rows for p in pools), dtype=pools[0].dtype, device=device
        )
        partials = max(pool.num_splits * pool.rank_tile for pool in pools) * SPLIT_TILES * chunk_rows(max_num_tokens)
        self.partials = torch.empty(partials, dtype=torch.float32, device=device)
        # Counters are 0 between launches: whoever comes last puts them back.
        self.arrivals = int32(SPLIT_TILES)
        self.ready = int32(2)  # tiles shrunk; programs that have seen all
        self.num_tokens = 0
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> None:
        """What `side` does from now on comes after what the current stream has been given."""
        assert self.side is not None
        self.side.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """What the current stream does from now on comes after what `side` has been given."""
        assert self.side is not None
        torch.cuda.current_stream().wait_stream(self.side)

    def build(self, token_lora_mapping: torch.Tensor) -> None:
        """
        Semantics:  groups the rows by slot, rows of a slot ascending; two launches, no synchronisation
        Shapes:     token_lora_mapping [T] int32 on the routing's device, T <= max_num_tokens: a slot, or -1 for the base.
                    Values out of range count as -1: the engine checks slots when it admits a request
        Errors:     ShapeError
        """
        check("token_lora_mapping", token_lora_mapping, (None,), torch.int32)
        num_tokens = token_lora_mapping.shape[0]
        if num_tokens > self.max_num_tokens or token_lora_mapping.device != self.device:
            raise ShapeError(
                f"`token_lora_mapping` has {num_tokens} rows on {token_lora_mapping.device} but the routing holds"
                f" {self.max_num_tokens} on {self.device}"
            )
        from uma_kernels.lora import triton_routing

        self.num_tokens = num_tokens
        triton_routing.build_routing(self, token_lora_mapping)


def _max_chunks(num_tokens: int, num_slots: int) -> int:
    return min(num_tokens, num_slots + num_tokens // chunk_rows(num_tokens))


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
