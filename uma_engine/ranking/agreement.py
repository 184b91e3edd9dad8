"""How much two orders of the same people agree, and what a count of rare events allows to say.

Knows scores and counts; does not know who was ranked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

__all__ = ["kendall_tau", "overlap", "upper_bound"]


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b of two score lists, which counts ties for neither side. 1.0 where one list or the other holds only ties."""
    concordant = ties_a = ties_b = 0
    n = len(a)
    for i in range(n):
        for j in range(i + 1, n):
            x = (a[i] > a[j]) - (a[i] < a[j])
            y = (b[i] > b[j]) - (b[i] < b[j])
            concordant += x * y
            ties_a += not x
            ties_b += not y
    pairs = n * (n - 1) // 2
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return concordant / scale if scale else 1.0


def overlap(a: Collection[int], b: Collection[int]) -> float:
    """Share of `a` that is also in `b`; 1.0 for none."""
    return len(set(a) & set(b)) / len(a) if a else 1.0


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """The largest rate under which so few events are not surprising: Clopper and Pearson's one-sided bound.

    0 of 600 gives 0.005: nothing seen is not nothing there.
    """
    if events >= trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        at_most = math.fsum(
            math.exp(
                math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
                + k * math.log(rate) + (trials - k) * math.log1p(-rate)
            )
            for k in range(events + 1)
        )  # fmt: skip
        if at_most > 1 - confidence:
            low = rate
        else:
            high = rate
    return high
