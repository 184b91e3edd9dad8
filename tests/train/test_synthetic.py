"""Data made to a plan: what was planned is what came, a knob moves what it names, and filters hold."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from uma_engine.cli.main import main
from uma_engine.errors import InvalidRequest
from uma_engine.train.groups import read_groups
from uma_engine.train.synthetic import (
    ATTRIBUTES,
    COPIED,
    INJECTIONS,
    Occupation,
    Plan,
    generate,
    jensen_shannon,
    read_occupations,
    towards_errors,
)

VERBS = "plan build check repair teach paint drive measure draw clean write test".split()  # noqa: SIM905
THINGS = "engines walls reports patients gardens bridges budgets menus songs maps cables lessons".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def occupations() -> list[Occupation]:
    rng = random.Random(1)
    found = []
    for major in ("11", "15", "29", "47"):
        for n in range(8):
            tasks = tuple(
                f"{rng.choice(VERBS).title()} {rng.choice(THINGS)} and {rng.choice(VERBS)} {rng.choice(THINGS)} for {major}-{n} case {i}."
                for i in range(14)
            )
            code = f"{major}-10{n}1.00"
            related = tuple(f"{major}-10{m}1.00" for m in range(8) if m != n)[:3]
            found.append(
                Occupation(code, f"Worker {major} {n}", tasks, related, tuple(f"Tool {major}{n}{i}" for i in range(5)))
            )
    return found


def test_what_was_planned_came(occupations: list[Occupation]) -> None:
    plan = Plan(
        jobs=1200,
        shares={
            "seniority": {"junior": 0.1, "experienced": 0.2, "expert": 0.7},
            "attack": {"none": 0.8, "injection": 0.2},
        },
    )
    groups, report = generate(plan, occupations)
    assert len(groups) == report.jobs >= 1150
    assert max(report.divergence.values()) <= 0.02
    assert report.realised["seniority"]["expert"] == pytest.approx(0.7, abs=0.02)
    assert report.realised["attack"]["stuffing"] == 0
    assert report.cells >= 500
    assert report.near_duplicates <= 0.01
    assert generate(plan, occupations)[0] == groups, "a function of the plan"
    for group in groups:
        assert len(group.candidates) == 8
        assert len({c.grade for c in group.candidates}) > 1
        words = f" {' '.join(group.job.split())} "
        for c in group.candidates:
            theirs = c.text.split()
            runs = (" ".join(theirs[i : i + COPIED]) for i in range(len(theirs) - COPIED + 1))
            assert not any(f" {run} " in words for run in runs)
            if any(i in c.text for i in INJECTIONS):
                assert c.grade == 0
                assert report.attributes[group.id]["attack"] == "injection"


@pytest.mark.parametrize("name", [*ATTRIBUTES, "category"])
def test_a_knob_moves_the_data(occupations: list[Occupation], name: str) -> None:
    value = (ATTRIBUTES.get(name) or ("29",))[-1]
    _, even = generate(Plan(jobs=150, candidates=6), occupations)
    _, turned = generate(Plan(jobs=150, candidates=6, shares={name: {value: 1.0}}), occupations)
    assert turned.realised[name][value] == 1
    assert even.realised[name][value] < 0.5
    others = [n for n in turned.realised if n != name]
    assert all(jensen_shannon(turned.realised[n], turned.planned[n]) < 0.02 for n in others)


def test_texts_show_what_they_should(occupations: list[Occupation]) -> None:
    def posts(**shares: str) -> list[str]:
        plan = Plan(jobs=60, candidates=8, shares={name: {value: 1.0} for name, value in shares.items()})
        return [g.job for g in generate(plan, occupations)[0]]

    assert all("budget" in p for p in posts(conflict="rate", phrasing="plain"))
    assert all("hours every week" in p for p in posts(conflict="hours", phrasing="plain"))
    assert not any("experience" in p for p in posts(missing="experience"))
    assert all(p.startswith("Dear candidates") for p in posts(phrasing="formal"))
    lengths = [sum(map(len, posts(vagueness=v))) for v in ("precise", "short", "vague")]
    assert lengths[0] > 2 * max(lengths[1:])
    plan = Plan(jobs=60, shares={"attack": {"stuffing": 1.0}})
    assert any("Keywords:" in c.text for g in generate(plan, occupations)[0] for c in g.candidates)


def test_the_next_plan_asks_for_what_went_wrong(occupations: list[Occupation]) -> None:
    plan = Plan(jobs=200)
    groups, report = generate(plan, occupations)
    quality = {g.id: 0.4 if report.attributes[g.id]["phrasing"] == "non_native" else 0.9 for g in groups}
    after = towards_errors(plan, report.attributes, quality)
    _, next_report = generate(after, occupations)
    assert next_report.realised["phrasing"]["non_native"] > report.realised["phrasing"]["non_native"] + 0.15
    assert max(next_report.divergence.values()) <= 0.02
    assert after.seed != plan.seed
    with pytest.raises(InvalidRequest):
        towards_errors(plan, report.attributes, {})


def test_what_is_no_plan(tmp_path: Path, occupations: list[Occupation]) -> None:
    for bad in (
        {"jobs": 0},
        {"jobs": True},
        {"shares": {"mood": {}}},
        {"shares": {"attack": {"fire": 1.0}}},
        {"shares": {"attack": {"none": -1}}},
        {"shares": {"attack": {"none": 0}}},
    ):
        with pytest.raises(InvalidRequest):
            Plan(**bad)  # type: ignore[arg-type]
    (tmp_path / "plan.toml").write_text("jobs = 5\nseeds = 3\n")
    with pytest.raises(InvalidRequest, match="seeds"):
        Plan.load(tmp_path / "plan.toml")
    with pytest.raises(InvalidRequest, match="too few"):
        generate(Plan(jobs=5), occupations[:1])
    with pytest.raises(InvalidRequest):
        read_occupations(tmp_path)


def test_on_the_command_line(tmp_path: Path, occupations: list[Occupation]) -> None:
    onet = tmp_path / "onet"
    onet.mkdir()
    code = "O*NET-SOC Code"
    rows = {
        name: []
        for name in (
            "Occupation_Data",
            "Task_Statements",
            "Related_Occupations",
            "Technology_Skills",
            "Alternate_Titles",
        )
    }
    for o in occupations:
        rows["Occupation_Data"].append((o.code, o.title))
        rows["Task_Statements"] += [(o.code, t) for t in o.tasks]
        rows["Related_Occupations"] += [(o.code, t) for t in o.related]
        rows["Technology_Skills"] += [(o.code, t) for t in o.tools]
    heads = dict(zip(rows, ("Title", "Task", "Related O*NET-SOC Code", "Example", "Alternate Title"), strict=True))
    for name, lines in rows.items():
        (onet / f"{name}.txt").write_text(
            "\n".join([f"{code}\t{heads[name]}", *("\t".join(line) for line in lines)]) + "\n"
        )
    (tmp_path / "plan.toml").write_text("jobs = 40\ncandidates = 6\n[shares.phrasing]\nplain = 1.0\n")
    out = tmp_path / "out"
    assert main(["data", "synthetic", str(tmp_path / "plan.toml"), "--onet", str(onet), "--out", str(out)]) == 0
    assert len(read_groups(out / "synthetic.jsonl")) == 40
    assert (out / "report.json").exists()
