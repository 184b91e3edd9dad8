"""The ledger of a score and the arithmetic that turns it into one.

Knows values and weights; does not know where they come from. The arithmetic is plain IEEE doubles in declared order, so that
whoever has the ledger recomputes the score in a few lines of any language, difference exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["AGGREGATES", "Aggregate", "Factor", "LedgerLine", "aggregate"]

Aggregate = Literal["mean", "product"]
AGGREGATES: tuple[Aggregate, ...] = ("mean", "product")


@dataclass(frozen=True, slots=True)
class Factor:
    """One line of the ledger: a value, its weight in the score and what it contributed."""

    name: str
    value: float
    weight: float
    contribution: float


@dataclass(frozen=True, slots=True)
class LedgerLine(Factor):
    """A factor of a surface.

    `kind` is `fact` or `read`. `raw` is what came before the curve or the calibration: a fact's number (a ratio where it is
    measured against the job), a read's probability as the model gave it. `source` is the fact's field, or the adapter that
    read (None: the base). `logits` are a read's, in the order of its labels.
    """

    kind: Literal["fact", "read"]
    missing: bool
    source: str | None
    raw: float | None
    logits: tuple[float, ...] = ()


def aggregate(kind: Aggregate, values: Sequence[float], weights: Sequence[float]) -> tuple[float, list[float]]:
    """The score and each factor's contribution to it.

    Semantics:  mean: contribution = weight * value / W, W being the weights added up in order; score = the contributions
                added up in order, at most 1. product: contribution = 1 - weight * (1 - value); score = their product in
                order: a factor of weight 1 whose value is 0 rules out whatever the others say.
    Numerics:   doubles, one rounding an operation, in the order of the ledger: monotone in every value, to the bit.
    """
    if kind == "product":
        score = 1.0
        factors = [1.0 - w * (1.0 - v) for v, w in zip(values, weights, strict=True)]
        for factor in factors:
            score *= factor
        return score, factors
    total = 0.0
    for weight in weights:
        total += weight
    contributions = [w * v / total for v, w in zip(values, weights, strict=True)]
    score = 0.0
    for contribution in contributions:
        score += contribution
    return min(1.0, score), contributions
