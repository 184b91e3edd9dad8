"""Cache moves: exact, only where asked, and refused as a whole when a slot is out of range."""

from __future__ import annotations

import pytest
import torch

from uma_kernels import kv_cache
from uma_kernels.check import ShapeError
from uma_kernels.kv_cache.cases import CASES, KvCacheCase
from uma_kernels.testing import assert_exact


def slots_of(case: KvCacheCase) -> torch.Tensor:
    return torch.randperm(case.slots)[: case.tokens].int()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_write_puts_each_row_in_its_slot_and_skips_minus_one(case: KvCacheCase, backend: str) -> None:
    k, v = torch.randn(2, case.tokens, case.kv_heads, case.head_dim)
    k_cache, v_cache = torch.randn(2, case.slots, case.kv_heads, case.head_dim)
    slots = slots_of(case)
    slots[1::3] = -1
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_k[slot], expected_v[slot] = k[t], v[t]
    kv_cache.write(k, v, k_cache, v_cache, slots)
    assert_exact(k_cache, expected_k)
    assert_exact(v_cache, expected_v)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gather_reads_what_write_wrote(case: KvCacheCase, backend: str) -> None:
    k, v = torch.randn(2, case.tokens, case.kv_heads, case.head_dim)
    k_cache, v_cache = torch.full((2, case.slots, case.kv_heads, case.head_dim), float("nan"))
    slots = slots_of(case)
    kv_cache.write(k, v, k_cache, v_cache, slots)
    assert_exact(kv_cache.gather(k_cache, slots), k)
    assert_exact(kv_cache.gather(v_cache, slots.flip(0)), v.flip(0))


def test_copy_reads_every_source_before_it_writes(backend: str) -> None:
    k_cache, v_cache = torch.randn(2, 6, 2, 8)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    src, dst = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 2, 0], dtype=torch.int32)
    kv_cache.copy(k_cache, v_cache, src, dst)
    for cache, before in ((k_cache, before_k), (v_cache, before_v)):
        assert_exact(cache[[1, 2, 0]], before[[0, 1, 2]])
        assert_exact(cache[3:], before[3:])


def test_slots_out_of_range_are_refused_and_nothing_is_written(backend: str) -> None:
    k = torch.randn(2, 1, 8)
    cache = torch.randn(3, 1, 8)
    before = cache.clone()
    for slots in ([0, 3], [0, -2]):
        with pytest.raises(IndexError):
            kv_cache.write(k, k, cache, cache, torch.tensor(slots, dtype=torch.int32))
    for slots in ([0, 3], [0, -1]):
        with pytest.raises(IndexError):
            kv_cache.gather(cache, torch.tensor(slots, dtype=torch.int32))
        with pytest.raises(IndexError):
            kv_cache.copy(cache, cache, torch.tensor(slots, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    assert_exact(cache, before)


def test_wrong_shapes_are_refused() -> None:
    k, cache, slots = torch.zeros(2, 1, 8), torch.zeros(3, 1, 8), torch.zeros(2, dtype=torch.int32)
    for args in (
        (k, torch.zeros(2, 2, 8), cache, cache, slots),
        (torch.zeros(2, 1, 4), k, cache, cache, slots),
        (k, k, cache, torch.zeros(4, 1, 8), slots),
        (k, k, cache, cache, slots.long()),
        (k, k, cache, cache, slots[:1]),
    ):
        with pytest.raises(ShapeError):
            kv_cache.write(*args)
    with pytest.raises(ShapeError):
        kv_cache.copy(cache, cache, slots, slots[:1])
