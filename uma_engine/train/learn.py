"""One cycle of learning from outcomes: events -> judged jobs -> an adapter -> gates -> promoted or not, without anybody's hand.

Knows the order of the steps, a budget and the freeze switch; does not know how any of them works. A part of the jobs, by their id alone, is
kept from training and judges the result; jobs of earlier times are mixed into training and judge it too, so that what was known is not
forgotten. While `FREEZE` lies in the registry nothing is trained or promoted.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest
from uma_engine.train.artifact import write_json
from uma_engine.train.gates import Gates, evaluate, report_digest
from uma_engine.train.groups import Group, share_of, write_groups
from uma_engine.train.outcomes import Event, judged_jobs, planted
from uma_engine.train.recipe import Recipe
from uma_engine.train.registry import AdapterHistory, Refused
from uma_engine.train.trainer import train

__all__ = ["Cycle", "Shown", "cycle", "read_shown"]

FREEZE = "FREEZE"
DEV, TEST = 0.15, 0.25  # shares of the jobs, by a hash of the id
LEAST_JOBS = 20
Shown = Mapping[str, tuple[str, Mapping[str, str]]]  # job -> its text, and the texts of who was ranked by id


@dataclass(frozen=True)
class Cycle:
    """What one cycle came to. `outcome`: promoted, reject, inconclusive, frozen, too few jobs."""

    outcome: str
    adapter: str | None
    left_out: Mapping[str, str]
    jobs: Mapping[str, int]
    report: Mapping[str, Any] | None = None


def cycle(
    engine: Any,
    recipe: Recipe,
    registry: AdapterHistory,
    surface: str,
    events: Sequence[Event],
    shown: Shown,
    work: Path,
    *,
    replay: Sequence[Group] = (),
    replay_share: float = 0.3,
    gates: Gates | None = None,
    budget_s: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Cycle:
    """Learn once. `engine` is of the recipe's base; `work` receives data, adapter and report; `replay`: judged jobs of earlier times.

    Errors:  InvalidRequest as `train`, and for a share outside 0 to 0.9
    """
    if not 0 <= replay_share <= 0.9:
        raise InvalidRequest(f"`replay_share` is {replay_share} but must be from 0 to 0.9", param="replay_share")
    if (registry.path / FREEZE).exists():
        return Cycle("frozen", None, {}, {})
    began = time.monotonic()
    current = registry.aliases().get(surface)
    name = _use(engine, registry, current)
    places = _places(engine, name, events, shown, recipe.sampling.max_candidate_tokens)
    left_out = planted(events, places)
    for client, reason in left_out.items():
        say(f"left out: {client}, who {reason}")
    fresh = judged_jobs(events, shown, left_out)
    old = {split: [g for g in replay if split_of(g.id) == split] for split in ("train", "dev", "test")}
    new = {split: [g for g in fresh if split_of(g.id) == split] for split in ("train", "dev", "test")}
    counts = {split: len(new[split]) for split in new} | {"replayed": 0}
    if len(fresh) < LEAST_JOBS or not all(new.values()):
        return Cycle("too few jobs", None, left_out, counts)
    mixed = round(len(new["train"]) * replay_share / (1 - replay_share)) if old["train"] else 0
    rng = random.Random(f"{recipe.seed}:{surface}")
    again = rng.sample(old["train"], min(mixed, len(old["train"])))
    counts["replayed"] = len(again)
    work.mkdir(parents=True, exist_ok=True)
    write_groups(work / "train.jsonl", _distinct([*new["train"], *again]))
    write_groups(work / "dev.jsonl", _distinct([*new["dev"], *old["dev"]]))
    here = replace(recipe, train=str(work / "train.jsonl"), dev=str(work / "dev.jsonl"))
    made = train(here, work / "adapter", say=say)
    if budget_s is not None and time.monotonic() - began > budget_s:
        return Cycle("out of budget", None, left_out, counts)
    digest = registry.add(made.directory)
    fresh_name = _use(engine, registry, digest)
    judges = _distinct([*new["test"], *old["test"]])
    report = evaluate(
        engine,
        judges,
        adapter=fresh_name,
        against=name,
        max_candidate_tokens=recipe.sampling.max_candidate_tokens,
        gates=gates,
        slice_of=lambda g: "new" if g.id in shown else "old",
        say=say,
    )
    report |= {"adapter_files": digest, "against_files": current}
    report["digest"] = report_digest(report)
    write_json(work / "report.json", report)
    if (registry.path / FREEZE).exists():
        return Cycle("frozen", digest, left_out, counts, report)
    try:
        registry.promote(surface, digest, report, gates)
    except Refused:
        return Cycle(report["verdict"]["decision"], digest, left_out, counts, report)
    return Cycle("promoted", digest, left_out, counts, report)


def split_of(job: str) -> str:
    """Which part a job belongs to, always the same: what judged one adapter never trains the next."""
    share = share_of(job)
    return "test" if share < TEST else "dev" if share < TEST + DEV else "train"


def _use(engine: Any, registry: AdapterHistory, digest: str | None) -> str | None:
    """The engine's name for an adapter of the registry."""
    if digest is None:
        return None
    name = digest[:16]
    if name not in engine.adapters():
        engine.load_adapter(name, registry.directory(digest))
    return name


def _places(
    engine: Any, adapter: str | None, events: Sequence[Event], shown: Shown, most: int
) -> dict[tuple[str, str], float]:
    """Where the current ranking puts whoever something happened to: 1 first, 0 last."""
    found: dict[tuple[str, str], float] = {}
    for job in sorted({e.job for e in events if e.kind == "hired"} & shown.keys()):
        text, people = shown[job]
        ids = list(people)
        answer = engine.rank(text, [people[i] for i in ids], adapter=adapter, max_tokens_per_candidate=most)
        for place, result in enumerate(answer.results):
            found[job, ids[result.index]] = 1 - place / max(1, len(ids) - 1)
    return found


def _distinct(groups: Sequence[Group]) -> list[Group]:
    return list({g.id: g for g in groups}.values())


def read_shown(path: str | Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Jobs with who was ranked, a line of JSON each, as `groups` has them, without grades. Errors: InvalidRequest"""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.strip():
                data = json.loads(line)
                found[data["id"]] = (data["job"], {c["id"]: c["text"] for c in data["candidates"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"`{path}` cannot be read: {type(error).__name__}: {error}", param="jobs") from None
    return found
