"""Blocks of the paged KV cache: reference counts, a free list that is also an LRU cache, and a map from key to block.

Knows block ids and opaque keys; does not know how a key is made, whose block it is, or where its bytes lie.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from uma_engine.errors import InvalidRequest, InvariantViolation

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Every operation is O(1) for each block it names.

    A block is used while its reference count is above 0. A free block keeps its cache key, and so its contents can be
    taken back with `acquire`, until `allocate` hands the block out again. Free blocks without a key go first, then the
    cached ones, least recently freed first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise InvalidRequest(f"`{name}` is `{value}` but must be at least 1", param=name)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.hits = 0  # blocks that `acquire` found
        self.misses = 0  # keys that it did not
        self.evictions = 0  # cached blocks handed out for something else
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._written: set[int] = set()  # blocks that somebody has held since they were last wiped
        self._cached: dict[bytes, int] = {}  # key -> block, used or free
        self._free_blank = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest
        self._free_cached: OrderedDict[int, None] = OrderedDict()  # first: least recently freed

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._free_blank) + len(self._free_cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks, used or free, that can be found by a key."""
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` blocks with reference count 1 and no key, or None, and no change, when fewer are free."""
        blank = self._free_blank
        from_cache = num_blocks - len(blank)
        if from_cache > len(self._free_cached):
            return None
        taken: list[int] = []
        for _ in range(num_blocks):
            if blank:
                block_id = blank.pop()
            else:
                block_id, _ = self._free_cached.popitem(last=False)
                self._forget(block_id)
                self.evictions += 1
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        self._written.update(taken)
        return taken

    def incref(self, block_ids: Sequence[int]) -> None:
        """One more user for each block; a free cached block becomes used again."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                if self._keys[block_id] is None:
                    raise InvariantViolation(f"block {block_id} is free and has no key, so its contents are not known")
                del self._free_cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One user less for each block, last block first, so that the tail of a run is evicted before its head."""
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise InvariantViolation(f"block {block_id} is freed but nobody uses it")
            self._ref_counts[block_id] = count
            if count == 0:
                if self._keys[block_id] is None:
                    self._free_blank.append(block_id)
                else:
                    self._free_cached[block_id] = None

    def peek(self, key: bytes) -> int | None:
        """The block cached under `key`. Changes nothing, counts nothing."""
        return self._cached.get(key)

    def acquire(self, key: bytes) -> int | None:
        """The block cached under `key` with one more user, or None."""
        block_id = self._cached.get(key)
        if block_id is None:
            self.misses += 1
            return None
        if self._ref_counts[block_id] == 0:
            del self._free_cached[block_id]
        self._ref_counts[block_id] += 1
        self.hits += 1
        return block_id

    def insert(self, key: bytes, block_id: int) -> bool:
        """Make a used block findable by `key`; False, and no change, if the key has a block or the block a key."""
        if self._ref_counts[block_id] == 0:
            raise InvariantViolation(f"block {block_id} is put into the cache but nobody uses it")
        if key in self._cached or self._keys[block_id] is not None:
            return False
        self._cached[key] = block_id
        self._keys[block_id] = key
        return True

    def drop_cached(self) -> list[int]:
        """Let no key find a block any more; the free blocks that hold somebody's bytes, for the caller to wipe.

        A block that is in use keeps its user and is free without a key afterwards; its bytes stay until then.
        """
        for block_id in list(self._cached.values()):
            self._forget(block_id)
        self._free_blank.extend(self._free_cached)
        self._free_cached.clear()
        dirty = sorted(block_id for block_id in self._written if self._ref_counts[block_id] == 0)
        self._written.difference_update(dirty)
        return dirty

    def check_integrity(self) -> None:
        """Raise InvariantViolation unless each block is free or used, once, and keys and blocks agree both ways."""
        free = self._free_blank + list(self._free_cached)
        unused = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        if len(free) != len(set(free)) or set(free) != unused:
            raise InvariantViolation(f"blocks {sorted(free)} are in the free lists but {sorted(unused)} have no users")
        if any(count < 0 for count in self._ref_counts):
            raise InvariantViolation(f"a reference count is negative: {self._ref_counts}")
        by_block = {block_id: key for block_id, key in enumerate(self._keys) if key is not None}
        if {block_id: key for key, block_id in self._cached.items()} != by_block or len(self._cached) != len(by_block):
            raise InvariantViolation("the map from keys to blocks disagrees with the blocks' own keys")
        if any(self._keys[block_id] is not None for block_id in self._free_blank):
            raise InvariantViolation("a block with a key lies among the free blocks without one")
        if any(self._keys[block_id] is None for block_id in self._free_cached):
            raise InvariantViolation("a block without a key lies among the free cached blocks")

    def _forget(self, block_id: int) -> None:
        key = self._keys[block_id]
        if key is not None:
            del self._cached[key]
            self._keys[block_id] = None
