"""The engine's precisions: chosen by an option, written into records, and close to each other on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.workload import LABELS, make_workload
from uma_engine import Engine
from uma_engine.config import PRECISIONS
from uma_engine.errors import InvalidRequest

MARGINS = {"near": 0.002, "fast": 0.25}  # nats that a candidate's margin between two labels may move


def test_a_dense_model_computes_the_same_bits_in_all(make_engine: Callable[..., Engine]) -> None:
    prefix, items = list(range(3, 40)), [[50, 51, 52], [60, 61]]
    exact, near, fast = (
        [score.logits for score in make_engine(precision=precision).score(prefix, items)] for precision in PRECISIONS
    )
    assert near == exact
    assert fast == exact


def test_a_record_says_which_precision_answered(make_engine: Callable[..., Engine]) -> None:
    for precision in PRECISIONS:
        record = make_engine(precision=precision).rank("a nurse", ["ten years of nursing", "welder"]).record
        assert record["options"]["engine"]["precision"] == precision


def test_another_precision_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be one of exact, near"):
        Engine(tiny_dir, precision="bf16")


@pytest.mark.weights
def test_margins_of_real_candidates_move_little() -> None:
    margins = {}
    for precision in PRECISIONS:
        with Engine("smollm2-135m", precision=precision) as engine:
            work = make_workload(engine.tokenizer, candidates=16)
            items = [candidate + work.suffix for candidate in work.candidates]
            scores = engine.score(work.prefix, items, labels=LABELS)
            margins[precision] = [score.logits[0] - score.logits[1] for score in scores]
    for precision, most in MARGINS.items():
        moved = [abs(a - b) for a, b in zip(margins[precision], margins["exact"], strict=True)]
        assert 0.0 < max(moved) <= most
