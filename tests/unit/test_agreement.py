"""Agreement of orders and bounds of rare events against values worked out elsewhere, and rewrites that mean the same."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from uma_engine.ranking.agreement import kendall_tau, overlap, upper_bound
from uma_engine.ranking.rewrites import RULES, esco_synonyms, rewrites

JOB = (Path(__file__).resolve().parents[2] / "examples" / "job.md").read_text(encoding="utf-8")


def test_tau_by_hand_and_at_its_ends() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(2 / 3)
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 3]) == pytest.approx(0.8)  # 4 concordant of sqrt(5 * 5)
    assert kendall_tau([1, 1], [1, 2]) == 1.0


def test_overlap_and_bounds() -> None:
    assert overlap([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert overlap([], [1]) == 1.0
    assert upper_bound(0, 600) == pytest.approx(1 - 0.05 ** (1 / 600))
    assert upper_bound(0, 600) < 0.005
    assert upper_bound(1, 10) == pytest.approx(0.3942, abs=1e-4)  # qbeta(0.95, 2, 9)
    assert upper_bound(3, 3) == upper_bound(0, 0) == 1.0


def bag(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.lower()))


def test_rewrites_differ_from_each_other_and_come_again() -> None:
    found = rewrites(JOB, 12, seed=3)
    assert len(found) == 12
    assert len({r.text for r in found} | {JOB.strip()}) == 13
    assert rewrites(JOB, 12, seed=3) == found
    assert rewrites(JOB, 12, seed=4) != found
    assert {rule for r in found for rule in r.rules} >= set(RULES) - {"synonyms"}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "synonyms"])
def test_a_rule_moves_words_and_neither_loses_nor_adds_one(rule: str) -> None:
    found = {RULES[rule](JOB.strip(), random.Random(seed), {}) for seed in range(10)}
    assert found != {JOB.strip()}
    assert all(bag(changed) == bag(JOB) for changed in found)


def test_a_sentence_that_points_back_stays_where_it_is() -> None:
    rule, rng = RULES["sentences shuffled"], random.Random(0)
    held = "We make shoes. They are red. Come and see."
    assert all(rule(held, rng, {}) == held for _ in range(10))
    free = "We make shoes. Red is our colour. Come and see."
    assert {rule(free, rng, {}) for _ in range(50)} > {free}


def test_lists_keep_their_nesting_and_what_leads_to_a_list_stays_prose() -> None:
    for nested in ("- a\n  - a1\n  - a2\n- b\n\nText", "- a\n  goes on\n- b"):
        for rule in ("bullets shuffled", "bullets to prose"):
            assert all(RULES[rule](nested, random.Random(seed), {}) == nested for seed in range(5))
    lead = "We are many. Our tasks are:\n- one\n- two"
    assert RULES["prose to bullets"](lead, random.Random(0), {}) == lead
    assert RULES["bullets to prose"](lead, random.Random(0), {}).endswith("Our tasks are:\none; two.")


def test_synonyms_are_those_of_esco_or_those_given() -> None:
    assert "web application developer" in esco_synonyms()["web developer"]
    (found,) = rewrites("Two Web developers wanted", 1, synonyms={"web developer": ["web engineer"]})
    assert (found.text, found.rules) == ("Two Web engineers wanted", ("synonyms",))
    assert rewrites("Nothing here", 8, synonyms={}) == []
    assert rewrites("a web developer-advocate", 3, synonyms={"web developer": ["x y"]}) == []
