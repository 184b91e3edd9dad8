"""`uma rank`: a job, candidates, a table that a person likes to read.

Knows the table; does not know how scores are made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from uma_engine.cli.console import open_engine, printable, write_line
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.candidates import read_candidates, read_job
from uma_engine.tasks.records import write_json
from uma_engine.tasks.results import RankAnswer, RankResult

NUMBERS_WIDTH = 68  # of all columns but the candidate's, borders included


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if args.job == "-" and args.candidates == "-":
        raise InvalidRequest("both JOB and CANDIDATES are `-`", hint="only one of them can come from standard input")
    job = read_job(args.job)
    candidates = read_candidates(args.candidates)
    labels = [word.strip() for word in args.labels.split(",")]
    with open_engine(args) as (engine, adapter):
        ready = time.perf_counter()
        answer = engine.rank(
            job,
            candidates,
            adapter=adapter,
            top_n=args.top_n,
            instruction=args.instruction,
            labels=labels,
            max_tokens_per_candidate=args.max_tokens_per_candidate,
            deadline=args.deadline,
        )
    if args.record:
        write_json(args.record, answer.record)
    if args.json:
        write_line(json.dumps(answer.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        show(job, candidates, answer, labels, load_seconds=ready - began)
    return 0


def show(
    job: str, candidates: Sequence[Candidate], answer: RankAnswer, labels: Sequence[str], load_seconds: float
) -> None:
    """Print the table, the warnings and the cost line.

    The reason is the logit of each label and how far the score lies from the mean of all candidates.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    title = next((line.strip("# ").strip() for line in job.splitlines() if line.strip("# ").strip()), "job")
    table = Table(title=printable(title, 90), title_justify="left", header_style="bold", row_styles=("", "dim"))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("candidate", no_wrap=True, overflow="ellipsis")
    table.add_column("why, in numbers", no_wrap=True)
    table.add_column("cut", justify="right", no_wrap=True)
    name_width = max(20, console.width - NUMBERS_WIDTH)
    mean = sum(r.score for r in answer.all_results) / max(1, len(answer.all_results))
    for place, result in enumerate(answer.results, start=1):
        person = candidates[result.index]
        table.add_row(
            str(place),
            f"{result.score:.4f}",
            Text(printable(f"{person.id}  {_headline(person)}", name_width)),
            Text(_reason(result, labels, mean)),
            f"{result.truncated_tokens} tok" if result.truncated_tokens else "",
        )
    console.print(table)
    for warning in answer.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    console.print(Text(_cost(answer, load_seconds), style="bold"))
    stack = answer.stack
    adapter = f" + {stack.adapter} {stack.adapter_digest[:12]}" if stack.adapter_digest else ""
    console.print(
        Text(
            f"{stack.model} {stack.base_digest[:12]}{adapter}, {stack.backend}, uma-engine {stack.version}", style="dim"
        )
    )


def _headline(person: Candidate) -> str:
    """The person's name, where one is known, and the first line of the text."""
    first_line = person.text.strip().splitlines()[0]
    name = person.facts.get("name")
    return f"{name}, {first_line}" if name else first_line


def _reason(result: RankResult, labels: Sequence[str], mean: float) -> str:
    logits = "  ".join(f"{label} {logit:+.2f}" for label, logit in zip(labels, result.logits, strict=True))
    return f"{logits}  mean {result.score - mean:+.4f}"


def _cost(answer: RankAnswer, load_seconds: float) -> str:
    usage, n = answer.usage, len(answer.all_results)
    rate = n / usage.total_time if usage.total_time else 0.0
    share = usage.reused_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0
    return (
        f"{n} candidates in {usage.total_time:.2f} s = {rate:.1f} candidates/s | tokens: {usage.computed_tokens:,} computed, "
        f"{usage.reused_tokens:,} reused ({share:.0%}) | {usage.flops / 1e9:,.0f} GFLOP | model ready in {load_seconds:.1f} s"
    )
