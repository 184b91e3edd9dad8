"""Posts in other words: whatever a model writes, facts stay in order and no number is invented; filters turn down the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.tiny import make_tiny_model
from uma_engine import Engine
from uma_engine.train.groups import Group
from uma_engine.train.rephrase import ASK, facts_of, rephrase
from uma_engine.train.synthetic import Occupation, Plan, generate

pytest.importorskip("llguidance")

TOOLS = ("Apache Kafka", "C++", "Rust", "Excel (2016)", "R&D Suite")
DONE = (
    ("Plan", "walls in towns"), ("Draw", "maps by hand"), ("Write", "songs with friends"), ("Cook", "menus for guests"),
    ("Lay", "cables under roads"), ("Mend", "roofs after storms"), ("Keep", "budgets over years"), ("Give", "lessons at night"),
)  # fmt: skip


class Answer(NamedTuple):
    text: str


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    people = [
        Occupation(
            f"15-10{n}1.00",
            f"Worker {'abcdef'[n]}",
            tuple(f"{verb} {'abcdef'[n]} {thing}." for verb, thing in DONE),
            (),
            TOOLS,
        )
        for n in range(6)
    ]
    plan = Plan(
        jobs=12,
        candidates=4,
        shares={"conflict": {"rate": 1, "hours": 1}, "vagueness": {"precise": 1}, "missing": {"none": 1}},
    )
    return generate(plan, people)[0]


def test_facts_are_numbers_with_what_they_count_and_tools() -> None:
    post = (
        "Coder wanted. What you will do: Write code. You bring at least 5 years of experience. You work with C++ and R&D Suite."
        " Our budget is 45 USD an hour, not more."
    )
    assert facts_of(post) == ["5 years", "C++", "R&D Suite", "45 USD an hour"]
    assert facts_of("Coder. Write code. No experience is needed. We need 20 hours every week.") == ["20 hours"]
    assert facts_of("Looking for somebody who can support us with writing.") == []


def test_a_random_model_keeps_every_fact_and_invents_no_number(groups: list[Group], tmp_path: Path) -> None:
    answers: list[tuple[str, str]] = []
    with Engine(make_tiny_model(tmp_path / "tiny"), max_model_len=2048) as engine:

        class Recorded:
            def generate(self, prompts: Sequence[str], params: Any = None, *, chat: bool = False) -> Sequence[Any]:
                found = engine.generate(prompts, params, chat=chat)
                answers.extend(zip(prompts, (a.text for a in found), strict=True))
                return found

        first = rephrase(groups, Recorded(), TOOLS, seed=3)
        again = rephrase(groups[:4], Recorded(), TOOLS, seed=3)
        rephrase(groups[:4], Recorded(), TOOLS, seed=4)
    assert again.groups == first.groups[:4]
    answers, twice, other = answers[: len(groups)], answers[len(groups) : -4], answers[-4:]
    assert twice == answers[:4], "a function of groups, seed and stack"
    assert all(a != b for a, b in zip(twice, other, strict=True))
    assert len(answers) == len(groups)
    posts = {ASK.format(post=g.job): g.job for g in groups}
    for prompt, text in answers:
        new, facts = json.loads(text)["post"], facts_of(posts[prompt])
        assert len(facts) >= 2
        at = 0
        for fact in facts:
            at = new.index(fact, at) + len(fact)
        assert re.findall(r"\d+", new) == re.findall(r"\d+", " ".join(facts))
    assert len(first.kept) + sum(first.rejected.values()) == len(groups)
    for before, after in zip(groups, first.groups, strict=True):
        assert after.candidates == before.candidates
        assert (after.job != before.job) == (after.id in first.kept)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda post: post, "the same words"),
        (lambda post: "A job.", "length"),
        (lambda post: "Now " + "we want help and " * (len(post) // 16) + "more.", "repeats itself"),
        (lambda post: _other(post) + " It is made with rust, as it were.", "another tool"),
        (lambda post: _other(post), None),
    ],
    ids=["a parrot", "too short", "a loop", "an invented tool", "other words"],
)
def test_what_a_filter_turns_down_stays_as_it_was(groups: list[Group], write: Any, reason: str | None) -> None:
    class Fixed:
        def generate(self, prompts: Sequence[str], params: Any = None, *, chat: bool = False) -> Sequence[Any]:
            posts = [p.rpartition("\n\n")[2] for p in prompts]
            return [Answer(json.dumps({"post": write(post)})) for post in posts]

    chosen = [g for g in groups if "Rust" not in g.job]
    assert len(chosen) > 2
    found = rephrase(chosen, Fixed(), TOOLS)
    if reason is None:
        assert len(found.kept) == len(chosen)
        assert all(a.job == write(b.job) for a, b in zip(found.groups, chosen, strict=True))
    else:
        assert found.rejected == {reason: len(chosen)}
        assert list(found.groups) == chosen


def _other(post: str) -> str:
    """The post's words, turned round: no four in a row are the same."""
    return " ".join(reversed(post.split()))
