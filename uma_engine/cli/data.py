"""`uma data`: judged jobs from public data or made to a plan, replies that people marked, requirements in posts that they marked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from uma_engine.cli.console import write_line

if TYPE_CHECKING:
    from uma_engine.train.groups import Group
    from uma_engine.train.synthetic import Occupation, Report


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


def human(args: argparse.Namespace) -> int:
    from uma_engine.train.groups import write_groups
    from uma_engine.train.human import (
        agreement,
        import_upheld,
        read_conversations,
        split_of,
        to_groups,
        write_conversations,
    )

    conversations = import_upheld(args.file) if args.format == "upheld" else read_conversations(args.file)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_conversations(out / "conversations.jsonl", conversations)
    groups = to_groups(conversations, args.quality)
    for split in ("train", "dev", "test"):
        chosen = [g for g in groups if split_of(g.id) == split]
        write_groups(out / f"{split}.jsonl", chosen)
        write_line(f"{split:5} {len(chosen)} conversations")
    for of, found in agreement(conversations).items():
        write_line(
            f"{of}: Krippendorff's alpha {found['alpha']:.3f} over {found['replies']:.0f} replies with {found['marks']:.0f} marks"
        )
    return 0


def requirements(args: argparse.Namespace) -> int:
    from uma_engine.train.chat import write_chats
    from uma_engine.train.requirements import read_skillspan, to_chats

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        sentences = read_skillspan(Path(args.directory) / f"{split}.json")
        # Two of three sentences ask for nothing: half of them teach that as well.
        chats = to_chats(sentences, 0.5 if split == "train" else 1.0)
        write_chats(out / f"{split}.jsonl", chats)
        write_line(
            f"{split:5} {len(chats)} sentences of {len({s.post for s in sentences})} posts,"
            f" {sum(len(s.spans) for s in sentences)} requirements"
        )
    return 0


def synthetic(args: argparse.Namespace) -> int:
    from uma_engine.train.artifact import write_json
    from uma_engine.train.groups import write_groups
    from uma_engine.train.occupations import split_of
    from uma_engine.train.synthetic import Plan, generate, read_occupations

    plan = Plan.load(args.plan)
    # Only what training may see: the occupations of dev and test jobs are on no other side.
    occupations = [o for o in read_occupations(args.onet) if args.all or split_of(o.code) == "train"]
    groups, report = generate(plan, occupations)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.rephrase:
        groups, report = _rephrased(args.rephrase, groups, report, occupations, plan.seed)
    write_groups(out / "synthetic.jsonl", groups)
    write_json(out / "report.json", report.to_dict())
    worst = max(report.divergence.items(), key=lambda item: item[1])
    write_line(
        f"{report.jobs} of {plan.jobs} jobs, {report.cells} cells, {report.near_duplicates:.2%} near-duplicates,"
        f" largest divergence {worst[1]:.5f} bits ({worst[0]})"
    )
    return 0


def _rephrased(
    model: str, groups: list[Group], report: Report, occupations: Sequence[Occupation], seed: int
) -> tuple[list[Group], Report]:
    from uma_engine import Engine
    from uma_engine.train.rephrase import rephrase
    from uma_engine.train.synthetic import near_duplicates

    def say(done: int, total: int) -> None:
        print(f"  {done}/{total} posts rephrased", file=sys.stderr, flush=True)  # noqa: T201

    with Engine(model) as engine:
        found = rephrase(groups, engine, (tool for o in occupations for tool in o.tools), seed=seed, say=say)
    write_line(f"{len(found.kept)} of {len(groups)} posts in other words; kept as they were: {found.rejected}")
    return list(found.groups), replace(
        report,
        rephrased=len(found.kept),
        not_rephrased=found.rejected,
        near_duplicates=round(near_duplicates([g.job for g in found.groups]), 5),
    )
