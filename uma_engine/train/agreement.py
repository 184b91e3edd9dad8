"""How much people agree who marked the same things: Cohen's and Fleiss' kappa, Krippendorff's alpha.

Knows marks; does not know what was marked. Tested against the worked examples of the papers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

__all__ = ["Level", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha"]

Level = Literal["nominal", "ordinal", "interval", "ratio"]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Two who marked everything (Cohen 1960). 1: always the same; 0: as by chance."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} marks against {len(second)}")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    a, b = Counter(first), Counter(second)
    chance = sum(a[value] * b[value] for value in a) / n**2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Things that all have the same number of marks, by whomever (Fleiss 1971); `counts[thing][category]`."""
    marks = sum(counts[0])
    if marks < 2 or any(sum(row) != marks for row in counts):
        raise ValueError("every thing needs the same number of marks, at least two")
    shares = [sum(column) / (len(counts) * marks) for column in zip(*counts, strict=True)]
    chance = sum(share**2 for share in shares)
    observed = sum((sum(x * x for x in row) - marks) / (marks * (marks - 1)) for row in counts) / len(counts)
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "ordinal") -> float:
    """Any number of marks a thing, missing ones left out (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Things with fewer than two marks say nothing. Errors: ValueError where nothing can be compared
    """
    paired = [list(unit) for unit in units if len(unit) > 1]
    together: dict[tuple[float, float], float] = defaultdict(float)
    for unit in paired:
        for i, a in enumerate(unit):
            for j, b in enumerate(unit):
                if i != j:
                    together[a, b] += 1 / (len(unit) - 1)
    totals: dict[float, float] = defaultdict(float)
    for (a, _), count in together.items():
        totals[a] += count
    n = sum(totals.values())
    if n < 2:
        raise ValueError("nothing was marked twice")
    values = sorted(totals)

    def distance(a: float, b: float) -> float:
        if a == b:
            return 0.0
        if level == "nominal":
            return 1.0
        if level == "interval":
            return (a - b) ** 2
        if level == "ratio":
            return ((a - b) / (a + b)) ** 2
        low, high = sorted((a, b))
        between = sum(totals[v] for v in values if low <= v <= high)
        return (between - (totals[low] + totals[high]) / 2) ** 2

    observed = sum(count * distance(a, b) for (a, b), count in together.items()) / n
    expected = sum(totals[a] * totals[b] * distance(a, b) for a in values for b in values) / (n * (n - 1))
    return 1.0 if expected == 0 else 1 - observed / expected
