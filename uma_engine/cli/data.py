"""`uma data build`: judged jobs from public occupation data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uma_engine.cli.console import write_line


def run(args: argparse.Namespace) -> int:
    from uma_engine.train.occupations import build

    card = build(
        Path(args.source),
        Path(args.out),
        seed=args.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    for split, jobs in card["jobs"].items():
        write_line(f"{split:5} {jobs} jobs")
    return 0
