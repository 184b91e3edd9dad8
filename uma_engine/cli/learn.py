"""`uma learn run`: one cycle from outcomes to a promoted adapter, or to a reason why not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from uma_engine.cli.console import write_line


def add_command(commands: Any) -> None:
    actions = commands.add_parser("learn", help="learn from what happened after rankings").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    run = actions.add_parser("run", help="one cycle: outcomes, training, gates, promotion")
    add = run.add_argument
    add("recipe", metavar="RECIPE", help="how to train; its `train` and `dev` are made by the cycle")
    add("--events", required=True, metavar="FILE", help="what happened, JSONL; see docs/training.md")
    add("--jobs", required=True, metavar="FILE", help="who was ranked for which job, JSONL")
    add("--surface", required=True, metavar="NAME", help="whose adapter it is")
    add("--registry", required=True, metavar="DIR", help="as of `uma promote`; a file FREEZE in it stops all learning")
    add("--work", required=True, metavar="DIR", help="receives data, adapter and report")
    add("--replay", metavar="FILE", help="judged jobs of earlier times, such as train.jsonl of `uma data build`")
    add("--budget", type=float, metavar="SECONDS", help="an adapter that took longer is not promoted")
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from uma_engine import Engine
    from uma_engine.train.groups import read_groups
    from uma_engine.train.learn import cycle, read_shown
    from uma_engine.train.outcomes import read_events
    from uma_engine.train.recipe import Recipe
    from uma_engine.train.registry import AdapterHistory

    recipe = Recipe.load(args.recipe)
    replay = read_groups(args.replay) if args.replay else []
    events, shown = read_events(args.events), read_shown(args.jobs)
    with Engine(recipe.base, max_lora_rank=max(64, recipe.lora.rank), device=recipe.device) as engine:
        done = cycle(
            engine,
            recipe,
            AdapterHistory(args.registry),
            args.surface,
            events,
            shown,
            Path(args.work),
            replay=replay,
            budget_s=args.budget,
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
    write_line(f"{done.outcome}: {', '.join(f'{n} {name}' for name, n in done.jobs.items()) or 'no jobs'}")
    for client, reason in done.left_out.items():
        write_line(f"  left out: {client}, who {reason}")
    for reason in (done.report or {}).get("verdict", {}).get("reasons", ()):
        write_line(f"  {reason}")
    return 0
