"""Learning from outcomes, closed: a market with a known truth drifts, the ranking follows, and planted feedback does not lead it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.market import GATES, Market, recipe_of
from tests.tiny import make_tiny_model
from uma_engine import Engine
from uma_engine.cli.main import main
from uma_engine.errors import InvalidRequest
from uma_engine.train.groups import Group, Judged
from uma_engine.train.learn import FREEZE, Shown, cycle
from uma_engine.train.outcomes import Event, judged_jobs, planted, read_events
from uma_engine.train.registry import AdapterHistory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.slow
def test_the_ranking_follows_a_market_that_drifts(base: Path, tmp_path: Path) -> None:
    market, registry = Market(), AdapterHistory(tmp_path / "registry")
    recipe = recipe_of(base, steps=70)
    with Engine(base, num_threads=1, max_loras=8) as engine:

        def used() -> str | None:
            digest = registry.aliases().get("match")
            return None if digest is None else digest[:16]

        first = cycle(engine, recipe, registry, "match", market.run(90, 0), market.shown, tmp_path / "0", gates=GATES)
        assert first.outcome == "promoted", first.report and first.report["verdict"]
        probe = Market(9)
        probe.run(40, 0)
        jobs = list(probe.shown)
        learned = probe.quality(engine, used(), jobs)
        assert learned > probe.quality(engine, None, jobs) + 0.1
        market.wanted = probe.wanted = "remote"
        for job, (_, people) in probe.shown.items():
            probe.truth[job] = {c: 3 * ("remote" in text) for c, text in people.items()}
        after_drift = probe.quality(engine, used(), jobs)
        assert after_drift < learned - 0.1, "the drift costs something"
        for number in range(1, 4):
            start = 100 * number
            events = market.run(90, start)
            shown: Shown = {e.job: market.shown[e.job] for e in events}
            cycle(engine, recipe, registry, "match", events, shown, tmp_path / str(number), gates=GATES)
        recovered = (probe.quality(engine, used(), jobs) - after_drift) / (learned - after_drift)
        assert recovered >= 0.8
        (registry.path / FREEZE).touch()
        frozen = cycle(
            engine, recipe, registry, "match", market.run(90, 900), market.shown, tmp_path / "f", gates=GATES
        )
        assert frozen.outcome == "frozen"
        assert not (tmp_path / "f").exists()


@pytest.mark.slow
def test_planted_feedback_is_left_out(base: Path, tmp_path: Path) -> None:
    market, registry = Market(3), AdapterHistory(tmp_path / "registry")
    with Engine(base, num_threads=1, max_loras=8) as engine:
        clean = cycle(
            engine, recipe_of(base), registry, "match", market.run(90, 0), market.shown, tmp_path / "0", gates=GATES
        )
        assert clean.outcome == "promoted"
        events = market.run(160, 200, poison=0.08)
        shown: Shown = {e.job: market.shown[e.job] for e in events}
        result = cycle(engine, recipe_of(base), registry, "match", events, shown, tmp_path / "1", gates=GATES)
    assert set(result.left_out) == {"rogue-0"}
    texts = [json.loads(line) for line in (tmp_path / "1" / "train.jsonl").read_text().splitlines()]
    by_rogue = {e.job for e in events if e.client == "rogue-0"}
    assert by_rogue
    assert not by_rogue & {g["id"] for g in texts}


def test_too_little_to_learn_from(base: Path, tmp_path: Path) -> None:
    market, registry = Market(), AdapterHistory(tmp_path / "registry")
    with Engine(base, num_threads=1) as engine:
        result = cycle(engine, recipe_of(base), registry, "match", market.run(5, 0), market.shown, tmp_path / "w")
        assert result.outcome == "too few jobs"
        with pytest.raises(InvalidRequest):
            cycle(engine, recipe_of(base), registry, "match", [], {}, tmp_path / "w", replay_share=1.0)
    assert list(registry.lines()) == []


def test_on_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market = Market(4)
    events = market.run(60, 0)
    lines = [{name: getattr(e, name) for name in Event.__slots__} for e in events]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = [
        {"id": job, "job": text, "candidates": [{"id": i, "text": t} for i, t in people.items()]}
        for job, (text, people) in market.shown.items()
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    recipe = f"""
name = "market"
base = "{base}"
train = "x"
dev = "y"
threads = 1
[lora]
rank = 4
[optimizer]
learning_rate = 0.02
max_steps = 4
[evaluation]
every = 4
"""
    (tmp_path / "recipe.toml").write_text(recipe)
    names = ("events", "jobs")
    command = ["learn", "run", str(tmp_path / "recipe.toml"), "--surface", "match"]
    command += [part for name in names for part in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    command += ["--registry", str(tmp_path / "r"), "--work", str(tmp_path / "w")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith(("promoted: ", "reject: ", "inconclusive: ", "allow"))
    assert "train" in said
    (tmp_path / "r" / FREEZE).touch()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("frozen")


def test_events_in_any_order_late_and_twice(tmp_path: Path) -> None:
    shown = {"j": ("job", {"a": "A", "b": "B", "c": "C"}), "k": ("job two", {"a": "A", "b": "B"})}
    lines = [
        {"id": "1", "time": 1.0, "client": "x", "job": "j", "candidate": "a", "kind": "hired"},
        {"id": "2", "time": 9.0, "client": "x", "job": "j", "candidate": "a", "kind": "disputed"},
        {"id": "3", "time": 2.0, "client": "x", "job": "j", "candidate": "b", "kind": "invited"},
        {"id": "4", "time": 3.0, "client": "x", "job": "j", "candidate": "b", "kind": "replied"},
        {"id": "5", "time": 3.0, "client": "x", "job": "k", "candidate": "a", "kind": "viewed"},
        {"id": "6", "time": 3.0, "client": "x", "job": "gone", "candidate": "a", "kind": "hired"},
        {"id": "7", "time": 3.0, "client": "x", "job": "j", "candidate": "gone", "kind": "hired"},
    ]
    path = tmp_path / "events.jsonl"
    expected = [Group("j", "job", (Judged("a", "A", 0), Judged("b", "B", 2), Judged("c", "C", 0)))]
    for seed in range(5):
        mixed = lines * 2
        random.Random(seed).shuffle(mixed)
        path.write_text("\n".join(map(json.dumps, mixed)) + "\n")
        events = read_events(path)
        assert [e.id for e in events] == ["1", "3", "4", "5", "6", "7", "2"]
        assert judged_jobs(events, shown) == expected
    for bad in ({"kind": "loved"}, {"time": float("nan")}, {"job": ""}, {"id": "1", "time": 2.0}):
        path.write_text("\n".join(map(json.dumps, [lines[0], {**lines[2], **bad}])))
        with pytest.raises(InvalidRequest, match="line 2"):
            read_events(path)


def test_who_looks_as_if_they_planted() -> None:
    rng = random.Random(5)
    honest = [Event(f"h{n}", n, f"client-{n % 20}", f"j{n}", f"c{rng.randrange(30)}", "hired") for n in range(200)]
    assert planted(honest) == {}
    friend = [Event(f"f{n}", n, "friend", f"f{n}", "c7", "hired") for n in range(8)]
    assert set(planted([*honest, *friend])) == {"friend"}
    whale = [Event(f"w{n}", n, "whale", f"w{n}", f"c{n % 30}", "hired") for n in range(60)]
    assert set(planted([*honest, *whale])) == {"whale"}
    places = {(e.job, e.candidate): rng.uniform(0.5, 1) for e in honest}
    contrary = [Event(f"x{n}", n, "contrary", f"x{n}", f"c{n}", "hired") for n in range(9)]
    places |= {(e.job, e.candidate): 0.05 for e in contrary}
    assert set(planted([*honest, *contrary], places)) == {"contrary"}
    assert replace(honest[0]) == honest[0]
