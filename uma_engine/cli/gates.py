"""`uma evaluate`, `uma promote` and `uma rollback`: an adapter is measured, and takes another one's place if the gates allow it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from uma_engine.cli.console import open_engine, write_line


def add_commands(commands: Any, model_options: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure an adapter against another one on judged jobs")
    add = evaluate.add_argument
    add("data", metavar="JOBS", help="judged jobs that chose nothing, such as test.jsonl of `uma data build`")
    add("--against", metavar="NAME|DIR", help="the adapter whose place it would take (default: the bare base)")
    add("--jobs", type=int, metavar="N", help="so many of the jobs, spread over the file")
    add("--candidates", type=int, metavar="N", help="so many of each job's candidates")
    add("--out", required=True, metavar="FILE", help="the report")
    model_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    promote = commands.add_parser("promote", help="let a surface use an adapter, if its report allows it")
    promote.add_argument("surface", metavar="SURFACE")
    promote.add_argument("adapter", metavar="DIR")
    promote.add_argument("--report", required=True, metavar="FILE", help="of `uma evaluate`")
    back = commands.add_parser("rollback", help="let a surface use what it used before")
    back.add_argument("surface", metavar="SURFACE")
    shown = commands.add_parser("mlflow", help="show a registry in MLflow: runs, models by surface (extra mlflow)")
    shown.add_argument("--to", required=True, metavar="URI", help="MLflow's tracking URI")
    shown.add_argument("--experiment", default="uma-engine", metavar="NAME")
    for parser, run in ((promote, _promote), (back, _rollback), (shown, _mlflow)):
        parser.add_argument(
            "--registry", required=True, metavar="DIR", help="adapters by content, and the log of all changes"
        )
        parser.set_defaults(run=run)


def _evaluate(args: argparse.Namespace) -> int:
    from uma_engine.adapters.shipped import names, shipped
    from uma_engine.train.artifact import adapter_digest, write_json
    from uma_engine.train.gates import evaluate, report_digest
    from uma_engine.train.groups import Group, read_groups, spread

    def directory(given: str | None) -> Path | None:
        if given in names() and not Path(given).exists():
            return shipped(given)
        return None if given is None else Path(given)

    groups = read_groups(args.data)
    groups = spread(groups, args.jobs or len(groups))
    if args.candidates:
        groups = [Group(g.id, g.job, g.candidates[: args.candidates], g.missed) for g in groups]
    ours, theirs = directory(args.adapter), directory(args.against)
    others = {} if theirs is None else {"against": theirs}
    with open_engine(args, adapters=others) as (engine, adapter):
        report = evaluate(
            engine,
            groups,
            adapter=adapter,
            against="against" if others else None,
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
    report["adapter_files"] = None if ours is None else adapter_digest(ours)
    report["against_files"] = None if theirs is None else adapter_digest(theirs)
    report["digest"] = report_digest(report)
    write_json(Path(args.out), report)
    found, difference = report["verdict"], report["difference"]
    write_line(
        f"{found['decision']}: nDCG@10 {report['ndcg_10']['ours']:.4f} against {report['ndcg_10']['theirs']:.4f},"
        f" {difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f}) over {report['jobs']} jobs"
    )
    for reason in found["reasons"]:
        write_line(f"  {reason}")
    return 0


def _promote(args: argparse.Namespace) -> int:
    from uma_engine.train.gates import read_report
    from uma_engine.train.registry import AdapterHistory

    registry = AdapterHistory(args.registry)
    digest = registry.add(args.adapter)
    registry.promote(args.surface, digest, read_report(args.report))
    write_line(f"surface `{args.surface}` uses {digest[:12]} now: {registry.directory(digest)}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from uma_engine.train.registry import AdapterHistory

    digest = AdapterHistory(args.registry).rollback(args.surface)
    write_line(f"surface `{args.surface}` uses {'the bare base' if digest is None else digest[:12]} again")
    return 0


def _mlflow(args: argparse.Namespace) -> int:
    from uma_engine.train.mlflow_export import export
    from uma_engine.train.registry import AdapterHistory

    counts = export(AdapterHistory(args.registry), args.to, args.experiment, write_line)
    write_line(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0
