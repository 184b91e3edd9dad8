"""nDCG and the paired bootstrap, against values worked out by hand and against their definitions."""

from __future__ import annotations

import math

import pytest

from uma_engine.ranking.metrics import ndcg, paired_bootstrap, ranked_grades


def test_ndcg_of_a_worked_example():
    # gains 7, 3, 0, 1 at discounts log2 2, 3, 4, 5
    dcg = 3 / math.log2(2) + 7 / math.log2(3) + 0 + 1 / math.log2(5)
    best = 7 / math.log2(2) + 3 / math.log2(3) + 1 / math.log2(4)
    assert ndcg([2, 3, 0, 1]) == pytest.approx(dcg / best)


def test_ndcg_knows_what_the_order_lacks():
    assert ndcg([3, 0], ideal=[3, 3, 0]) == pytest.approx(7 / (7 + 7 / math.log2(3)))
    assert ndcg([0, 0]) == 0.0
    assert ndcg([], ideal=[1]) == 0.0


def test_only_the_first_k_count():
    assert ndcg([0] * 10 + [3], k=10) == 0.0
    assert ndcg([0] * 10 + [3], k=11) > 0


def test_ties_keep_their_order():
    assert ranked_grades([0.5, 0.9, 0.5, 0.9], [1, 2, 3, 0]) == [2, 0, 1, 3]


def test_the_bootstrap_finds_a_difference_and_none():
    better = paired_bootstrap([0.6 + 0.01 * (i % 5) for i in range(60)], [0.5 + 0.02 * (i % 3) for i in range(60)])
    assert better.low > 0
    assert better.num_queries == 60
    same = paired_bootstrap([0.5, 0.7] * 30, [0.7, 0.5] * 30)
    assert same.mean == pytest.approx(0, abs=1e-12)
    assert same.low < 0 < same.high
    assert paired_bootstrap([1, 2], [0, 0], seed=3) == paired_bootstrap([1, 2], [0, 0], seed=3)
    with pytest.raises(ValueError, match="against"):
        paired_bootstrap([1], [1, 2])
