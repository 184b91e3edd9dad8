"""Which blocks of a segment are computed already: hash chains over token ids, from the root of a request down.

Knows segments, tokens and keys; does not know the step, the budget, or how many requests run.

A key names everything that a block's contents depend on: the request's `cache_root` (base, adapter content, tenant),
every token before the block, where segments end on the way, and the tokens inside. Segments own blocks from their
own start, so a key of a segment's first block chains from the *end key* of its parent.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from uma_engine.core import NO_PARENT, Request, Segment
from uma_engine.errors import InvalidRequest
from uma_engine.kv_cache.block_pool import BlockPool

__all__ = ["PrefixCache", "encode_tokens"]

KEY_BYTES = 16

# What is hashed begins with one of these, so that a key of one meaning is never a key of another.
ROOT, BLOCK, TAIL, END = b"\x00", b"\x01", b"\x02", b"\x03"


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES).digest()


class PrefixCache:
    """Finds and remembers computed blocks of segments in a BlockPool. With `enabled=False` it does neither.

    A segment that is not the root may be asked about once its parent's keys are known, that is, once `keys` has been
    called for all of the parent's blocks.
    """

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self.pool = pool
        self.enabled = enabled

    def num_matchable_blocks(self, request: Request, index: int, needs_output: bool) -> int:
        """How many leading blocks of a segment may come from the cache.

        A segment that must still yield an output recomputes its last token, so only whole blocks before that token
        count. The last, partial block of any other segment of a tree may be reused, since nobody writes to it again.
        """
        num_tokens = len(request.segments[index].token_ids)
        block_size = self.pool.block_size
        return (num_tokens - 1) // block_size if needs_output else -(-num_tokens // block_size)

    def keys(self, request: Request, index: int, num_blocks: int) -> list[bytes]:
        """`segment.cached_keys`, made at least `num_blocks` long or as long as there are blocks with a key.

        A partial last block has a key only in a segment that cannot grow. Errors: InvalidRequest when a token id is
        not an integer of 32 bits.
        """
        segment = request.segments[index]
        keys = segment.cached_keys
        if len(keys) >= num_blocks:
            return keys
        token_ids = segment.token_ids
        block_size = self.pool.block_size
        previous = keys[-1] if keys else self._start_key(request, segment)
        for start in range(len(keys) * block_size, min(num_blocks * block_size, len(token_ids)), block_size):
            tokens = token_ids[start : start + block_size]
            if len(tokens) == block_size:
                previous = _hash(BLOCK + previous + encode_tokens(tokens))
            elif index != request.growing:
                previous = _hash(TAIL + previous + encode_tokens(tokens))
            else:
                break
            keys.append(previous)
        return keys

    def extend(self, request: Request, index: int, needs_output: bool) -> int:
        """Give the segment the cached blocks that follow the ones it holds; the number of tokens gained.

        The blocks get one more user each; `block_ids`, `num_computed_tokens` and `num_cached_tokens` grow. Nothing
        happens when the segment's computed tokens do not end at a block boundary.
        """
        segment = request.segments[index]
        block_size = self.pool.block_size
        if not self.enabled or segment.num_computed_tokens % block_size:
            return 0
        first = segment.num_computed_tokens // block_size
        for position in range(first, self.num_matchable_blocks(request, index, needs_output)):
            block_id = self.pool.acquire(self.keys(request, index, position + 1)[position])
            if block_id is None:
                break
            segment.block_ids.append(block_id)
        computed = min(len(segment.block_ids) * block_size, len(segment.token_ids))
        gained = computed - segment.num_computed_tokens
        segment.num_computed_tokens = computed
        segment.num_cached_tokens += gained
        return gained

    def insert(self, request: Request, index: int, start: int, end: int) -> None:
        """Make the blocks findable that became complete when tokens [start, end) of a segment were computed."""
        if not self.enabled:
            return
        segment = request.segments[index]
        block_size = self.pool.block_size
        first = start // block_size
        last = end // block_size  # exclusive
        if end == len(segment.token_ids) and end % block_size and index != request.growing:
            last += 1  # the tail of a segment that cannot grow is as good as full
        if first < last:
            keys = self.keys(request, index, last)
            for position in range(first, last):
                self.pool.insert(keys[position], segment.block_ids[position])

    def num_blocks_to_allocate(self, request: Request, index: int, needs_output: bool) -> int:
        """Free blocks that computing a segment would take now: all its blocks but those that others already use."""
        needed = -(-len(request.segments[index].token_ids) // self.pool.block_size)
        if self.enabled:
            for position in range(self.num_matchable_blocks(request, index, needs_output)):
                block_id = self.pool.peek(self.keys(request, index, position + 1)[position])
                if block_id is None:
                    break
                needed -= self.pool.ref_count(block_id) > 0
        return needed

    def _start_key(self, request: Request, segment: Segment) -> bytes:
        """Where the chain of a segment begins. A parent's end is part of it: one run of tokens cut into segments
        differently is computed differently, and reuse must not change a single bit."""
        if segment.parent == NO_PARENT:
            return _hash(ROOT + request.cache_root)
        parent = request.segments[segment.parent]
        last = parent.cached_keys[-1]
        return _hash(END + last) if len(parent.token_ids) % self.pool.block_size == 0 else last


def encode_tokens(token_ids: list[int]) -> bytes:
    """Token ids as 32-bit integers. Errors: InvalidRequest."""
    try:
        return array("i", token_ids).tobytes()
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(
            f"a token id is not a 32-bit integer: {error}", hint="token ids come from the model's tokenizer"
        ) from error
