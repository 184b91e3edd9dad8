"""Calibrations: the error falls where a model is too sure, the map is monotone, and it is refused where it was not fitted."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.calibration import (
    Calibration,
    Method,
    expected_calibration_error,
    fit,
    probability,
    read_calibrations,
    save_calibration,
)

STACK: dict[str, Any] = {
    "probe": "Fit? Answer yes or no.",
    "labels": ("yes", "no"),
    "base_digest": "b" * 64,
    "adapter_digest": "a" * 64,
}


def too_sure(
    n: int, seed: int, factor: float = 4.0, shift: float = 0.0
) -> tuple[list[tuple[float, float]], list[bool]]:
    """A model whose stated log odds are `factor` times too large, and `shift` off."""
    rng = random.Random(seed)
    logits, outcomes = [], []
    for _ in range(n):
        true = rng.gauss(0, 1.5)
        outcomes.append(rng.random() < 1 / (1 + math.exp(-true)))
        logits.append((true * factor + shift + 3.0, 3.0))
    return logits, outcomes


def test_the_error_is_the_gap_between_stated_and_true_by_bin() -> None:
    assert expected_calibration_error([0.95] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.45)
    assert expected_calibration_error([0.05, 0.05, 0.65, 0.65], [False, True, True, False]) == pytest.approx(0.3)
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0.0
    assert expected_calibration_error([], []) == 0.0


@pytest.mark.parametrize(("method", "shift"), [("temperature", 0.0), ("isotonic", 0.0), ("isotonic", -6.0)])
def test_the_error_falls_on_examples_that_the_fit_has_not_seen(method: Method, shift: float) -> None:
    calibration = fit(method, *too_sure(1000, 1, shift=shift), **STACK)
    assert calibration.ece_after < calibration.ece_before / 2
    logits, outcomes = too_sure(2000, 2, shift=shift)
    before = expected_calibration_error([probability(x) for x in logits], outcomes)
    after = expected_calibration_error([calibration(x) for x in logits], outcomes)
    assert before > 0.1
    assert after < before / 3
    assert calibration.num_examples == 1000


def test_the_temperature_that_was_planted_is_found() -> None:
    calibration = fit("temperature", *too_sure(4000, 3), **STACK)
    assert calibration.temperature == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_calibration_never_turns_an_order_round(method: Method) -> None:
    calibration = fit(method, *too_sure(300, 5), **STACK)
    margins = sorted(random.Random(1).uniform(-30, 30) for _ in range(3000))
    values = [calibration((m, 0.0)) for m in margins]
    assert all(0.0 <= v <= 1.0 for v in values)
    assert values == sorted(values)


def test_isotonic_pools_what_goes_down_and_equal_statements() -> None:
    logits = [(m, 0.0) for m in (-2, -1, 0, 0, 1, 2)] * 2
    calibration = fit("isotonic", logits, [False, True, False, True, True, True] * 2, **STACK)
    ys = [y for _, y in calibration.knots]
    assert ys == [0.0, pytest.approx(2 / 3), 1.0]


def test_it_survives_its_file_and_replaces_only_its_own_entry(tmp_path: Path) -> None:
    first = fit("temperature", *too_sure(100, 1), **STACK)
    other = fit("isotonic", *too_sure(100, 2), **(STACK | {"probe": "Clear? Answer yes or no."}))
    assert save_calibration(first, tmp_path) == tmp_path / "calibration.json"
    save_calibration(other, tmp_path)
    again = replace(first, temperature=9.0)
    save_calibration(again, tmp_path)
    assert read_calibrations(tmp_path / "calibration.json") == [other, again]
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]
    assert Calibration.from_dict(json.loads(json.dumps(other.to_dict())))((0.3, 0.1)) == other((0.3, 0.1))


@pytest.mark.parametrize("key", ["probe", "labels", "base_digest", "adapter_digest"])
def test_it_is_refused_for_anything_but_what_it_was_fitted_for(key: str) -> None:
    calibration = fit("temperature", *too_sure(50, 1), **STACK)
    calibration.check("r", **STACK)
    with pytest.raises(SurfaceError, match=f"read `r` was fitted for {key}"):
        calibration.check("r", **(STACK | {key: ("no", "yes") if key == "labels" else "c"}))


@pytest.mark.parametrize(
    ("logits", "outcomes"),
    [
        ([(0.0, 1.0)] * 9, [True, False] * 4 + [True]),
        ([(0.0, 1.0)] * 20, [True] * 20),
        ([(0.0, 1.0)] * 20, [True] * 19),
    ],
)
def test_too_few_or_one_sided_examples_are_refused(logits: Any, outcomes: Any) -> None:
    with pytest.raises(InvalidRequest, match="outcomes of both kinds"):
        fit("temperature", logits, outcomes, **STACK)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "x"}, "not of format"),
        ({"method": "magic"}, "`method` is `magic`"),
        ({"temperature": 0}, "must be positive"),
        ({"temperature": "1"}, "`temperature` is `'1'`"),
        ({"method": "isotonic", "temperature": None, "knots": []}, "rising line"),
        ({"method": "isotonic", "temperature": None, "knots": [[0.5, 0.9], [0.6, 0.1]]}, "rising line"),
        ({"method": "isotonic", "temperature": None, "knots": [[0.5, 2.0]]}, "rising line"),
        ({"knots": [[1]]}, "pairs of numbers"),
        ({"labels": [1, 2]}, "must be words"),
        ({"base_digest": None}, "`base_digest` is `None`"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    entry = fit("temperature", *too_sure(50, 1), **STACK).to_dict() | change
    (tmp_path / "c.json").write_text(json.dumps({"calibrations": [entry]}))
    with pytest.raises(SurfaceError, match=says):
        read_calibrations(tmp_path / "c.json")
    for content in ("", "[]", "{}"):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(SurfaceError, match=r"c\.json"):
            read_calibrations(tmp_path / "c.json")
