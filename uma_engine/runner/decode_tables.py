"""The block tables of the sequences that decode, kept on the device from step to step.

Knows rows, blocks and places in a table; does not know graphs, queues or why a row is there.

A sequence takes a block every `block_size` steps, so a step carries its few new entries, which its own kernels write into the table,
and whole tables only of rows that another sequence has got.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from uma_engine.core import Request
from uma_engine.runner.staging import Staging

__all__ = ["DecodeTables"]


class DecodeTables:
    """The tables of up to `max_rows` sequences of up to `max_len` tokens. `tensor` [max_rows, W] int32 stays at its address."""

    def __init__(self, max_rows: int, max_len: int, block_size: int, device: torch.device, staging: Staging) -> None:
        self.block_size = block_size
        self._width = -(-max_len // block_size)
        self._staging = staging
        self._host = np.zeros((max_rows, self._width), np.int32)
        # One entry more than the tables have: rows that take no new block write there.
        self._flat = torch.zeros(max_rows * self._width + 1, dtype=torch.int32, device=device)
        self.tensor = self._flat[:-1].view(max_rows, self._width)
        self._requests: list[Request] = []  # of the last step, in order
        self._positions = np.zeros(0, np.int64)

    @property
    def max_rows(self) -> int:
        return len(self._host)

    @property
    def nowhere(self) -> int:
        """The place of a row that takes no new block."""
        return self._host.size

    def advance(
        self, requests: Sequence[Request], starts: np.ndarray, places: np.ndarray, blocks: np.ndarray
    ) -> np.ndarray:
        """The sequences of a step, which compute positions `starts`: their cache slots, [B] int32. Fills in what `write` is to be given:
        `places` int64 and `blocks` int32, of B rows or more.
        """
        rows, size = len(requests), self.block_size
        same = self._same(requests, starts)
        self._requests, self._positions = list(requests), starts
        if not same.all():
            self._load(np.flatnonzero(~same), requests)
        own, offsets = np.divmod(starts, size)
        places[:] = self.nowhere
        blocks[:] = 0
        opened = np.flatnonzero((offsets == 0) & same)
        if len(opened):
            new = [requests[row].segments[0].block_ids[-1] for row in opened.tolist()]
            places[opened], blocks[opened] = opened * self._width + own[opened], new
            self._host[opened, own[opened]] = new
        slots: np.ndarray = self._host[np.arange(rows), own] * size + offsets.astype(np.int32)
        return slots

    def write(self, places: torch.Tensor, blocks: torch.Tensor) -> None:
        """The new entries, on the device: part of the step's own kernels."""
        self._flat.scatter_(0, places, blocks)

    def _same(self, requests: Sequence[Request], starts: np.ndarray) -> np.ndarray:
        """Which rows have the sequence of the last step, one token further: one that was preempted meanwhile has other blocks."""
        same = np.zeros(len(requests), np.bool_)
        common = min(len(requests), len(self._requests))
        same[:common] = [now is before for now, before in zip(requests, self._requests, strict=False)]
        same[:common] &= starts[:common] == self._positions[:common] + 1
        return same

    def _load(self, changed: np.ndarray, requests: Sequence[Request]) -> None:
        """Whole tables of the rows that have another sequence, as far as those reach."""
        tables = [requests[row].segments[0].block_ids for row in changed.tolist()]
        width = max(map(len, tables))
        part = np.zeros((len(tables), width), np.int32)
        for row, table in zip(part, tables, strict=True):
            row[: len(table)] = table
        self._host[changed, :width] = part
        index, on_device = self._staging.upload([changed.astype(np.int64), part])
        self.tensor[:, :width].index_copy_(0, index, on_device)
