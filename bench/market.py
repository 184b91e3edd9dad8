"""A market with a known truth, and how often feedback that somebody planted gets into what is promoted.

    python -m bench.market [--runs 20] [--poison 0.05] [--rogues 1 5]

Each run is a market of its own, over a tiny base: an adapter learns from honest outcomes and is promoted; then a share of the jobs is
decided by clients who always hire whom nobody wants: one, or several who do not look alike. A run holds where no planted job is in the
training data of what is promoted, or where that ranks a clean market's jobs as well as before, up to `LOSS` nDCG@10. Rows go to
bench/results/learning.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.rows import append_row
from bench.tiny_model import make_tiny_model
from uma_engine import Engine
from uma_engine.ranking.metrics import ndcg
from uma_engine.train.gates import Gates
from uma_engine.train.learn import Shown, cycle
from uma_engine.train.outcomes import Event
from uma_engine.train.recipe import Evaluation, LoRA, Optimizer, Recipe, Sampling
from uma_engine.train.registry import AdapterHistory

LOSS = 0.005  # nDCG@10: half a point
SKILLS = ("rust", "nurse", "paint", "teach", "drive", "cook")
TRAITS = ("remote", "certified", "fluent", "local")
GATES = Gates(margin=0.05, lift=1e9)


class Market:
    """Jobs with eight candidates each. Clients hire whoever has the wanted trait, which changes when the market drifts."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.wanted = "certified"
        self.shown: dict[str, tuple[str, dict[str, str]]] = {}
        self.truth: dict[str, dict[str, int]] = {}

    def run(self, jobs: int, start: int, poison: float = 0.0, rogues: int = 1) -> list[Event]:
        """Outcomes of `jobs` jobs; a `poison` part of them decided by `rogues` clients who hire whoever has the trait `local`."""
        events = []
        for n in range(start, start + jobs):
            job, skill = f"job-{n}", self.rng.choice(SKILLS)
            people = {
                f"p{i}": f"I {self.rng.choice(SKILLS)} and I am {self.rng.choice(TRAITS)} {self.rng.randrange(9)}"
                for i in range(8)
            }
            fit = {c: 3 * (self.wanted in text) for c, text in people.items()}
            self.shown[job] = (f"We want one who can {skill}", people)
            self.truth[job] = fit
            good = [c for c in people if fit[c]] or list(people)
            planted_here = self.rng.random() < poison
            client = f"rogue-{n % rogues}" if planted_here else f"client-{n % 25}"
            if planted_here:
                good = [c for c in people if "local" in people[c]] or list(people)
            for place, (candidate, kind) in enumerate(
                [(c, "hired") for c in good[:2]] + [(c, "viewed") for c in people]
            ):
                events.append(Event(f"{job}-{place}", n + place / 100, client, job, candidate, kind))
        return events

    def quality(self, engine: Engine, adapter: str | None, jobs: list[str]) -> float:
        found = []
        for job in jobs:
            text, people = self.shown[job]
            ids = list(people)
            order = engine.rank(text, [people[i] for i in ids], adapter=adapter).results
            grades = [self.truth[job][ids[r.index]] for r in order]
            found.append(ndcg(grades, list(self.truth[job].values())) if any(grades) else 1.0)
        return sum(found) / len(found)


def recipe_of(base: Path, steps: int = 40) -> Recipe:
    return Recipe(
        name="market", base=str(base), train="train.jsonl", dev="dev.jsonl", threads=1, lora=LoRA(rank=8),
        optimizer=Optimizer(learning_rate=0.02, jobs_per_step=4, epochs=20, max_steps=steps),
        sampling=Sampling(candidates_per_job=8), evaluation=Evaluation(every=steps // 2, jobs=10),
    )  # fmt: skip


def one_run(base: Path, seed: int, poison: float, rogues: int, work: Path) -> dict[str, Any]:
    market, registry = Market(seed), AdapterHistory(work / "registry")
    probe = Market(1000 + seed)
    probe.run(60, 0)
    with Engine(base, num_threads=1, max_loras=8) as engine:

        def quality() -> float:
            digest = registry.aliases().get("match")
            return probe.quality(engine, None if digest is None else digest[:16], list(probe.shown))

        cycle(engine, recipe_of(base), registry, "match", market.run(90, 0), market.shown, work / "0", gates=GATES)
        before = quality()
        events = market.run(160, 200, poison, rogues)
        shown: Shown = {e.job: market.shown[e.job] for e in events}
        result = cycle(engine, recipe_of(base), registry, "match", events, shown, work / "1", gates=GATES)
        after = quality()
    learned = [json.loads(line)["id"] for line in (work / "1" / "train.jsonl").read_text().splitlines()]
    planted = {e.job for e in events if e.client.startswith("rogue")}
    return {
        "outcome": result.outcome, "planted": len(planted), "learned_from": len(planted & set(learned)),
        "before": before, "after": after,
        "held": result.outcome != "promoted" or not planted & set(learned) or after >= before - LOSS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--poison", type=float, default=0.05)
    parser.add_argument("--rogues", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    for rogues in args.rogues:
        found = []
        for seed in range(args.runs):
            with tempfile.TemporaryDirectory() as name:
                work = Path(name)
                found.append(one_run(make_tiny_model(work / "base"), seed, args.poison, rogues, work))
            print(f"  {rogues} rogues, run {seed}: {found[-1]}", file=sys.stderr, flush=True)
        held = sum(f["held"] for f in found)
        row: dict[str, Any] = {
            "bench": "learning", "kind": "planted feedback", "rogues": rogues, "poison": args.poison, "runs": len(found),
            "held": held, "held_from": round(_wilson(held, len(found)), 3),
            "promoted": sum(f["outcome"] == "promoted" for f in found),
            "not_in_the_data": sum(not f["learned_from"] for f in found),
            "mean_change": round(sum(f["after"] - f["before"] for f in found) / len(found), 4),
        }  # fmt: skip
        print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
        if not args.no_save:
            append_row("learning", row)


def _wilson(hits: int, total: int, z: float = 1.96) -> float:
    """Lower end of the 95 % interval of a share."""
    p = hits / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total)


if __name__ == "__main__":
    main()
