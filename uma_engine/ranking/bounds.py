"""How far a cheap score may lie from the whole one: bounds fitted on pairs of both, and what they allow to be left out.

Knows margins and quantiles; does not know how either score was computed. A margin is the first label's logit over the log-sum-exp of
the others: the log-odds of the score, in whose order candidates are ranked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uma_engine.errors import CorruptFile, InvalidRequest

__all__ = ["Bounds", "fit_bounds", "load_bounds", "margin"]


def margin(logits: Sequence[float]) -> float:
    """Log-odds of the first label among the labels."""
    first, *others = logits
    top = max(others)
    return first - top - math.log(math.fsum(math.exp(x - top) for x in others))


@dataclass(frozen=True, slots=True)
class Bounds:
    """The whole margin of a candidate lies in [cheap + low, cheap + high] for `confidence` of the pairs of the fit, both ends taken
    together. `prefix_tokens`: of the candidate's text, that the cheap score reads; 0: it reads nothing, and the cheap margin is 0."""

    prefix_tokens: int
    low: float
    high: float
    confidence: float
    num_pairs: int
    base_digest: str = ""
    adapter_digest: str | None = None

    def __post_init__(self) -> None:
        for name in ("prefix_tokens", "num_pairs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidRequest(f"`{name}` of the bounds is `{value!r}`", param="cascade")
        for name in ("low", "high", "confidence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidRequest(f"`{name}` of the bounds is `{value!r}`", param="cascade")
        if self.low > self.high or not 0 < self.confidence <= 1:
            raise InvalidRequest(
                f"bounds from {self.low} to {self.high} at confidence {self.confidence}",
                hint="`low` is at most `high`, and the confidence above 0 and at most 1",
                param="cascade",
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


def load_bounds(given: Bounds | Mapping[str, Any] | str | Path) -> Bounds:
    """Bounds, their plain data, or their JSON file. Errors: CorruptFile, InvalidRequest"""
    if isinstance(given, Bounds):
        return given
    data: Any = given
    if isinstance(given, str | Path):
        try:
            data = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise CorruptFile(f"the bounds `{given}` cannot be read: {error}") from None
    if not isinstance(data, Mapping) or not set(data) <= set(Bounds.__slots__):
        raise InvalidRequest(
            f"`cascade` is `{data!r:.80}`", hint=f"it has the keys {', '.join(Bounds.__slots__)}", param="cascade"
        )
    try:
        return Bounds(**data)
    except TypeError as error:
        raise InvalidRequest(f"`cascade` is incomplete: {error}", param="cascade") from None


def fit_bounds(
    cheap: Sequence[float],
    whole: Sequence[float],
    prefix_tokens: int,
    confidence: float = 0.95,
    base_digest: str = "",
    adapter_digest: str | None = None,
) -> Bounds:
    """The quantiles of whole - cheap between which `confidence` of the pairs lie, as many left out at either end. Conformal: the ends
    are order statistics, moved outwards by one, so that a new pair drawn as these were lies inside with at least that chance.

    Errors:  InvalidRequest for fewer pairs than such a confidence can come from
    """
    if not 0 < confidence < 1:
        raise InvalidRequest(f"`confidence` is {confidence} but must lie between 0 and 1", param="confidence")
    differences = sorted(w - c for c, w in zip(cheap, whole, strict=True))
    count = len(differences)
    outside = math.floor((count + 1) * (1 - confidence) / 2)
    if outside < 1:
        least = math.ceil(2 / (1 - confidence)) - 1
        raise InvalidRequest(
            f"{count} pairs say nothing of a confidence of {confidence}", hint=f"give at least {least}"
        )
    return Bounds(
        prefix_tokens,
        differences[outside - 1],
        differences[count - outside],
        confidence,
        count,
        base_digest,
        adapter_digest,
    )
