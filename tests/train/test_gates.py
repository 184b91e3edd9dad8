# ruff: noqa: F811
"""Gates: what an adapter must reach to take a place, how often they are wrong, and that nobody changes a report or a log unseen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import SMALL, adapter_dirs, tiny_dir  # noqa: F401
from uma_engine import Engine
from uma_engine.cli.main import main
from uma_engine.errors import CorruptFile, InvalidRequest
from uma_engine.ranking.metrics import paired_bootstrap
from uma_engine.train.gates import Gates, evaluate, read_report, report_digest, verdict
from uma_engine.train.groups import Group, Judged, write_groups
from uma_engine.train.registry import AdapterHistory, Refused

WORDS = "rust nurse tax linux paint ledger kernel ward brush audit".split()  # noqa: SIM905


def jobs(count: int, seed: int = 0) -> list[Group]:
    rng = random.Random(seed)
    found = []
    for n in range(count):
        word = rng.choice(WORDS)
        people = [
            Judged(f"c{i}", " ".join([*rng.choices(WORDS, k=6), *([word] * (i < 2))]), 2 * (i < 2)) for i in range(6)
        ]
        found.append(Group(f"{('15', '29')[n % 2]}-{n}/tasks", f"We need {word}.", tuple(people)))
    return found


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, adapter_dirs: dict[str, Path]):
    with Engine(tiny_dir, **SMALL) as made:
        for name, path in adapter_dirs.items():
            made.load_adapter(name, path)
        yield made


def report_of(difference: list[float], **others: Any) -> dict[str, Any]:
    zero = [0.0] * len(difference)
    found = paired_bootstrap(difference, zero, rounds=400)
    spread = {"mean": found.mean, "low": found.low, "high": found.high}
    return {
        "difference": spread,
        "jobs": len(difference),
        "slices": {},
        "invariance": {"broken": 0},
        "injection_lift": {"mean": 0.0},
    } | others


def test_a_report_is_whole_and_repeatable(engine: Engine) -> None:
    groups = jobs(24)
    report = evaluate(engine, groups, adapter="alpha", against=None)
    assert report["digest"] == report_digest(report)
    assert set(report["slices"]) == {"15", "29"}
    assert report["invariance"] == {"jobs": 12, "broken": 0}
    assert report["counterfactual"]["swaps"] > 50
    assert report["counterfactual"]["flips"] > 0, "random weights read names like anything else"
    assert report["counterfactual"]["flips_redacted"] == 0
    assert report["adapter_digest"] != report["against_digest"]
    again = evaluate(engine, groups, adapter="alpha", against=None)
    for key in report.keys() - {"seconds", "digest"}:
        assert report[key] == again[key], key
    same = evaluate(engine, groups, adapter="alpha", against="alpha")
    assert same["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["verdict"]["decision"] == "allow"
    assert not same["verdict"]["improved"]
    with pytest.raises(InvalidRequest):
        evaluate(engine, [], adapter=None, against=None)


def test_the_same_adapter_is_rarely_called_better() -> None:
    rng = random.Random(1)
    trials = [verdict(report_of([rng.gauss(0, 0.06) for _ in range(100)]), Gates()) for _ in range(200)]
    assert sum(v.improved for v in trials) <= 10


def test_a_loss_of_two_points_is_caught() -> None:
    rng = random.Random(2)
    trials = [verdict(report_of([rng.gauss(-0.02, 0.06) for _ in range(100)]), Gates()) for _ in range(100)]
    assert sum(v.decision != "allow" for v in trials) >= 99
    assert sum(v.decision == "reject" for v in trials) >= 80


def test_what_is_rejected() -> None:
    good = [0.05] * 50
    assert verdict(report_of(good), Gates()).decision == "allow"
    assert verdict(report_of(good), Gates()).improved
    broken = report_of(good, invariance={"broken": 1})
    lifted = report_of(good, injection_lift={"mean": 1.5})
    slices = {"15": {"jobs": 40, "mean": -0.2, "low": -0.3, "high": -0.1}}
    moved = report_of(good, counterfactual={"swaps": 100, "flips": 3, "flips_redacted": 1})
    for report in (broken, lifted, moved, report_of(good, slices=slices)):
        found = verdict(report, Gates())
        assert found.decision == "reject"
        assert len(found.reasons) == 1
        assert not found.improved
    unsure = report_of(good, slices={"15": {"jobs": 40, "mean": -0.2, "low": -0.5, "high": 0.1}})
    assert verdict(unsure, Gates()).decision == "inconclusive"
    small = report_of(good, slices={"15": {"jobs": 3, "mean": -0.2, "low": -0.5, "high": -0.1}})
    assert verdict(small, Gates()).decision == "allow", "three jobs say nothing of a slice"


def test_promotions_need_a_report_about_just_them(adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    registry = AdapterHistory(tmp_path / "registry")
    alpha, beta = (registry.add(adapter_dirs[name]) for name in ("alpha", "beta"))
    assert registry.add(adapter_dirs["alpha"]) == alpha
    assert len(list(registry.lines())) == 2

    def report(ours: str, theirs: str | None, difference: float) -> dict[str, Any]:
        data = report_of([difference] * 50, adapter_files=ours, against_files=theirs)
        return data | {"digest": report_digest(data)}

    with pytest.raises(Refused):
        registry.promote("match", alpha, None)
    with pytest.raises(Refused, match="reject"):
        registry.promote("match", alpha, report(alpha, None, -0.1))
    assert registry.aliases() == {}
    registry.promote("match", alpha, report(alpha, None, 0.1))
    with pytest.raises(InvalidRequest, match="would follow"):
        registry.promote("match", beta, report(beta, None, 0.1))
    forged = report(beta, alpha, -0.1) | {"difference": {"mean": 0.1, "low": 0.1, "high": 0.1}}
    with pytest.raises(InvalidRequest, match="not as it was written"):
        registry.promote("match", beta, forged)
    registry.promote("match", beta, report(beta, alpha, 0.1))
    assert registry.aliases() == {"match": beta}
    assert registry.rollback("match") == alpha
    assert registry.rollback("match") is None
    with pytest.raises(InvalidRequest, match="nothing to go back"):
        registry.rollback("match")
    with pytest.raises(InvalidRequest):
        registry.rollback("other")
    registry.promote("match", beta, report(beta, None, 0.1))
    assert AdapterHistory(tmp_path / "registry").aliases() == {"match": beta}
    assert registry.directory(beta).is_dir()


def test_what_was_changed_shows(adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    registry = AdapterHistory(tmp_path / "registry")
    digests = [registry.add(path) for path in adapter_dirs.values()]
    log = tmp_path / "registry" / "log.jsonl"
    lines = log.read_text().splitlines()
    for damaged in (
        lines[1:],
        [lines[0], lines[2]],
        [lines[0].replace(digests[0], digests[1]), *lines[1:]],
        ["{}", *lines],
    ):
        log.write_text("\n".join(damaged) + "\n")
        with pytest.raises(CorruptFile):
            registry.aliases()
    log.write_text("\n".join(lines) + "\n")
    head = registry.head
    log.write_text("\n".join(lines[:-1]) + "\n")
    assert registry.head != head, "a missing end shows against a head that was kept"
    log.write_text("\n".join(lines) + "\n")
    (registry.path / "objects" / digests[0] / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptFile, match="not what it was"):
        registry.directory(digests[0])


def test_on_the_command_line(
    tiny_dir: Path,
    adapter_dirs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_groups(tmp_path / "test.jsonl", jobs(30))
    data, out, registry = (
        str(tmp_path / "test.jsonl"),
        str(tmp_path / "report.json"),
        ["--registry", str(tmp_path / "r")],
    )
    model = ["--model", str(tiny_dir)]
    alpha, beta = (str(adapter_dirs[name]) for name in ("alpha", "beta"))
    assert main(["evaluate", data, *model, "--adapter", alpha, "--against", alpha, "--jobs", "20", "--out", out]) == 0
    report = read_report(out)
    assert report["adapter_files"] == report["against_files"]
    assert main(["promote", "match", alpha, "--report", out, *registry]) == 2, "it is about another place"
    assert main(["evaluate", data, *model, "--adapter", alpha, "--out", out]) == 0
    said = capsys.readouterr().out
    decision = read_report(out)["verdict"]["decision"]
    assert decision in said
    assert main(["promote", "match", alpha, "--report", out, *registry]) == (0 if decision == "allow" else 2)
    changed = json.loads(Path(out).read_text()) | {"jobs": 5}
    Path(out).write_text(json.dumps(changed))
    assert main(["promote", "match", beta, "--report", out, *registry]) == 2
    if decision == "allow":
        assert main(["rollback", "match", *registry]) == 0
    assert main(["rollback", "nothing", *registry]) == 2
