"""Device memory for the adapters of one site, in blocks of 16 rank rows, and the tables that say whose each block is.

Knows factors, slots and blocks; does not know which layer the site is in, nor which request uses a slot.

A site is a matrix product with one or more slices: output columns that were separate projections (q, k, v; gate, up), each
with its own factors and rank. A rank block is 16 rows of one slice's A [16, K] with the same 16 rows of B^T [16, N]; ranks
that are no multiple of 16 are filled up with zeros. The blocks of all slices of a slot form its stacked rank rows, in slice
order. Blocks of any slot lie anywhere: loading never fails for fragmentation, and memory follows the real ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uma_kernels.check import FLOATS, ShapeError, check

__all__ = ["RANK_BLOCK", "STORAGES", "Factors", "LoraPool", "PoolFull", "split_size"]

RANK_BLOCK = 16
STORAGES = ("dense", "fp8", "int4")
SPLIT_SIZE = 512  # elements of K that are summed on their own; the parts are added in order

Factors = tuple[torch.Tensor, torch.Tensor, float]  # lora_a [R, K], lora_b [N, R], scaling


class PoolFull(RuntimeError):
    """No rank blocks are left for an adapter."""


def split_size(in_features: int) -> int:
    """How K is cut for the shrink: a function of K alone, so that a row's bits depend on nothing else."""
    return SPLIT_SIZE


class LoraPool:
    """What the engine holds for each site: the factors of the resident adapters and their tables, all on the device.

    `load` and `unload` write device memory in stream order and never move or resize it, so that a captured CUDA graph sees
    the change at its next replay. The caller sees to it that no running step uses the slot it changes.
    """

    def __init__(
        self,
        in_features: int,
        slices: Sequence[int],
        num_slots: int,
        rank_blocks: int,
        *,
        max_rank: int = 256,
        dtype: torch.dtype = torch.bfloat16,
        storage: str = "dense",
        device: torch.device | str = "cuda",
    ) -> None:
        """
        in_features: K.  slices: output columns of each projection, in the order of the merged output.
        rank_blocks: capacity of each slice in blocks of 16 rank rows.  dtype: of x, of out and of dense factors.
        storage:     "dense", "fp8" (e4m3) or "int4": one fp32 scale for each rank row, folded with `scaling`.
        """
        if in_features <= 0 or not slices or min(slices) <= 0 or num_slots <= 0 or rank_blocks <= 0 or max_rank <= 0:
            raise ShapeError(
                f"`in_features` {in_features}, `slices` {list(slices)}, `num_slots` {num_slots}, `rank_blocks`"
                f" {rank_blocks} and `max_rank` {max_rank} must be positive"
            )
        if dtype not in FLOATS or storage not in STORAGES:
            raise ShapeError(f"`dtype` {dtype} must be one of {FLOATS} and `storage` {storage!r} one of {STORAGES}")
        if storage == "int4" and (in_features % 2 or any(n % 2 for n in slices)):
            raise ShapeError(f"int4 storage needs even widths, not K {in_features} and slices {list(slices)}")
        self.in_features = in_features
        self.slices = tuple(slices)
        self.out_features = sum(slices)
        self.num_slots = num_slots
        self.rank_blocks = rank_blocks
        self.max_rank = max_rank
        self.dtype = dtype
        self.storage = storage
        device = self.device = torch.empty(0, device=device).device
        self.per_byte = 2 if storage == "int4" else 1
        stored = {"dense": dtype, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[storage]
        total = rank_blocks * len(slices)
        self.a = torch.empty(total, RANK_BLOCK, in_features // self.per_byte, dtype=stored, device=device)
        self.b = torch.empty(rank_blocks * RANK_BLOCK * self.out_features // self.per_byte, dtype=stored, device=device)
        self.row_scale = torch.zeros(total, RANK_BLOCK, dtype=torch.float32, device=device)
        self.max_blocks = len(slices) * -(-max_rank // RANK_BLOCK)
        # A slot's row: where each slice's blocks begin in the list, how many there are, and the list of block ids.
        self.table = torch.zeros(num_slots, len(slices) + 1 + self.max_blocks, dtype=torch.int32, device=device)
        self.row_tiles = torch.zeros(1, dtype=torch.int32, device=device)  # most rank tiles of any resident adapter
        self._free = [list(range((i + 1) * rank_blocks - 1, i * rank_blocks - 1, -1)) for i in range(len(slices))]
        self._held: dict[int, list[list[int]]] = {}
        self._unpublished: dict[int, tuple[torch.Tensor, int]] = {}  # slot -> its row of `table`, `row_tiles`
        self.column_tile = _column_tile(self.slices, 64 if dtype is torch.float32 else 256)
        self._column_tiles: dict[int, torch.Tensor] = {}
        self.columns = self.column_tiles(self.column_tile)
        starts = torch.tensor([0, *self.slices], dtype=torch.int64).cumsum(0)[:-1].tolist()
        facts = [
            (n, start, rank_blocks * RANK_BLOCK * start // self.per_byte)
            for n, start in zip(slices, starts, strict=True)
        ]
        self.slice_facts = torch.tensor(
            facts, dtype=torch.int64, device=device
        )  # [slices, 3]: N, first column, offset in b

    @property
    def num_splits(self) -> int:
        return -(-self.in_features // split_size(self.in_features))

    @property
    def rank_tile(self) -> int:
        """Stacked rank rows one program computes: one block of each slice, rounded up to a power of two."""
        return RANK_BLOCK * (1 << (len(self.slices) - 1).bit_length())

    @property
    def max_stacked_rows(self) -> int:
        return self.max_blocks * RANK_BLOCK

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.a, self.b, self.row_scale, self.table))

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Free rank blocks of each slice."""
        return tuple(len(free) for free in self._free)

    @property
    def resident(self) -> tuple[int, ...]:
        """Slots that hold an adapter, ascending."""
        return tuple(sorted(self._held))

    def blocks_of(self, slot: int) -> list[list[int]]:
        """Ids of the rank blocks that each slice of a resident slot holds, in order of rank."""
        return self._held[slot]

    def load(self, slot: int, factors: Sequence[Factors | None], publish: bool = True) -> None:
        """
        Semantics:  slot `slot` now holds these factors, one entry a slice; None leaves the slice's columns alone. Without
                    `publish` the tables are left as they are until `publish(slot)`: steps that run meanwhile, in other
                    streams too, read neither the new blocks nor half of a table
        Shapes:     each (lora_a [R, K], lora_b [N_i, R], scaling), fp32, bf16 or fp16, on any device; 0 < R <= max_rank
        Errors:     ShapeError; IndexError for a slot out of range; PoolFull, and the slot keeps what it held
        """
        self._check_slot(slot)
        if len(factors) != len(self.slices):
            raise ShapeError(f"{len(factors)} pairs of factors for {len(self.slices)} slices")
        counts = []
        for columns, pair in zip(self.slices, factors, strict=True):
            if pair is not None:
                check("lora_a", pair[0], (None, self.in_features), FLOATS)
                check("lora_b", pair[1], (columns, pair[0].shape[0]), FLOATS)
                if not 0 < pair[0].shape[0] <= self.max_rank:
                    raise ShapeError(f"rank {pair[0].shape[0]} is not in 1 .. `max_rank` {self.max_rank}")
            counts.append(0 if pair is None else -(-pair[0].shape[0] // RANK_BLOCK))
        held = self._held.get(slot, [[] for _ in self.slices])
        for i, count in enumerate(counts):
            if count > len(self._free[i]) + len(held[i]):
                raise PoolFull(
                    f"slice {i} needs {count} rank blocks but {len(self._free[i]) + len(held[i])} of {self.rank_blocks} are free"
                )
        self._release(slot)
        taken = [[self._free[i].pop() for _ in range(count)] for i, count in enumerate(counts)]
        for i, pair in enumerate(factors):
            if pair is not None:
                self._write(i, taken[i], *pair)
        self._held[slot] = taken
        self._unpublished[slot] = self._table_row(taken), self._most_tiles()
        if publish:
            self.publish(slot)

    def publish(self, slot: int) -> None:
        """The tables now say what `load` put there, if they did not. Not while a step that reads them is half launched."""
        found = self._unpublished.pop(slot, None)
        if found is not None:
            self.table[slot].copy_(found[0])
            self.row_tiles.fill_(found[1])

    def unload(self, slot: int) -> None:
        """Rows of `slot` take no update from now on. Errors: IndexError"""
        self._check_slot(slot)
        self._release(slot)
        self._unpublished[slot] = self._table_row([[] for _ in self.slices]), self._most_tiles()
        self.publish(slot)

    def column_tiles(self, width: int) -> torch.Tensor:
        """[2, tiles] int32 on the device: slice and first column of each tile of `width` columns of a slice. Made once."""
        found = self._column_tiles.get(width)
        if found is None:
            tiles = [(i, c) for i, n in enumerate(self.slices) for c in range(0, n, width)]
            found = self._column_tiles[width] = torch.tensor(
                tiles, dtype=torch.int32, device=self.device
            ).T.contiguous()
        return found

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} is not in 0 .. {self.num_slots - 1}")

    def _release(self, slot: int) -> None:
        for i, blocks in enumerate(self._held.pop(slot, [])):
            self._free[i].extend(reversed(blocks))

    def _write(self, index: int, blocks: list[int], lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        rank, columns = lora_a.shape[0], self.slices[index]
        padded = len(blocks) * RANK_BLOCK
        a = torch.zeros(padded, self.in_features, dtype=torch.float32, device=self.device)
        b = torch.zeros(padded, columns, dtype=torch.float32, device=self.device)
        a[:rank] = lora_a.to(a)
        b[:rank] = lora_b.to(b).T
        stored_a, scale_a = _store(a, self.storage, self.dtype)
        stored_b, scale_b = _store(b, self.storage, self.dtype)
        # Kernels multiply other adapters' rows of s, which are 0, by this B: what is not finite in it moves to the scale, and
        # so into this adapter's own s alone.
        bad = ~torch.isfinite(b if self.storage != "dense" else stored_b).all(1)
        _bytes(stored_b)[bad] = 0
        scale_b[bad] = float("nan")
        ids = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        view = self.b_of(index)
        _bytes(self.a)[ids] = _bytes(stored_a.view(len(blocks), RANK_BLOCK, -1))
        _bytes(view)[ids - index * self.rank_blocks] = _bytes(stored_b.view(len(blocks), RANK_BLOCK, -1))
        self.row_scale[ids] = (scaling * scale_a * scale_b).view(len(blocks), RANK_BLOCK)

    def b_of(self, index: int) -> torch.Tensor:
        """B^T of slice `index`: [rank_blocks, 16, N_i], a view (two columns a byte where the storage is int4)."""
        columns = self.slices[index] // self.per_byte
        start = self.rank_blocks * RANK_BLOCK * sum(self.slices[:index]) // self.per_byte
        return self.b[start : start + self.rank_blocks * RANK_BLOCK * columns].view(
            self.rank_blocks, RANK_BLOCK, columns
        )

    def _table_row(self, blocks: list[list[int]]) -> torch.Tensor:
        starts = [0]
        for part in blocks:
            starts.append(starts[-1] + len(part))
        row = starts + [block for part in blocks for block in part]
        row += [0] * (self.table.shape[1] - len(row))
        return torch.tensor(row, dtype=torch.int32, device="cpu").to(self.device)

    def _most_tiles(self) -> int:
        most = max((sum(map(len, held)) for held in self._held.values()), default=0)
        return -(-most * RANK_BLOCK // self.rank_tile)


def _column_tile(slices: Sequence[int], most: int) -> int:
    """Output columns of one expand program: `most`, less where slices are narrow."""
    return max(32, min(most, 1 << (min(slices) - 1).bit_length()))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """fp8 tensors as bytes: indexing does not know fp8 on every device."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def _store(rows: torch.Tensor, storage: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 rows as stored, with the factor of each row by which the stored values are multiplied."""
    if storage == "dense":
        return rows.to(dtype), torch.ones(rows.shape[0], device=rows.device)
    largest = 448.0 if storage == "fp8" else 7.0
    scale = rows.abs().amax(1) / largest
    scaled = rows / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    if storage == "fp8":
        return scaled.to(torch.float8_e4m3fn), scale
    levels = (scaled.round().clamp(-7, 7) + 8).to(torch.uint8)
    return levels[:, 0::2] | (levels[:, 1::2] << 4), scale
