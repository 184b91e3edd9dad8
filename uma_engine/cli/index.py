"""`uma index build|add|delete|info` and `uma match`: a pool of candidates, and who of it fits a job.

Knows arguments and how things look; does not know how anybody is found or scored.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from uma_engine.cli.console import console_output, open_engine, printable, write_json_line, write_line
from uma_engine.errors import InvalidRequest

if TYPE_CHECKING:
    from uma_engine.retrieval import Embedder
    from uma_engine.tasks.match import MatchAnswer

__all__ = ["add_commands"]

_CONDITION = re.compile(r"^\s*([^<>=!]+?)\s*(<=|>=|!=|<|>|=)\s*(.+?)\s*$")


def add_commands(commands: Any, model_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `index` and `match` to the parser of `uma`."""
    index = commands.add_parser("index", help="a pool of candidates that can be searched")
    actions = index.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("build", "make an index of candidates"),
        ("add", "add candidates, or replace those whose id is there"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("index", metavar="INDEX", help="the index's directory")
        action.add_argument("candidates", metavar="CANDIDATES", nargs="+", help="JSONL or CSV files")
        action.add_argument("--words-only", action="store_true", help="BM25 alone, no vectors")
        action.set_defaults(run=_add)
    delete = actions.add_parser("delete", help="delete candidates and what the index keeps of them")
    delete.add_argument("index", metavar="INDEX")
    delete.add_argument("ids", metavar="ID", nargs="+")
    delete.set_defaults(run=_delete)
    info = actions.add_parser("info", help="what an index holds")
    info.add_argument("index", metavar="INDEX")
    info.add_argument("--json", action="store_true", help="print JSON instead of lines")
    info.set_defaults(run=_info)

    match = commands.add_parser("match", help="find and rank candidates of an index for a job")
    match.add_argument("job", metavar="JOB", help="text or markdown file, or `-`")
    match.add_argument("index", metavar="INDEX", help="an index's directory")
    match.add_argument("--top-n", type=int, default=10, metavar="N", help="how many to show (default: 10)")
    cut = match.add_mutually_exclusive_group()
    cut.add_argument("--first", type=int, metavar="M", help="how many the model looks at (default: 100)")
    cut.add_argument("--recall", type=float, metavar="R", help="the least M whose measured recall is R")
    match.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="a hard filter such as `rate<=60`, `country=DE|AT` or `remote=true`; repeatable",
    )
    match.add_argument("--surface", metavar="FILE", help="score by the facts and reads that a TOML file declares")
    match.add_argument("--blend", action="store_true", help="add what the first stage found to what the model reads")
    match.add_argument("--instruction", metavar="TEXT", help="what the model is asked to do")
    match.add_argument("--json", action="store_true", help="print JSON instead of a table")
    model_options(match)
    match.set_defaults(run=_match)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done, total=of)

        yield tell


def _embedder(path: str) -> Embedder | None:
    """The embedder that an index was built with, None for one of words alone."""
    from uma_engine.retrieval import CandidateIndex, Embedder

    with CandidateIndex.open(path) as index:
        wanted = index.info().embedder
    return Embedder() if wanted else None


def _add(args: argparse.Namespace) -> int:
    from pathlib import Path

    from uma_engine.retrieval import CandidateIndex, Embedder
    from uma_engine.tasks.candidates import read_candidates

    exists = (Path(args.index) / "candidates.sqlite").is_file()
    if args.action == "build" and exists:
        with CandidateIndex.open(args.index) as index:
            if index.version:
                raise InvalidRequest(
                    f"`{args.index}` is an index already", hint="add to it with `uma index add`", param="index"
                )
    if args.action == "add" and not exists:
        raise InvalidRequest(f"`{args.index}` is not an index", hint="make one with `uma index build`", param="index")
    embedder = None if args.words_only else Embedder()
    began = time.perf_counter()
    with CandidateIndex(args.index, embedder) as index, _progress() as tell:
        added = changed = 0
        for path in args.candidates:
            counts = index.add(read_candidates(path), tell)
            added, changed = added + counts[0], changed + counts[1]
        version = index.commit(tell)
        count = len(index)
    if embedder is not None:
        embedder.close()
    write_line(
        f"{added} added, {changed} changed, {count} in all; version {version}, {time.perf_counter() - began:.1f} s"
    )
    return 0


def _delete(args: argparse.Namespace) -> int:
    from uma_engine.retrieval import CandidateIndex

    embedder = _embedder(args.index)
    with CandidateIndex.open(args.index, embedder) as index, _progress() as tell:
        gone = index.delete(args.ids)
        version = index.commit(tell) if gone else index.version
    write_line(f"{gone} of {len(args.ids)} were there and are deleted; version {version}")
    return 0 if gone == len(args.ids) else 1


def _info(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from uma_engine.retrieval import CandidateIndex

    with CandidateIndex.open(args.index) as index:
        info = index.info()
    if args.json:
        write_json_line(asdict(info))
        return 0
    write_line(
        f"{info.candidates} candidates, {info.searchable} searchable, {info.pending} pending; version {info.version}"
    )
    write_line(f"{info.bytes / 2**20:.1f} MiB; embedder {info.embedder[:12] if info.embedder else 'none: words alone'}")
    write_line("fields: " + (", ".join(f"{name} ({kind})" for name, kind in info.fields.items()) or "none"))
    recall = ", ".join(f"{depth}: {share:.3f}" for depth, share in sorted(info.recall.items()))
    write_line(f"recall of a cut: {recall or 'never measured'}")
    return 0


def parse_conditions(given: Sequence[str]) -> dict[str, Any]:
    """`rate<=60`, `country=DE|AT`, `remote=true` as the filters of a search. Errors: InvalidRequest"""
    where: dict[str, Any] = {}
    for text in given:
        found = _CONDITION.match(text)
        if not found:
            raise InvalidRequest(
                f"`--where` is `{text}`", hint="write FIELD, a comparison and a value, such as `rate<=60`"
            )
        field, operator, value = found.groups()
        values = [_value(part) for part in value.split("|")]
        if len(values) > 1 and operator != "=":
            raise InvalidRequest(f"`--where` is `{text}`", hint="several values go with `=` alone")
        wanted = {"in": values} if len(values) > 1 else {operator: values[0]}
        if set(wanted) & set(where.setdefault(field, {})):
            raise InvalidRequest(
                f"`--where` compares `{field}` twice in the same way", hint="give each comparison once"
            )
        where[field] |= wanted
    return where


def _value(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _match(args: argparse.Namespace) -> int:
    from uma_engine.ranking.surface import Surface
    from uma_engine.retrieval import CandidateIndex
    from uma_engine.tasks.candidates import read_job

    surface = Surface.load(args.surface) if args.surface else None
    where = parse_conditions(args.where)
    job = read_job(args.job)
    embedder = _embedder(args.index)
    with (
        CandidateIndex.open(args.index, embedder) as index,
        open_engine(args, adapters=surface.adapters if surface else None) as (engine, adapter),
    ):
        answer = engine.match(
            job,
            index,
            args.top_n,
            first=args.first,
            recall=args.recall,
            where=where or None,
            adapter=adapter,
            surface=surface,
            instruction=args.instruction,
            blend=args.blend,
        )
    if args.json:
        write_json_line(answer.to_dict())
    else:
        _show(answer)
    return 0


def _show(answer: MatchAnswer) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("", "score", "first stage", "candidate"):
        table.add_column(name, overflow="fold")
    for place, result in enumerate(answer.results, start=1):
        hit = answer.hits[result.id]
        seen = f"words {hit.by_words or '-'}, vectors {hit.by_vectors or '-'}"
        head = next((line for line in hit.candidate.text.splitlines() if line.strip()), "")
        table.add_row(str(place), f"{result.score:.4f}", seen, Text(printable(f"{result.id}  {head}", 120)))
    cut, usage = answer.cut, answer.usage
    recall = "not measured" if cut.measured_recall is None else f"{cut.measured_recall:.1%}"
    with console_output() as console:
        console.print(table)
        for warning in answer.warnings:
            console.print(Text(f"! {warning}", style="yellow"))
        console.print(
            Text(
                f"{cut.considered:,} considered, {cut.filtered:,} filtered out, {len(answer.hits)} ranked; recall of the cut: {recall}",
                style="dim",
            )
        )
        stages = ", ".join(f"{s.name} {s.seconds:.2f} s" for s in usage.stages)
        console.print(Text(f"{stages}; {usage.computed_tokens:,} tokens computed", style="bold"))
