"""Measures of an order: nDCG, and what a difference of means is worth.

Knows grades in the order that was given; does not know who ordered them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PairedDifference", "ndcg", "paired_bootstrap", "ranked_grades"]


def ndcg(grades: Sequence[float], ideal: Sequence[float] | None = None, k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first `k`, gain 2^grade - 1, discount log2(1 + place).

    `grades` in the order that is judged; `ideal`: all grades there are, where the order holds only some of them. 0 where
    nothing is relevant. Source: Järvelin and Kekäläinen 2002, with the exponential gain of Burges et al. 2005
    """
    best = _dcg(sorted(grades if ideal is None else ideal, reverse=True), k)
    return _dcg(grades, k) / best if best > 0 else 0.0


def _dcg(grades: Sequence[float], k: int) -> float:
    return math.fsum((2.0**g - 1) / math.log2(place + 2) for place, g in enumerate(grades[:k]))


def ranked_grades(scores: Sequence[float], grades: Sequence[float]) -> list[float]:
    """The grades in the order of falling scores, ties by position."""
    return [grades[i] for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i))]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `ours - theirs` over the same queries, with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float
    num_queries: int


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float = 0.95, rounds: int = 2000, seed: int = 0
) -> PairedDifference:
    """The percentile interval of the mean difference when queries are drawn again with replacement. A function of `seed`."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} values against {len(theirs)}")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    rng, n = random.Random(seed), len(differences)
    means = sorted(math.fsum(rng.choices(differences, k=n)) / n for _ in range(rounds))
    tail = (1 - confidence) / 2
    low, high = means[int(tail * rounds)], means[min(rounds - 1, int((1 - tail) * rounds))]
    return PairedDifference(math.fsum(differences) / n, low, high, n)
