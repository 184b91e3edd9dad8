"""Rotary embedding: every back end against fp64 and complex multiplication, in place, and row by row; with norms and the way into the
cache it has the bits of the three ops.
"""

from __future__ import annotations

import pytest
import torch

from uma_kernels import dispatch, kv_cache
from uma_kernels.check import ShapeError
from uma_kernels.norm import rms_norm
from uma_kernels.rope import norm_rope, norm_rope_write, rope, rotary_table
from uma_kernels.rope.cases import CASES, RopeCase
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels

POSITIONS = 500


def frequencies(head_dim: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotated(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each pair (x[i], x[i + D / 2]) as a complex number times cos + i sin, in the dtype of x."""
    half = x.shape[-1] // 2
    turn = torch.complex(*table.to(x.dtype)[positions].split(half, dim=-1))[:, None, :]
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_rope_matches_fp64_in_place_and_each_row_stands_alone(case: RopeCase, backend: str) -> None:
    table = rotary_table(frequencies(case.head_dim), POSITIONS)
    positions = torch.randint(0, POSITIONS, (case.tokens,))
    q = torch.randn(case.tokens, case.heads, case.head_dim)
    k = torch.randn(case.tokens, case.kv_heads, case.head_dim)
    with with_sentinels(q.shape) as q_out, with_sentinels(k.shape) as k_out:
        q_out.copy_(q)
        k_out.copy_(k)
        rope(q_out, k_out, positions, table)
        for out, x in ((q_out, q), (k_out, k)):
            assert_reduction(out, rotated(x, positions, table), rotated(x.double(), positions, table))
    if case.tokens:
        row = slice(case.tokens // 2, case.tokens // 2 + 1)
        alone_q, alone_k = q[row].clone(), k[row].clone()
        rope(alone_q, alone_k, positions[row], table)
        assert_invariant(alone_q, q_out[row])
        assert_invariant(alone_k, k_out[row])


def test_the_table_is_cos_and_sin_of_the_rounded_angle() -> None:
    inv_freq = frequencies(8)
    table = rotary_table(inv_freq, 7)
    angles = torch.arange(7, dtype=torch.float32)[:, None] * inv_freq
    assert_exact(table, torch.cat((angles.cos(), angles.sin()), dim=1))
    assert rotary_table(inv_freq, 0).shape == (0, 8)


def test_positions_outside_the_table_are_refused_before_anything_is_rotated(backend: str) -> None:
    table = rotary_table(frequencies(8), 4)
    for bad in (4, -1):
        q, k = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
        before = q.clone()
        with pytest.raises(IndexError):
            rope(q, k, torch.tensor([0, bad]), table)
        assert_exact(q, before)


def test_wrong_shapes_are_refused() -> None:
    table = rotary_table(frequencies(8), 4)
    q, k, positions = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.zeros(2, dtype=torch.int64)
    for args in (
        (torch.zeros(2, 2, 6), k, positions, table),
        (q, torch.zeros(3, 1, 8), positions, table),
        (q, k, positions.int(), table),
        (q, k, positions, torch.zeros(4, 6)),
        (torch.zeros(2, 2, 7), torch.zeros(2, 1, 7), positions, torch.zeros(4, 7)),
    ):
        with pytest.raises(ShapeError):
            rope(*args)


FUSED = [(0, 2, 1, 8), (1, 1, 1, 2), (3, 2, 1, 6), (5, 20, 4, 80), (1, 32, 8, 128), (4, 9, 3, 64), (2, 4, 18, 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [(False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), FUSED)
def test_norms_rotation_and_writing_have_the_bits_of_the_three_ops(
    tokens: int, heads: int, kv_heads: int, head_dim: int, normed: tuple[bool, bool], dtype: torch.dtype, backend: str
) -> None:
    """Heads side by side in one row, as a projection gives them; some rows are kept in the cache and some are not."""
    if dtype is not torch.float32 and backend == "cpp":
        pytest.skip("compiled CPU kernels take fp32 alone")
    table, positions = rotary_table(frequencies(head_dim), POSITIONS), torch.randint(0, POSITIONS, (tokens,))
    joined = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    norms = tuple((torch.randn(head_dim).to(dtype), 1e-6) if wanted else None for wanted in normed)
    slots = torch.randperm(2 * tokens + 3)[:tokens].int()
    slots[1::3] = -1
    caches = torch.randn(2, 2 * tokens + 3, kv_heads, head_dim).to(dtype)

    def parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]

    expected, (k_expected, v_expected) = joined.clone(), caches.clone()
    q, k, v = parts(expected)
    for x, norm in zip((q, k), norms, strict=True):
        if norm is not None:
            rms_norm(x, *norm, x)
    rope(q, k, positions, table)
    kv_cache.write(k, v, k_expected, v_expected, slots)

    def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if backend == "triton" and not dispatch.interpreted() and any(normed):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        else:
            assert_exact(ours, theirs)

    found, (k_cache, v_cache) = joined.clone(), caches.clone()
    norm_rope_write(*parts(found), positions, table, k_cache, v_cache, slots, norms)
    assert_same(k_cache, k_expected)
    assert_exact(v_cache, v_expected)
    assert_same(found[:, :heads], expected[:, :heads])
    assert_same(found[slots < 0], expected[slots < 0])
    assert_exact(parts(found)[2], parts(joined)[2])

    apart, kept = joined.clone(), torch.zeros(2, *caches.shape[1:], dtype=dtype)
    norm_rope(parts(apart)[0], positions, table, norms[0])
    assert_invariant(apart[:, :heads], found[:, :heads])
    assert_exact(apart[:, heads:], joined[:, heads:])
    norm_rope_write(
        apart[:, :0], *parts(apart)[1:], positions, table, kept[0], kept[1], torch.full_like(slots, -1), norms
    )
    assert_invariant(parts(apart)[1][slots < 0], parts(found)[1][slots < 0])
    assert not kept.any()


def test_positions_and_slots_outside_are_refused_and_wrong_shapes(backend: str) -> None:
    table, cache = rotary_table(frequencies(8), 4), torch.zeros(3, 1, 8)
    q, k = torch.randn(2, 2, 8), torch.randn(2, 1, 8)
    at, slots = torch.tensor([0, 1]), torch.tensor([0, 1], dtype=torch.int32)
    for positions, mapping in ((torch.tensor([0, 4]), slots), (at, torch.tensor([0, 3], dtype=torch.int32))):
        with pytest.raises(IndexError):
            norm_rope_write(q, k, k, positions, table, cache, cache.clone(), mapping)
    with pytest.raises(IndexError):
        norm_rope(q, torch.tensor([-1, 0]), table, None)
    assert not cache.any()
    for args in (
        (q, k, k[:, :, :4], at, table, cache, cache, slots),
        (q, torch.randn(3, 1, 8), k, at, table, cache, cache, slots),
        (q, k, k, at.int(), table, cache, cache, slots),
        (q, k, k, at, table, cache, cache[:2], slots),
        (q, k, k, at, table, cache, cache, slots.long()),
    ):
        with pytest.raises(ShapeError):
            norm_rope_write(*args)
    with pytest.raises(ShapeError):
        norm_rope(q, at, table, (torch.ones(4), 1e-6))
