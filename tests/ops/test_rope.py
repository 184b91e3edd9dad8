"""Rotary embedding: every back end against fp64 and complex multiplication, in place, and row by row."""

from __future__ import annotations

import pytest
import torch

from uma_kernels.check import ShapeError
from uma_kernels.rope import rope, rotary_table
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
