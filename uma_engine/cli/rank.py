"""`uma rank`: a job, candidates, a table that a person likes to read.

Knows the table; does not know how scores are made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from uma_engine.catalog import DEFAULT_ADAPTER, DEFAULT_MODEL
from uma_engine.cli.console import console_output, open_engine, printable, write_json_line
from uma_engine.cli.ledger import show_ledger
from uma_engine.cli.words import show_shortlist
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.surface import Surface
from uma_engine.tasks.candidates import read_candidates, read_job
from uma_engine.tasks.records import check_writable, write_json
from uma_engine.tasks.results import RankAnswer, RankResult, SurfaceAnswer, Usage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NAME_WIDTH = 8  # what the candidate's column has at the least
ROOMY_NAME_WIDTH = 20  # what it has at the least beside a column of reasons


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if args.job == "-" and args.candidates == "-":
        raise InvalidRequest("both JOB and CANDIDATES are `-`", hint="only one of them can come from standard input")
    surface = Surface.load(args.surface) if args.surface else None
    job_facts = _job_facts(args.job_fact) if surface else None
    if args.job_fact and not surface:
        raise InvalidRequest("`--job-fact` is given without `--surface`", hint="only a surface's facts read it")
    job = read_job(args.job)
    # A surface has numbers as facts: in the text a model could misread them, and they would count twice.
    candidates = read_candidates(args.candidates, facts_in_text=surface is None)
    labels = [word.strip() for word in args.labels.split(",")]
    if args.blend:
        if surface is not None:
            raise InvalidRequest(
                "`--blend` is given with `--surface`", hint="a surface declares what its score is made of"
            )
        from uma_engine.retrieval.prior import with_priors

        candidates = with_priors(job, candidates)
    args.adapter = _default_adapter(args)
    if args.record:
        check_writable(args.record)  # now, not after minutes of work
    log = {"decision_log": args.log, "decision_log_content": args.log_content} if args.log else {}
    with open_engine(args, adapters=surface.adapters if surface else None, **log) as (engine, adapter):
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
            surface=surface,
            job_facts=job_facts,
            explain=args.explain,
            explain_top=args.explain_top,
            deliberate=args.deliberate,
            cascade=args.cascade,
            budget=args.budget,
        )
    try:  # neither a full disk nor a reader that left may cost the other half of the answer
        if args.json:
            write_json_line(answer.to_dict())
        else:
            with console_output() as console:
                show(console, job, candidates, answer, labels, load_seconds=ready - began)
    finally:
        if args.record:
            write_json(args.record, answer.record)
    return 0


def _default_adapter(args: argparse.Namespace) -> str | None:
    """The adapter that was asked for, or the one that was trained for just this question."""
    asked_otherwise = args.no_adapter or args.surface or args.instruction is not None or args.labels != "yes,no"
    if args.adapter and args.no_adapter:
        raise InvalidRequest("`--adapter` and `--no-adapter` are given", hint="give one of them")
    return args.adapter or (DEFAULT_ADAPTER if args.model == DEFAULT_MODEL and not asked_otherwise else None)


def _job_facts(given: Sequence[str]) -> dict[str, float]:
    facts: dict[str, float] = {}
    for item in given:
        name, _, text = item.partition("=")
        try:
            facts[name.strip()] = float(text)
        except ValueError:
            raise InvalidRequest(f"`--job-fact` is `{item}`", hint="write NAME=NUMBER, such as `budget=60`") from None
    return facts


def show(
    console: Console,
    job: str,
    candidates: Sequence[Candidate],
    answer: RankAnswer,
    labels: Sequence[str],
    load_seconds: float,
) -> None:
    """Print the table, the warnings and the cost line.

    With a surface the table is the ledger. Without one the reason is the logit of each label and how far the score lies from
    the mean of all candidates. It has a column where there is room, else a second line; on a terminal too narrow for that a
    note says where to find it.
    """
    from rich.text import Text

    title = next((line.strip("# ").strip() for line in job.splitlines() if line.strip("# ").strip()), "job")
    if isinstance(answer, SurfaceAnswer):
        headlines = {r.index: f"{r.id}  {_headline(candidates[r.index])}" for r in answer.results}
        show_ledger(console, printable(title, 90), headlines, answer)
    else:
        mean = sum(r.score for r in answer.all_results) / max(1, len(answer.all_results))
        reasons = [_reason(result, labels, mean) for result in answer.results]
        table, reasons_fit = _table(console.width, printable(title, 90), candidates, answer, reasons)
        console.print(table)
        if not reasons_fit:
            console.print(Text("the numbers behind the scores need a wider terminal, or `--json`", style="dim"))
    show_shortlist(console, answer)
    for warning in answer.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    console.print(Text(_cost(answer, load_seconds), style="bold"))
    if answer.logged is not None:
        console.print(Text(f"record {answer.logged.id} of the decision log, head {answer.logged.head}", style="dim"))
    stack = answer.stack
    adapter = f" + {stack.adapter} {stack.adapter_digest[:12]}" if stack.adapter_digest else ""
    if isinstance(answer, SurfaceAnswer):
        adapter = "".join(f" + {a.name} {a.digest[:12]}" for a in answer.adapters)
    console.print(
        Text(
            f"{stack.model} {stack.base_digest[:12]}{adapter}, {stack.backend}, uma-engine {stack.version}", style="dim"
        )
    )


def _table(
    width: int, title: str, candidates: Sequence[Candidate], answer: RankAnswer, reasons: Sequence[str]
) -> tuple[Table, bool]:
    """The table, at most `width` wide where that can be, and whether it holds the reasons."""
    from rich.table import Table
    from rich.text import Text

    reason_width = max((len(reason) for reason in reasons), default=0)
    cuts = [f"{r.truncated_tokens} tok" if r.truncated_tokens else "" for r in answer.results]
    numbers = {"#": len(str(len(cuts))), "score": 6}
    if any(cuts):
        numbers["cut"] = max(len(cut) for cut in cuts)
    free = width - sum(w + 3 for w in numbers.values()) - 4  # a column has 3 of padding and border, the table 1 more
    has_column = free - reason_width - 3 >= ROOMY_NAME_WIDTH
    name_width = max(NAME_WIDTH, free - reason_width - 3 if has_column else free)
    has_second_line = not has_column and reason_width <= name_width

    table = Table(title=title, title_justify="left", header_style="bold", row_styles=("", "dim"))
    table.add_column("#", justify="right", no_wrap=True, min_width=numbers["#"])
    table.add_column("score", justify="right", no_wrap=True, min_width=numbers["score"])
    table.add_column("candidate", no_wrap=True, overflow="ellipsis", min_width=NAME_WIDTH, max_width=name_width)
    if has_column:
        table.add_column("why, in numbers", no_wrap=True, min_width=reason_width)
    if "cut" in numbers:
        table.add_column("cut", justify="right", no_wrap=True, min_width=numbers["cut"])
    for place, (result, reason, cut) in enumerate(zip(answer.results, reasons, cuts, strict=True), start=1):
        person = candidates[result.index]
        name = printable(f"{person.id}  {_headline(person)}", name_width)
        cells = [Text(f"{name}\n{reason}" if has_second_line else name)]
        if has_column:
            cells.append(Text(reason))
        if "cut" in numbers:
            cells.append(Text(cut))
        table.add_row(str(place), f"{result.score:.4f}", *cells)
    return table, has_column or has_second_line


def _headline(person: Candidate) -> str:
    """The person's name, where one is known, and the first line of the text."""
    first_line = person.text.strip().splitlines()[0]
    name = person.facts.get("name")
    return f"{name}, {first_line}" if name else first_line


def _reason(result: RankResult, labels: Sequence[str], mean: float) -> str:
    logits = "  ".join(f"{label} {logit:+.2f}" for label, logit in zip(labels, result.logits, strict=True))
    prior = "".join(f"  prior {f.value:+.2f}" for f in result.ledger if f.name == "prior")
    return f"{logits}{prior}  mean {result.score - mean:+.4f}"


def _spent(usage: Usage) -> str:
    return f"{usage.gpu_seconds:.2f} GPU-s" if usage.gpu_seconds else f"{usage.core_seconds:.2f} core-s"


def _cost(answer: RankAnswer, load_seconds: float) -> str:
    usage, n = answer.usage, len(answer.all_results)
    rate = n / usage.total_time if usage.total_time else 0.0
    share = usage.reused_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0
    flops = usage.flops + usage.attention_flops
    return (
        f"{n} candidates in {usage.total_time:.2f} s = {rate:.1f} candidates/s | tokens: {usage.computed_tokens:,} computed, "
        f"{usage.reused_tokens:,} reused ({share:.0%}) | {flops / 1e9:,.0f} GFLOP, {_spent(usage)} | "
        f"model ready in {load_seconds:.1f} s"
    )
