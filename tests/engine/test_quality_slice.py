"""A slice of `bench.quality`'s crosswalk on the real base and the shipped adapter: it must go on ranking better than its first stage.

tests/data/crosswalk.jsonl: six held-out jobs (`test` majors, on which nothing was chosen) spread over the split, the first stage's first 16
candidates of each, cut to 48 words. Six jobs prove no level of quality, the bench does; they catch a break of reading, priors or adapter.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import quality
from uma_engine.adapters.shipped import shipped
from uma_engine.train.groups import read_groups

pytest.importorskip("ir_measures")
SLICE = Path(__file__).resolve().parents[1] / "data" / "crosswalk.jsonl"


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.slow
def test_the_shipped_adapter_ranks_better_than_its_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "KEPT", tmp_path / "kept")
    groups = read_groups(SLICE)
    assert {g.id[:2] for g in groups} <= set(quality.TEST_MAJORS)
    queries = [quality.Query(g.id, g.job) for g in groups]
    qrels = {g.id: {c.id: c.grade for c in g.candidates} for g in groups}
    priors = {g.id: {c.id: c.prior for c in g.candidates} for g in groups}
    pools = {g.id: [c.id for c in g.candidates] for g in groups}
    corpus = {c.id: c.text for g in groups for c in g.candidates}

    def quality_of(odds: dict[str, dict[str, float]]) -> float:
        return mean(quality.ndcg_of(quality.ordered(pools, queries, odds), qrels))

    base = quality.model_run("smollm2-135m", None, queries, pools, corpus, "near")
    tuned = quality.model_run("smollm2-135m", str(shipped("talent-match")), queries, pools, corpus, "near")
    both = {q: {doc: tuned[q][doc] + priors[q][doc] for doc in tuned[q]} for q in tuned}
    found = {
        "first stage": quality_of(priors),
        "base": quality_of(base),
        "tuned": quality_of(tuned),
        "blended": quality_of(both),
    }
    assert found["tuned"] > found["base"] + 0.2, found
    assert found["blended"] > found["first stage"], found
