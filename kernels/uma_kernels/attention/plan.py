"""Which GPU program computes which query rows of a step, over which tiles of keys.

Knows offsets, slots and tile sizes; does not know queries, keys, heads or kernels.

A program holds up to `block_q` neighbouring query rows. It walks the tiles of keys that all of its rows see whole (`full`),
and tiles that some see in part (pieces, masked). Tiles are aligned to positions of the path, and a masked tile leaves the rows
that see nothing of it as they were: so a row's keys are reduced in one order whatever else is in its program. That allows
neighbouring short chunks to share a program, and with it the tiles of the ancestors that they have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PIECE_FIELDS", "PROGRAM_FIELDS", "TreePlan", "build"]

Ints = npt.NDArray[np.int32]

# Columns of `programs`: first query row, query rows, start of the context, full tiles, and the pieces: one before the full
# tiles (a window's edge; empty where its two tiles are equal), the others after them.
PROGRAM_FIELDS = ("row", "rows", "context", "full_begin", "full_end", "piece_begin", "piece_end")
# Columns of `pieces`: start of the context, tiles, keys that may be read, and the rows of the program that it is for.
PIECE_FIELDS = ("context", "tile_begin", "tile_end", "keys", "row_begin", "row_end")


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The schedule of one step on one device, for one tile size and window. A program with no rows does nothing.

    Shapes:     programs [P, 7] . pieces [M, 6] . positions [T], each row's path position . slots [cu_seqlens_k[N]]; int32
    """

    programs: torch.Tensor
    pieces: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor

    @property
    def num_programs(self) -> int:
        return self.programs.shape[0]


def build(
    starts_q: Ints,
    starts_k: Ints,
    slots: Ints,
    block_q: int,
    block_n: int,
    window: int | None,
    device: torch.device,
    share: bool = True,
) -> TreePlan:
    """The plan of a step; one copy to the device."""
    programs, pieces, positions = schedule(starts_q, starts_k, slots, block_q, block_n, window, share)
    parts = (programs, pieces, positions, slots)
    sizes = [part.size + -part.size % 4 for part in parts]  # every section begins at a multiple of 16 bytes
    host = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    ends = np.cumsum(sizes)
    for part, end, size in zip(parts, ends, sizes, strict=True):
        host.numpy()[end - size :][: part.size] = part.reshape(-1)
    flat = host.to(device, non_blocking=True)
    sections = [
        flat[end - size :][: part.size].view(part.shape) for part, end, size in zip(parts, ends, sizes, strict=True)
    ]
    return TreePlan(*sections)


def schedule(
    starts_q: Ints, starts_k: Ints, slots: Ints, block_q: int, block_n: int, window: int | None, share: bool = True
) -> tuple[Ints, Ints, Ints]:
    """(programs, pieces, positions), longest programs first. Without `share` every chunk has programs of its own."""
    len_q, len_k = np.diff(starts_q), np.diff(starts_k)
    positions = np.arange(starts_q[-1], dtype=np.int32) + np.repeat(len_k - len_q - starts_q[:-1], len_q)
    group, shared = np.arange(len(len_q), dtype=np.int32), np.zeros(len(len_q), np.int32)
    if share:
        _group(group, shared, starts_q, starts_k, slots, block_q, block_n)

    # A part is what one program computes of one chunk.
    count = -(-len_q // block_q)
    chunk = np.repeat(np.arange(len(len_q)), count)
    first = (np.arange(len(chunk)) - np.repeat(np.cumsum(count) - count, count)) * block_q  # row inside the chunk
    rows = np.minimum(block_q, len_q[chunk] - first)
    low = (len_k - len_q)[chunk] + first  # path position of the first row
    high = low + rows - 1
    row = starts_q[chunk] + first
    context = starts_k[chunk]
    end = high // block_n + 1

    # Parts of one group are one program; a long chunk's parts have groups of their own.
    new = np.ones(len(chunk), bool)
    new[1:] = (group[chunk[1:]] != group[chunk[:-1]]) | (count[chunk[1:]] > 1)
    program = np.cumsum(new) - 1
    heads = np.flatnonzero(new)
    if not len(heads):
        return np.empty((0, 7), np.int32), np.empty((0, 6), np.int32), positions
    lowest, highest = np.minimum.reduceat(low, heads), np.maximum.reduceat(high, heads)
    alone = np.diff(np.append(heads, len(chunk))) == 1
    full_end = np.where(alone, (lowest + 1) // block_n, shared[chunk[heads]])
    begin, full_begin = np.zeros_like(full_end), np.zeros_like(full_end)
    if window is not None:
        begin = np.minimum(np.maximum(lowest - window + 1, 0) // block_n, full_end)
        full_begin = np.clip(-(-(highest - window + 1) // block_n), begin, full_end)
    total = np.add.reduceat(rows, heads)

    # The pieces of each program: the window's edge, then one a part.
    edge = np.stack((context[heads], begin, full_begin, full_begin * block_n, 0 * total, total), axis=1)
    piece_begin = full_end[program]
    if window is not None:
        piece_begin = np.maximum(piece_begin, np.maximum(low - window + 1, 0) // block_n)
    offset = row - row[heads][program]
    own = np.stack((context, piece_begin, end, high + 1, offset, offset + rows), axis=1)
    place = np.arange(len(chunk)) + program + 1
    pieces = np.empty((len(heads) + len(chunk), len(PIECE_FIELDS)), np.int32)
    pieces[heads + np.arange(len(heads))] = edge
    pieces[place] = own

    tiles = full_end - begin + np.add.reduceat(end - piece_begin, heads)
    first_piece = heads + np.arange(len(heads))
    last_piece = np.append(first_piece[1:], len(pieces))
    programs = np.stack((row[heads], total, context[heads], full_begin, full_end, first_piece, last_piece), axis=1)
    order = np.argsort(-tiles, kind="stable")  # the longest must not be the last to begin
    return programs[order].astype(np.int32), pieces, positions.astype(np.int32)


def _group(group: Ints, shared: Ints, starts_q: Ints, starts_k: Ints, slots: Ints, block_q: int, block_n: int) -> None:
    """Gives short chunks the group of a neighbour, and the group's first chunk the whole tiles that all have in common.

    Neighbours join while their rows fit into one program and it spends no more time on their own tiles than on the common
    ones: beyond that a program would become long while other multiprocessors wait.
    """
    len_q, len_k = np.diff(starts_q), np.diff(starts_k)
    above = (len_k - len_q) // block_n  # whole tiles above each chunk
    small = (len_q > 0) & (len_q <= block_q // 2) & (above > 0)
    if not small.any():
        return
    first_slot = slots[np.minimum(starts_k[:-1], len(slots) - 1)]
    joins = small[1:] & small[:-1] & (first_slot[1:] == first_slot[:-1])
    leader, own, rows = -1, 0, 0
    for n in (np.flatnonzero(joins) + 1).tolist():
        if leader < 0 or group[n - 1] != leader:
            leader = n - 1
            shared[leader] = above[leader]
            own, rows = _own_tiles(len_k, leader, int(shared[leader]), block_n), int(len_q[leader])
        most = int(min(shared[leader], above[n])) * block_n
        a, b = int(starts_k[leader]), int(starts_k[n])
        differ = np.flatnonzero(slots[a : a + most] != slots[b : b + most])
        common = (int(differ[0]) if len(differ) else most) // block_n
        lost = (n - leader) * (int(shared[leader]) - common)  # tiles that earlier members would own from now on
        more = _own_tiles(len_k, n, common, block_n)
        if own + lost + more <= common and rows + int(len_q[n]) <= block_q:
            group[n], shared[leader] = leader, common
            own, rows = own + lost + more, rows + int(len_q[n])


def _own_tiles(len_k: Ints, chunk: int, shared: int, block_n: int) -> int:
    return -(-int(len_k[chunk]) // block_n) - shared
