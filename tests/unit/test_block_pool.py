"""The block pool, alone and against a naive model of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from uma_engine.errors import InvalidRequest, InvariantViolation
from uma_engine.kv_cache import BlockPool


def cached_pool(num_blocks: int, keys: list[bytes]) -> tuple[BlockPool, list[int]]:
    """A pool whose first blocks are used and cached under the keys."""
    pool = BlockPool(num_blocks, 16)
    blocks = pool.allocate(len(keys))
    assert blocks is not None
    for key, block_id in zip(keys, blocks, strict=True):
        assert pool.insert(key, block_id)
    return pool, blocks


def test_blocks_are_handed_out_once_until_they_are_freed():
    pool = BlockPool(4, 16)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted([*first, *second]) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert (pool.num_free, pool.num_used) == (0, 4)
    pool.free(first)
    assert sorted(pool.allocate(3)) == sorted(first)


def test_an_allocation_that_does_not_fit_takes_nothing():
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    assert pool.allocate(0) == []


def test_a_freed_block_can_be_found_until_it_is_used_again():
    pool, blocks = cached_pool(2, [b"a", b"b"])
    pool.free(blocks)
    assert pool.num_free == 2
    assert pool.acquire(b"a") == blocks[0]
    assert pool.num_free == 1
    assert pool.allocate(1) == [blocks[1]]
    assert pool.acquire(b"b") is None
    assert (pool.hits, pool.misses, pool.evictions) == (1, 1, 1)
    pool.check_integrity()


def test_blocks_without_a_key_are_reused_before_cached_ones():
    pool, cached = cached_pool(4, [b"a", b"b"])
    blank = pool.allocate(2)
    pool.free(blank)
    pool.free(cached)
    assert sorted(pool.allocate(2)) == sorted(blank)
    assert pool.evictions == 0


def test_the_tail_of_a_run_is_evicted_before_its_head():
    pool, blocks = cached_pool(3, [b"head", b"middle", b"tail"])
    pool.free(blocks)
    pool.allocate(2)
    assert pool.peek(b"head") == blocks[0]
    assert pool.peek(b"middle") is None
    assert pool.peek(b"tail") is None


def test_the_least_recently_freed_run_is_evicted_first_and_a_hit_renews():
    pool, (a, b, c) = cached_pool(3, [b"a", b"b", b"c"])
    for block_id in (a, b, c):
        pool.free([block_id])
    assert pool.acquire(b"a") == a
    pool.free([a])
    assert pool.allocate(2) == [b, c]
    assert pool.peek(b"a") == a


def test_a_second_block_for_a_key_stays_unknown_and_the_first_is_kept():
    pool = BlockPool(3, 16)
    first, second = pool.allocate(2)
    assert pool.insert(b"k", first)
    assert not pool.insert(b"k", second)
    assert not pool.insert(b"other", first)
    assert pool.peek(b"k") == first
    pool.free([first, second])
    pool.check_integrity()
    assert pool.num_cached == 1


def test_a_shared_block_is_used_until_its_last_user_frees_it():
    pool, blocks = cached_pool(2, [b"a"])
    pool.incref(blocks)
    assert pool.acquire(b"a") == blocks[0]
    for users in (3, 2, 1):
        assert pool.ref_count(blocks[0]) == users
        assert pool.num_free == 1
        pool.free(blocks)
    assert pool.num_free == 2
    pool.incref(blocks)  # a free cached block may be taken back by number as well
    assert pool.num_free == 1
    pool.check_integrity()


def test_freeing_twice_and_reviving_or_caching_a_free_block_are_refused():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(InvariantViolation, match="nobody uses it"):
        pool.free(blocks)
    with pytest.raises(InvariantViolation, match="has no key"):
        pool.incref(blocks)
    with pytest.raises(InvariantViolation, match="nobody uses it"):
        pool.insert(b"k", blocks[0])
    pool.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size", "param"), [(0, 16, "num_blocks"), (4, 0, "block_size")])
def test_a_pool_without_room_is_refused(num_blocks, block_size, param):
    with pytest.raises(InvalidRequest) as caught:
        BlockPool(num_blocks, block_size)
    assert caught.value.param == param


@pytest.mark.parametrize("damage", ["leak", "double", "key", "map"])
def test_the_integrity_check_sees_damage(damage):
    pool, blocks = cached_pool(4, [b"a", b"b"])
    pool.check_integrity()
    if damage == "leak":
        pool._ref_counts[blocks[0]] = 0
    elif damage == "double":
        pool._free_blank.append(blocks[0])
    elif damage == "key":
        pool._keys[blocks[0]] = b"x"
    else:
        pool._cached[b"z"] = blocks[1]
    with pytest.raises(InvariantViolation):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of calls, beside a model of plain lists that is too simple to be wrong."""

    NUM_BLOCKS = 7
    keys = st.sampled_from([bytes([n]) for n in range(9)])

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS, 4)
        self.users: dict[int, int] = dict.fromkeys(range(self.NUM_BLOCKS), 0)
        self.key_of: dict[int, bytes] = {}
        self.freed: list[int] = []  # cached free blocks, least recently freed first
        self.runs: list[list[int]] = []  # what somebody holds

    @rule(n=st.integers(0, 4))
    def allocate(self, n):
        blank = {b for b, users in self.users.items() if users == 0 and b not in self.key_of}
        got = self.pool.allocate(n)
        if n > len(blank) + len(self.freed):
            assert got is None
            return
        assert len(set(got)) == n
        from_cache = max(0, n - len(blank))
        assert [b for b in got if b not in blank] == self.freed[:from_cache]
        for block_id in self.freed[:from_cache]:
            del self.key_of[block_id]
        del self.freed[:from_cache]
        for block_id in got:
            self.users[block_id] = 1
        if n:
            self.runs.append(got)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def free(self, data):
        run = self.runs.pop(data.draw(st.integers(0, len(self.runs) - 1)))
        self.pool.free(run)
        for block_id in reversed(run):
            self.users[block_id] -= 1
            if self.users[block_id] == 0 and block_id in self.key_of:
                self.freed.append(block_id)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def share(self, data):
        run = self.runs[data.draw(st.integers(0, len(self.runs) - 1))]
        self.pool.incref(run)
        for block_id in run:
            self.users[block_id] += 1
        self.runs.append(list(run))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), key=keys)
    def insert(self, data, key):
        run = self.runs[data.draw(st.integers(0, len(self.runs) - 1))]
        block_id = run[data.draw(st.integers(0, len(run) - 1))]
        is_new = key not in self.key_of.values() and block_id not in self.key_of
        assert self.pool.insert(key, block_id) == is_new
        if is_new:
            self.key_of[block_id] = key

    @rule(key=keys)
    def acquire(self, key):
        expected = next((b for b, k in self.key_of.items() if k == key), None)
        assert self.pool.peek(key) == expected
        assert self.pool.acquire(key) == expected
        if expected is not None:
            if self.users[expected] == 0:
                self.freed.remove(expected)
            self.users[expected] += 1
            self.runs.append([expected])

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check_integrity()
        assert {b: self.pool.ref_count(b) for b in self.users} == self.users
        assert self.pool.num_used == sum(users > 0 for users in self.users.values())
        assert self.pool.num_free + self.pool.num_used == self.NUM_BLOCKS
        assert self.pool.num_cached == len(self.key_of)

    def teardown(self):
        for run in self.runs:
            self.pool.free(run)
        assert self.pool.num_free == self.NUM_BLOCKS
        self.pool.check_integrity()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
