"""`uma train`: a recipe becomes an adapter."""

from __future__ import annotations

import argparse
import sys

from uma_engine.cli.console import write_line


def run(args: argparse.Namespace) -> int:
    from uma_engine.train.recipe import Recipe
    from uma_engine.train.trainer import train

    recipe = Recipe.load(args.recipe)
    made = train(recipe, args.out, say=lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    early = ", stopped early" if made.stopped_early else ""
    write_line(f"adapter {made.digest} in {made.directory}")
    write_line(f"dev {made.measure} {made.best:.4f} at step {made.best_step} of {made.steps}{early}")
    return 0
