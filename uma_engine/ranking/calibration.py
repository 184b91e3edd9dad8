"""Calibration of a read: from the probability that a model states to the rate at which it is right.

Knows label logits, outcomes and files; does not know how logits are computed. A calibration belongs to one base, one adapter,
one probe and its labels: it names them, and is refused anywhere else. It is monotone, so it never changes the order that one
read gives; it changes how much the read's differences weigh beside other factors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.factors import interpolate

__all__ = [
    "FILE_NAME",
    "Calibration",
    "Method",
    "expected_calibration_error",
    "fit",
    "read_calibrations",
    "save_calibration",
]

FILE_NAME = "calibration.json"  # in the adapter's directory
FORMAT = "uma-calibration/1"
NUM_BINS = 10
FOLDS = 5
MAX_FILE_BYTES = 16 * 2**20
Method = Literal["temperature", "isotonic"]
Logits = Sequence[float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted map of label logits to a probability of the first label.

    `temperature` divides the logits before the softmax; `knots` is a rising broken line from the softmax's probability. The
    other fields say what it was fitted for and how well: `ece_before` and `ece_after` are expected calibration errors
    over the `num_examples` of the dev set, the latter cross-fitted: each example judged by a map that has not seen it.
    """

    method: Method
    temperature: float | None
    knots: tuple[tuple[float, float], ...]
    probe: str
    labels: tuple[str, ...]
    base_digest: str
    adapter_digest: str | None
    num_examples: int
    ece_before: float
    ece_after: float

    def __post_init__(self) -> None:
        if self.method == "temperature":
            if self.temperature is None or not 0 < self.temperature < math.inf:
                raise SurfaceError(f"a calibration's `temperature` is `{self.temperature}` but must be positive")
        elif self.method == "isotonic":
            rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.knots))
            if not self.knots or not rising or not all(0 <= v <= 1 for knot in self.knots for v in knot):
                raise SurfaceError("a calibration's `knots` must be a rising line between 0 and 1")
        else:
            raise SurfaceError(f"a calibration's `method` is `{self.method}` but must be `temperature` or `isotonic`")

    def __call__(self, logits: Logits) -> float:
        if self.temperature is not None:
            return probability(logits, self.temperature)
        return interpolate(self.knots, probability(logits))

    def check(
        self, read: str, *, base_digest: str, adapter_digest: str | None, probe: str, labels: Sequence[str]
    ) -> None:
        """Raises SurfaceError unless this was fitted for exactly what is going to answer."""
        now = {"base_digest": base_digest, "adapter_digest": adapter_digest, "probe": probe, "labels": tuple(labels)}
        for key, value in now.items():
            fitted = getattr(self, key)
            if fitted != value:
                raise SurfaceError(
                    f"the calibration of read `{read}` was fitted for {key} `{_short(fitted)}` but `{_short(value)}` answers",
                    hint="fit it again with `engine.calibrate`, or declare the read without a calibration",
                    param="surface",
                )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.method,
            "temperature": self.temperature,
            "knots": [list(k) for k in self.knots],
            "probe": self.probe,
            "labels": list(self.labels),
            "base_digest": self.base_digest,
            "adapter_digest": self.adapter_digest,
            "num_examples": self.num_examples,
            "ece_before": self.ece_before,
            "ece_after": self.ece_after,
        }

    @classmethod
    def from_dict(cls, data: object) -> Calibration:
        """Errors: SurfaceError naming what is wrong"""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise SurfaceError(f"a calibration is not of format `{FORMAT}`")
        shapes: dict[str, tuple[type, ...]] = {
            "method": (str,), "temperature": (int, float, type(None)), "knots": (list,), "probe": (str,), "labels": (list,),
            "base_digest": (str,), "adapter_digest": (str, type(None)), "num_examples": (int,), "ece_before": (int, float),
            "ece_after": (int, float),
        }  # fmt: skip
        for key, kinds in shapes.items():
            if key not in data or not isinstance(data[key], kinds) or isinstance(data[key], bool):
                raise SurfaceError(
                    f"a calibration's `{key}` is `{data.get(key)!r}`", hint="fit it with `engine.calibrate`"
                )
        knots = data["knots"]
        if not all(isinstance(k, list) and len(k) == 2 and all(type(v) in (int, float) for v in k) for k in knots):
            raise SurfaceError("a calibration's `knots` must be pairs of numbers")
        if not all(isinstance(label, str) for label in data["labels"]):
            raise SurfaceError("a calibration's `labels` must be words")
        fields = {key: data[key] for key in shapes}
        fields |= {"knots": tuple((float(x), float(y)) for x, y in knots), "labels": tuple(data["labels"])}
        return cls(**fields)


def probability(logits: Logits, temperature: float = 1.0) -> float:
    """Softmax over the labels alone, of the first one, in doubles: the same bits on every machine."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return weights[0] / math.fsum(weights)


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = NUM_BINS) -> float:
    """Mean over `bins` equal bins of |rate of true outcomes - mean probability|, weighted by how many fall into each."""
    sums = [[0.0, 0.0] for _ in range(bins)]
    for p, true in zip(probabilities, outcomes, strict=True):
        place = sums[min(bins - 1, int(p * bins))]
        place[0] += p
        place[1] += true
    return math.fsum(abs(stated - true) for stated, true in sums) / max(1, len(probabilities))


def fit(
    method: Method,
    logits: Sequence[Logits],
    outcomes: Sequence[bool],
    *,
    probe: str,
    labels: Sequence[str],
    base_digest: str,
    adapter_digest: str | None,
) -> Calibration:
    """Fit on a dev set: label logits of each example, and whether the first label was right.

    The result is the same for the same examples in the same order. Errors: InvalidRequest for fewer than 2 examples a fold
    or outcomes that are all the same.
    """
    n = len(logits)
    if n != len(outcomes) or n < 2 * FOLDS or len(set(map(bool, outcomes))) < 2:
        raise InvalidRequest(
            f"a calibration needs at least {2 * FOLDS} examples with outcomes of both kinds but has {n} logits and "
            f"{len(outcomes)} outcomes",
            hint="give more judged pairs of job and candidate",
            param="examples",
        )
    outcomes = [bool(o) for o in outcomes]
    plain = [probability(x) for x in logits]
    crossed = [0.0] * n
    for fold in range(FOLDS):
        seen = [i for i in range(n) if i % FOLDS != fold]
        apply = _fitted(method, [logits[i] for i in seen], [outcomes[i] for i in seen])[2]
        for i in range(fold, n, FOLDS):
            crossed[i] = apply(logits[i])
    temperature, knots, _ = _fitted(method, logits, outcomes)
    return Calibration(
        method=method,
        temperature=temperature,
        knots=knots,
        probe=probe,
        labels=tuple(labels),
        base_digest=base_digest,
        adapter_digest=adapter_digest,
        num_examples=n,
        ece_before=expected_calibration_error(plain, outcomes),
        ece_after=expected_calibration_error(crossed, outcomes),
    )


def _fitted(
    method: Method, logits: Sequence[Logits], outcomes: Sequence[bool]
) -> tuple[float | None, tuple[tuple[float, float], ...], Callable[[Logits], float]]:
    if method == "temperature":
        temperature = _fit_temperature(logits, outcomes)
        return temperature, (), lambda x: probability(x, temperature)
    knots = _fit_isotonic([probability(x) for x in logits], outcomes)
    return None, knots, lambda x: interpolate(knots, probability(x))


def _fit_temperature(logits: Sequence[Logits], outcomes: Sequence[bool]) -> float:
    """The temperature of the least log loss: convex in 1/T, so a golden-section search over log T finds it."""

    def loss(log_t: float) -> float:
        t = math.exp(log_t)
        stated = (min(max(probability(x, t), 1e-15), 1 - 1e-15) for x in logits)
        return -math.fsum(math.log(p if true else 1 - p) for p, true in zip(stated, outcomes, strict=True))

    low, high, ratio = math.log(1e-2), math.log(1e3), (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(60):
        if loss_a <= loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return math.exp((low + high) / 2)


def _fit_isotonic(stated: Sequence[float], outcomes: Sequence[bool]) -> tuple[tuple[float, float], ...]:
    """Pool adjacent violators; each pool becomes a knot at its mean. Equal statements are one pool from the start."""
    pools: list[list[float]] = []  # number, sum of statements, sum of outcomes
    last: float | None = None
    for p, true in sorted(zip(stated, outcomes, strict=True)):
        if p == last:
            pools[-1] = [pools[-1][0] + 1, pools[-1][1] + p, pools[-1][2] + true]
        else:
            pools.append([1, p, float(true)])
        last = p
    merged: list[list[float]] = []
    for pool in pools:
        merged.append(pool)
        while len(merged) > 1 and merged[-2][2] * merged[-1][0] >= merged[-1][2] * merged[-2][0]:
            upper = merged.pop()
            merged[-1] = [a + b for a, b in zip(merged[-1], upper, strict=True)]
    knots: list[tuple[float, float]] = []
    for n, p_sum, true_sum in merged:
        x, y = p_sum / n, true_sum / n
        if not knots or x > knots[-1][0]:
            knots.append((x, max(y, knots[-1][1]) if knots else y))
    return tuple(knots)


def read_calibrations(path: Path) -> list[Calibration]:
    """All calibrations of a file. Errors: SurfaceError when it cannot be read or is not one"""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise SurfaceError(f"`{path}` has more than {MAX_FILE_BYTES} bytes")
        data = json.loads(raw)
    except OSError as error:
        raise SurfaceError(
            f"calibration `{path}` cannot be read: {error.strerror}", hint="fit one with `engine.calibrate`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SurfaceError(f"calibration `{path}` is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("calibrations"), list):
        raise SurfaceError(f"`{path}` holds no list `calibrations`")
    return [Calibration.from_dict(entry) for entry in data["calibrations"]]


def save_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Put it into a file, or into `calibration.json` of an adapter's directory, in the place of an older one of the same
    probe and labels; the file is either whole or what it was.
    """
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    kept = read_calibrations(target) if target.exists() else []
    kept = [c for c in kept if (c.probe, c.labels) != (calibration.probe, calibration.labels)]
    text = json.dumps({"calibrations": [c.to_dict() for c in [*kept, calibration]]}, ensure_ascii=False, indent=1)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise InvalidRequest(f"`{target}` cannot be written: {error.strerror}", param="path") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "..."
