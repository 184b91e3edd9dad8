"""The cost bench on a tiny model: a run that was stopped goes on, and every comparison is on the same jobs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench import cost
from tests.tiny import make_tiny_model
from uma_engine import Engine
from uma_engine.train.groups import Group, Judged

WORDS = "rust nurse tax paint violin kernel sales excel law music care linux".split()  # noqa: SIM905


def some_groups(count: int, people: int) -> list[Group]:
    rng = random.Random(3)
    return [
        Group(
            f"g{n}",
            " ".join(rng.choices(WORDS, k=6)),
            tuple(
                Judged(f"p{i}", " ".join(rng.choices(WORDS, k=9)), rng.randrange(4), rng.random())
                for i in range(people)
            ),
        )
        for n in range(count)
    ]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(cost, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(cost, "append_row", lambda area, row: found.append(row))
    return found


def test_a_stopped_run_goes_on(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    groups, asked = some_groups(5, 4), []

    def judge(group: Group) -> cost.Outcome:
        asked.append(group.id)
        return cost.Outcome([c.id for c in group.candidates], 1e9 * len(asked), 0.5)

    cost.Study(groups[:3], save=True).run("shared", "m", "stack", judge)
    cost.Study(groups, save=True).run("shared", "m", "stack", judge)
    assert asked == ["g0", "g1", "g2", "g3", "g4"]
    cost.Study(groups[:1], save=True).run("shared", "m", "another stack", judge)
    assert asked[5:] == ["g0"]
    assert [row["jobs"] for row in rows] == [3, 5, 1]
    assert rows[1]["gflop_query"] == 3.0


def test_a_model_of_fewer_jobs_is_compared_on_these(rows: list[dict[str, Any]]) -> None:
    groups = some_groups(6, 4)
    study = cost.Study(groups, save=True)
    by_grade = {g.id: [c.id for c in sorted(g.candidates, key=lambda c: -c.grade)] for g in groups}
    study.run("shared", "m", "s", lambda g: cost.Outcome(by_grade[g.id], 1e9 * (1 + groups.index(g)), 1.0))
    study.run("shared", "large", "l", lambda g: cost.Outcome(by_grade[g.id][::-1], 8e9, 4.0), 2)
    small, large = rows
    assert small["ndcg_10"] == 1.0
    assert large["jobs"] == 2
    assert small["as_given"] == round(sum(by_grade[g.id] == cost.by_prior(g).order for g in groups) / 6, 3)
    assert large["times_the_flops_of_shared"] == pytest.approx(8 / 2.5)  # of the jobs of places 0 and 3: 1 and 4
    assert large["over_shared"][0] == pytest.approx(large["ndcg_10"] - 1.0, abs=1e-4)


def test_a_window_is_put_in_the_order_of_its_judge() -> None:
    (group,) = some_groups(1, 12)
    best = cost.by_prior(group).order
    asked = []

    def backwards(prompt: str, count: int) -> tuple[list[int], float]:
        asked.append(prompt)
        return list(range(count))[::-1], 1.0

    outcome = cost.windows(group, backwards)
    assert len(asked) == 2
    assert all("[J]" in prompt for prompt in asked)
    worst = [*best[:2], *best[2:][::-1]]  # after the first window, of the last ten
    assert outcome.order == [*worst[:10][::-1], *worst[10:]]
    kept = cost.windows(group, lambda prompt, count: (list(range(count)), 1.0))
    assert kept.order == best, "who says nothing new leaves the first stage's order"


def test_those_cut_out_count_as_missed() -> None:
    (group,) = some_groups(1, 9)
    cut = cost.first(group, 4)
    assert len(cut.candidates) == 4
    assert sorted(cut.ideal) == sorted(group.ideal)
    assert cost._key(cut) != cost._key(group)


def test_all_ways_on_a_tiny_model(rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ANSWERS", ("A", "B"))  # the tiny vocabulary has no word for yes
    groups = some_groups(2, 12)
    with Engine(make_tiny_model(tmp_path / "tiny"), max_model_len=2048) as engine:
        study = cost.Study(groups, save=True)
        study.run("shared", "tiny", "s", lambda g: cost.shared(engine, g, None))
        study.run("alone", "tiny", "s", lambda g: cost.alone(engine, g, None))
        study.run("with notes", "tiny", "s", lambda g: cost.shared(engine, g, None, notes=4))
        study.listwise(engine, "tiny")
        places, flops = cost.in_letters(engine, engine.tokenize("best:"), 5)
        assert sorted(places) == [0, 1, 2, 3, 4], "each letter once, whatever the model would say"
        assert flops > 0
    assert [row["way"] for row in rows] == [
        "shared",
        "alone",
        "with notes",
        "first token",
        "written",
        "with reasons",
        "judged",
    ]
    assert rows[0]["ndcg_10"] == rows[1]["ndcg_10"], "a shared job changes no score"
    assert rows[1]["times_the_flops_of_shared"] > 1
    assert rows[2]["times_the_flops_of_shared"] > 1
    assert rows[6]["times_the_flops_of_shared"] > rows[1]["times_the_flops_of_shared"], "reasons are written too"
    kept = [json.loads(line) for path in cost.KEPT.iterdir() for line in path.read_text().splitlines()]
    assert len(kept) == 14
    assert all(row["cpu_seconds"] > 0 for row in kept)
    assert all(sorted(row["order"]) == list(range(12)) for row in kept if len(row["order"]) != 10), "nobody is lost"


def test_a_kill_in_the_middle_of_a_line_costs_that_line(rows: list[dict[str, Any]]) -> None:
    groups, asked = some_groups(3, 4), []

    def judge(group: Group) -> cost.Outcome:
        asked.append(group.id)
        return cost.Outcome([c.id for c in group.candidates], 1e9, 0.5)

    cost.Study(groups, save=True).run("shared", "m", "stack", judge)
    (path,) = cost.KEPT.iterdir()
    path.write_text(path.read_text()[:-9])
    cost.Study(groups, save=True).run("shared", "m", "stack", judge)
    assert asked == ["g0", "g1", "g2", "g2"]
    assert [json.loads(line)["job"].split()[0] for line in path.read_text().splitlines()] == ["g0", "g1", "g2"]


def test_cpu_time_counts_only_on_a_quiet_machine() -> None:
    busy, quiet = (cost.Outcome([], 1.0, 1.0, seconds, share) for seconds, share in ((9.0, 0.5), (2.0, 0.05)))
    assert cost._quiet_mean([busy] * 9 + [quiet] * 5) == 2.0
    assert cost._quiet_mean([busy] * 9 + [quiet] * 4) is None
