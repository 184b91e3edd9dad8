"""Fact factors: pure, monotone, saturating functions of typed numbers.

Knows numbers and declared curves; does not know models, texts or where facts come from. A curve is monotone in IEEE
doubles, not only on paper: each step of it is one correctly rounded operation, and rounding never changes an order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from uma_engine.errors import InvalidRequest, SurfaceError

__all__ = ["Curve", "Fact", "Linear", "Measured", "Points", "Saturating", "as_number", "curve_from", "interpolate"]


@dataclass(frozen=True, slots=True)
class Linear:
    """0 at `worst` and beyond, 1 at `best` and beyond, a straight line between. `worst` may be the larger number."""

    worst: float
    best: float
    keys: ClassVar[tuple[str, ...]] = ("worst", "best")

    def __post_init__(self) -> None:
        _finite("worst", self.worst)
        _finite("best", self.best)
        if self.worst == self.best or not math.isfinite(self.best - self.worst):
            raise SurfaceError(f"a line from `worst` {self.worst} to `best` {self.best} has no slope")

    def __call__(self, x: float) -> float:
        return min(1.0, max(0.0, (x - self.worst) / (self.best - self.worst)))

    @property
    def rising(self) -> bool:
        return self.best > self.worst

    def to_dict(self) -> dict[str, Any]:
        return {"worst": self.worst, "best": self.best}


@dataclass(frozen=True, slots=True)
class Saturating:
    """Of a number from 0 on: 1/2 at `half`; towards 1 as the number grows, or, if `falling`, from 1 at 0 towards 0."""

    half: float
    falling: bool = False
    keys: ClassVar[tuple[str, ...]] = ("half", "falling")

    def __post_init__(self) -> None:
        _finite("half", self.half)
        if self.half <= 0:
            raise SurfaceError(f"`half` is `{self.half}` but must be positive")
        if not isinstance(self.falling, bool):
            raise SurfaceError(f"`falling` is `{self.falling}` but must be true or false")

    def __call__(self, x: float) -> float:
        falls = self.half / (max(0.0, x) + self.half)  # not x / (x + half): there x stands twice, and rounding may dip
        return falls if self.falling else 1.0 - falls

    @property
    def rising(self) -> bool:
        return not self.falling

    def to_dict(self) -> dict[str, Any]:
        return {"half": self.half, "falling": self.falling}


@dataclass(frozen=True, slots=True)
class Points:
    """Straight lines through declared points, constant before the first and after the last: plateaus where differences
    mean nothing.
    """

    points: tuple[tuple[float, float], ...]
    keys: ClassVar[tuple[str, ...]] = ("points",)

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise SurfaceError(f"`points` has {len(self.points)} entries but a curve needs two")
        for x, y in self.points:
            _finite("points", x)
            if not 0.0 <= y <= 1.0:
                raise SurfaceError(f"`points` goes to `{y}` at `{x}` but values are from 0 to 1")
        if any(b[0] <= a[0] for a, b in pairwise(self.points)):
            raise SurfaceError("`points` must be in rising order of their first numbers")
        steps = [b[1] - a[1] for a, b in pairwise(self.points)]
        if not (all(s >= 0 for s in steps) or all(s <= 0 for s in steps)):
            raise SurfaceError(
                "`points` rises and falls", hint="a factor must be monotone: more is never worse, or never better"
            )
        if not any(steps):
            raise SurfaceError("`points` is flat: such a factor says nothing")

    def __call__(self, x: float) -> float:
        return interpolate(self.points, x)

    @property
    def rising(self) -> bool:
        return self.points[-1][1] > self.points[0][1]

    def to_dict(self) -> dict[str, Any]:
        return {"points": [list(p) for p in self.points]}


Curve = Linear | Saturating | Points


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The broken line through `points` at `x`, constant outside. Monotone where the points are, in every last bit."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x < x1:
            y = y0 + (y1 - y0) * ((x - x0) / (x1 - x0))
            return min(max(y, min(y0, y1)), max(y0, y1))  # rounding may not step over the next point
    return points[-1][1]


def curve_from(data: object) -> Curve:
    """A curve from a table: `{worst, best}`, `{half, falling}` or `{points}`. Errors: SurfaceError"""
    if isinstance(data, Linear | Saturating | Points):
        return data
    if isinstance(data, Mapping):
        if "points" in data and data.keys() <= {"points"}:
            points = data["points"]
            pairs = isinstance(points, list | tuple) and all(
                isinstance(p, list | tuple) and len(p) == 2 for p in points
            )
            if not pairs:
                raise SurfaceError("`points` must be a list of pairs `[number, value]`")
            return Points(tuple((_number("points", x), _number("points", y)) for x, y in points))
        if "half" in data and data.keys() <= {"half", "falling"}:
            return Saturating(_number("half", data["half"]), data.get("falling", False))
        if data.keys() == {"worst", "best"}:
            return Linear(_number("worst", data["worst"]), _number("best", data["best"]))
    raise SurfaceError(
        f"`curve` is `{data!r}`",
        hint="declare `{ worst = 0, best = 100 }`, `{ half = 5 }` or `{ points = [[0, 0.0], [90, 1.0]] }`",
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """What a fact factor found: the number its curve got (None: not known) and the value."""

    raw: float | None
    value: float

    @property
    def missing(self) -> bool:
        return self.raw is None


@dataclass(frozen=True, slots=True)
class Fact:
    """A factor from a typed number of the candidate, `field`, divided by one of the job where `against` names it.

    A number that is not known gets the declared value `missing`, which lies between 0 and 1, ends excluded: somebody
    without a history is neither the worst nor the best. It is a constant and not the pool's average, so that nobody's
    score depends on who else applied. Numbers outside `domain` are refused, not clamped.
    """

    name: str
    field: str
    curve: Curve
    missing: float
    weight: float = 1.0
    against: str | None = None
    domain: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.curve, Linear | Saturating | Points):
            raise SurfaceError(f"fact `{self.name}`: `curve` is a `{type(self.curve).__name__}`")
        if not 0.0 < self.missing < 1.0:
            raise SurfaceError(
                f"fact `{self.name}`: `missing` is `{self.missing}` but must lie between 0 and 1, ends excluded",
                hint="a missing fact is neutral, never zero: 0.5, or the value of an ordinary candidate",
            )
        if self.domain is not None and not self.domain[0] < self.domain[1]:
            raise SurfaceError(f"fact `{self.name}`: `domain` is `{list(self.domain)}` but must be `[lowest, highest]`")

    @property
    def source(self) -> str:
        return f"{self.field}/job.{self.against}" if self.against else self.field

    def measure(self, facts: Mapping[str, Any], job_facts: Mapping[str, Any], who: str) -> Measured:
        """The factor of one candidate. Errors: InvalidRequest for a fact that is no number or out of its domain"""
        x = as_number(facts.get(self.field), f"fact `{self.field}` of candidate `{who}`", self.field)
        if x is not None and self.domain is not None and not self.domain[0] <= x <= self.domain[1]:
            raise InvalidRequest(
                f"fact `{self.field}` of candidate `{who}` is `{x}` but its domain is {list(self.domain)}",
                hint="pass None for what is not known",
                param=self.field,
            )
        if x is not None and self.against is not None:
            against = as_number(job_facts.get(self.against), f"job fact `{self.against}`", "job_facts")
            if against is not None and against <= 0:
                raise InvalidRequest(
                    f"job fact `{self.against}` is `{against}` but fact `{self.name}` divides by it", param="job_facts"
                )
            x = None if against is None else x / against
        if x is None:
            return Measured(None, self.missing)
        return Measured(x, self.curve(x))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "field": self.field,
            "against": self.against,
            "domain": list(self.domain) if self.domain else None,
            "curve": self.curve.to_dict(),
            "missing": self.missing,
            "weight": self.weight,
        }


def as_number(value: object, what: str, param: str) -> float | None:
    """A number or a boolean as a double, None for None. Errors: InvalidRequest"""
    if value is None:
        return None
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise InvalidRequest(
        f"{what} is `{str(value)[:80]}`, a `{type(value).__name__}`, but must be a finite number",
        hint="pass None for what is not known",
        param=param,
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SurfaceError(f"`{name}` is `{value!r}` but must be a number")
    _finite(name, value)
    return float(value)


def _finite(name: str, value: float) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise SurfaceError(f"`{name}` is `{value!r}` but must be a finite number")
