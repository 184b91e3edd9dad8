"""Keys name everything that a block depends on, and matches stop where something must still be computed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_harness import generate_request, rank_request, score_request

from uma_engine.core import NO_PARENT, Request
from uma_engine.errors import InvalidRequest
from uma_engine.kv_cache import BlockPool, PrefixCache

SIZE = 4


def keys_of(request: Request, index: int = 0) -> list[bytes]:
    cache = PrefixCache(BlockPool(8, SIZE))
    for segment_index in range(index + 1):  # parents first, as the scheduler does
        keys = cache.keys(request, segment_index, len(request.segments[segment_index]))
    return keys


def root_keys(tokens: list[int], **options) -> list[bytes]:
    return keys_of(rank_request("r", tokens, [[1]], **options))


def compute(cache: PrefixCache, request: Request, index: int = 0, num_tokens: int | None = None) -> list[int]:
    """What the scheduler does when it computes a segment from the start."""
    segment = request.segments[index]
    end = len(segment) if num_tokens is None else num_tokens
    blocks = cache.pool.allocate(-(-end // SIZE))
    segment.block_ids = list(blocks)
    segment.num_computed_tokens = end
    cache.insert(request, index, 0, end)
    return blocks


def test_equal_tokens_have_equal_keys_and_a_longer_segment_begins_with_them():
    short, long = root_keys(list(range(8))), root_keys(list(range(15)))
    assert short == root_keys(list(range(8)))
    assert long[:2] == short
    assert len(long) == 4
    assert all(len(key) == 16 for key in long)


def test_a_key_depends_on_every_token_before_it_and_on_the_root():
    tokens = list(range(8))
    assert root_keys([9, *tokens[1:]])[1] != root_keys(tokens)[1]
    assert root_keys(tokens, cache_root=b"adapter")[0] != root_keys(tokens)[0]


def test_a_partial_tail_is_neither_a_full_block_nor_a_tail_of_another_length():
    tails = [root_keys([7] * n)[0] for n in range(1, SIZE + 1)]
    assert len(set(tails)) == SIZE
    # the bytes of a key cannot be mistaken for tokens: a root that looks like the beginning of a chain is another root
    assert root_keys([7] * SIZE)[0] != root_keys([7], cache_root=bytes([1]) + b"\x07\x00\x00\x00" * 3)[0]


def test_a_child_chains_from_the_end_of_its_parent():
    def child_key(parent_tokens, tokens):
        return keys_of(rank_request("r", parent_tokens, [tokens]), 1)[0]

    child = [1, 2, 3, 4]
    assert child_key([5] * 4, child) == child_key([5] * 4, child)
    parents = [[5] * 3, [5] * 4, [5] * 5, [6] * 4, [5] * 8]
    assert len({child_key(parent, child) for parent in parents}) == len(parents)


def test_the_same_run_of_tokens_cut_into_other_segments_has_other_keys():
    tokens = list(range(12))
    whole = root_keys(tokens)
    assert keys_of(rank_request("r", tokens[:8], [tokens[8:]]), 1)[0] != whole[2]
    assert keys_of(rank_request("r", tokens[:6], [tokens[6:]]), 1)[0] not in whole


def test_a_segment_that_grows_has_keys_for_full_blocks_only_and_shares_them_with_trees():
    grown = generate_request("g", list(range(10)))
    assert keys_of(grown) == root_keys(list(range(10)))[:2]
    grown.segments[0].token_ids += [10, 11]
    assert keys_of(grown) == root_keys(list(range(12)))


def test_a_segment_without_output_is_reused_whole_with_its_tail():
    cache = PrefixCache(BlockPool(8, SIZE))
    blocks = compute(cache, rank_request("a", list(range(10)), [[1]]))
    twin = rank_request("b", list(range(10)), [[2]])
    assert cache.extend(twin, 0, needs_output=False) == 10
    assert twin.segments[0].block_ids == blocks
    assert twin.segments[0].done
    assert twin.segments[0].num_cached_tokens == 10
    assert [cache.pool.ref_count(b) for b in blocks] == [2, 2, 2]


@pytest.mark.parametrize(("num_tokens", "reused"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_segment_with_output_stops_before_the_block_of_its_last_token(num_tokens, reused):
    cache = PrefixCache(BlockPool(8, SIZE))
    tokens = list(range(num_tokens))
    compute(cache, rank_request("a", tokens, [[1]]))
    for request in (generate_request("g", tokens), score_request("s", [(tokens, NO_PARENT, True)])):
        assert cache.extend(request, 0, needs_output=True) == reused
        assert request.segments[0].num_computed_tokens == reused


def test_only_blocks_that_are_computed_to_the_end_are_found():
    cache = PrefixCache(BlockPool(8, SIZE))
    first = rank_request("a", list(range(10)), [[1]])
    compute(cache, first, num_tokens=7)
    twin = rank_request("b", list(range(10)), [[2]])
    assert cache.extend(twin, 0, needs_output=False) == SIZE
    # the first goes on to its end; the second follows where it stands, at a block's end
    first.segments[0].block_ids += cache.pool.allocate(1)
    cache.insert(first, 0, 7, 10)
    assert cache.extend(twin, 0, needs_output=False) == 6
    assert twin.segments[0].block_ids == first.segments[0].block_ids


def test_a_segment_in_the_middle_of_a_block_is_not_extended():
    cache = PrefixCache(BlockPool(8, SIZE))
    compute(cache, rank_request("a", list(range(12)), [[1]]))
    other = rank_request("b", list(range(12)), [[2]])
    other.segments[0].block_ids = cache.pool.allocate(1)
    other.segments[0].num_computed_tokens = 3
    assert cache.extend(other, 0, needs_output=False) == 0
    assert len(other.segments[0].block_ids) == 1


def test_a_shorter_twin_does_not_take_a_longer_ones_block_as_its_tail():
    cache = PrefixCache(BlockPool(8, SIZE))
    compute(cache, rank_request("a", list(range(12)), [[1]]))
    shorter = rank_request("b", list(range(10)), [[2]])
    assert cache.extend(shorter, 0, needs_output=False) == 8


def test_blocks_needed_for_a_segment_do_not_count_those_in_use():
    cache = PrefixCache(BlockPool(8, SIZE))
    blocks = compute(cache, rank_request("a", list(range(10)), [[1]]))
    twin = rank_request("b", list(range(10)), [[2]])
    assert cache.num_blocks_to_allocate(twin, 0, needs_output=False) == 0
    assert cache.num_blocks_to_allocate(generate_request("g", list(range(10))), 0, needs_output=True) == 1
    cache.pool.free(blocks)
    assert cache.num_blocks_to_allocate(twin, 0, needs_output=False) == 3
    assert (cache.pool.hits, cache.pool.misses) == (0, 0)


def test_a_disabled_cache_finds_and_remembers_nothing():
    cache = PrefixCache(BlockPool(8, SIZE), enabled=False)
    compute(cache, rank_request("a", list(range(10)), [[1]]))
    twin = rank_request("b", list(range(10)), [[2]])
    assert cache.extend(twin, 0, needs_output=False) == 0
    assert cache.pool.num_cached == 0
    assert cache.num_blocks_to_allocate(twin, 0, needs_output=False) == 3
    assert twin.segments[0].cached_keys == []


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 1.5, None, "a"])
def test_a_token_that_is_no_32_bit_integer_is_refused(token):
    with pytest.raises(InvalidRequest, match="32-bit"):
        root_keys([1, 2, token, 4])


tree_shapes = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(0, 3)), min_size=1, max_size=4
)


def chain_of(shape) -> Request:
    """A single path of segments."""
    tree = [(tokens, index - 1, False) for index, (tokens, _) in enumerate(shape)]
    return score_request("r", [*tree, ([1], len(tree) - 1, True)], cache_root=bytes([shape[0][1]]))


@settings(max_examples=150, deadline=None)
@given(shapes=st.lists(tree_shapes, min_size=2, max_size=5))
def test_two_blocks_have_one_key_exactly_when_all_that_came_before_is_equal(shapes):
    meaning_of: dict[bytes, tuple] = {}
    for shape in shapes:
        request = chain_of(shape)
        for index, (tokens, _) in enumerate(shape):
            keys = keys_of(chain_of(shape), index)
            for position, key in enumerate(keys):
                before = tuple(tuple(t) for t, _ in shape[:index])
                block = tuple(tokens[: (position + 1) * SIZE])
                meaning = (request.cache_root, before, block)
                assert meaning_of.setdefault(key, meaning) == meaning
    meanings = list(meaning_of.values())
    assert all(a != b for a, b in itertools.combinations(meanings, 2))
