"""Bounds of a cheap score: they hold as often as they say, and bad ones are refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from uma_engine.errors import CorruptFile, InvalidRequest
from uma_engine.ranking.bounds import Bounds, fit_bounds, load_bounds, margin


def test_a_margin_is_the_log_odds_of_the_score() -> None:
    for logits in ([2.0, -1.0], [0.3, 0.1, 5.0], [-700.0, 700.0]):
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        share = weights[0] / sum(weights)
        assert 1 / (1 + math.exp(min(700.0, -margin(logits)))) == pytest.approx(share, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_new_pair_lies_inside_as_often_as_promised(confidence: float) -> None:
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        pairs = [(0.0, rng.gauss(0.3, 1.0)) for _ in range(60)]
        bounds = fit_bounds([c for c, _ in pairs], [w for _, w in pairs], 48, confidence)
        inside += bounds.low <= rng.gauss(0.3, 1.0) <= bounds.high
    assert inside / 2000 >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / 2000)


def test_bounds_keep_in_a_file(tmp_path: Path) -> None:
    bounds = fit_bounds([0.0] * 50, [float(i) for i in range(50)], 32, 0.9, "base", "adapter")
    bounds.save(tmp_path / "b.json")
    assert load_bounds(str(tmp_path / "b.json")) == bounds == load_bounds(json.loads((tmp_path / "b.json").read_text()))
    assert (bounds.low, bounds.high) == (1.0, 48.0)


def test_bad_bounds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CorruptFile):
        load_bounds(tmp_path / "b.json")
    with pytest.raises(InvalidRequest, match="give at least 39"):
        fit_bounds([0.0] * 38, [1.0] * 38, 48, 0.95)
    for data in (
        {"prefix_tokens": -1, "low": 0, "high": 1, "confidence": 0.9, "num_pairs": 3},
        {"prefix_tokens": 4, "low": 2, "high": 1, "confidence": 0.9, "num_pairs": 3},
        {"prefix_tokens": 4, "low": 0, "high": math.inf, "confidence": 0.9, "num_pairs": 3},
        {"prefix_tokens": 4, "low": 0, "high": 1, "confidence": True, "num_pairs": 3},
        {"prefix_tokens": 4, "low": 0, "high": 1},
        {"depth": 4},
    ):
        with pytest.raises(InvalidRequest):
            load_bounds(data)
    with pytest.raises(InvalidRequest):
        Bounds(4, 0.0, 1.0, 0.0, 3)
