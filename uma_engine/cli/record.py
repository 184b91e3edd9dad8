"""`uma record`: look into a decision log, check it, give a person what it holds about them, or forget them.

Knows what is printed; does not know how a log is kept.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from uma_engine.cli.console import printable, write, write_json_line, write_line

if TYPE_CHECKING:  # `uma --help` needs none of it
    from uma_engine.decision_log import DecisionLog, Entry, Forgotten, Verified

__all__ = ["add_commands", "run"]


def add_commands(commands: Any) -> None:
    """The arguments of `uma record`, under the parser's other commands."""
    record = commands.add_parser("record", help="a decision log: list, show, verify, export or forget a candidate")
    record.set_defaults(run=run)
    actions = record.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help)
        parser.add_argument(
            "log", metavar="LOG", help="a file written by the engine's option `decision_log` or `uma rank --log`"
        )
        return parser

    listed = action("list", "one line an entry")
    listed.add_argument("--json", action="store_true", help="print JSON, one object an entry")
    show = action("show", "one record whole, as JSON")
    show.add_argument("id", type=int, metavar="ID")
    verify = action("verify", "recompute every digest; status 1 where anything was changed, cut off or put in")
    verify.add_argument("--expect", metavar="COUNT:DIGEST", help="a head that was kept elsewhere, such as an answer's")
    verify.add_argument("--json", action="store_true", help="print JSON")
    export = action("export", "everything the log holds about one candidate and nothing about others, as JSON")
    forget = action("forget", "remove a candidate's content and prove it by a scan of the files; the chain stays whole")
    forget.add_argument("--json", action="store_true", help="print JSON")
    for parser in (export, forget):
        parser.add_argument("--candidate", required=True, metavar="ID", help="the id that was ranked")
        parser.add_argument("--tenant", metavar="NAME", help="where an id is known in several tenants")


def run(args: argparse.Namespace) -> int:
    from uma_engine.decision_log import DecisionLog

    with DecisionLog(args.log, readonly=args.action != "forget") as log:
        if args.action == "list":
            return _list(log, args.json)
        if args.action == "show":
            write(_pretty(log.get(args.id).record))
            return 0
        if args.action == "verify":
            return _verified(log.verify(args.expect), args.json)
        if args.action == "export":
            write(_pretty(log.export(args.candidate, tenant=args.tenant)))
            return 0
        return _forgotten(log.forget(args.candidate, tenant=args.tenant), args.json)


def _pretty(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _list(log: DecisionLog, as_json: bool) -> int:
    if as_json:
        for entry in log.entries():
            write_json_line(
                {"id": entry.id, "kind": entry.kind, "at": entry.at, "tenant": entry.tenant, "content": entry.content}
                | {"candidates": entry.num_candidates, "forgotten": entry.forgotten, "digest": entry.digest}
            )
        return 0
    width = len(str(len(log)))
    for entry in log.entries():
        what = f"{entry.num_candidates} candidates" if entry.kind == "rank" else ""
        gone = f", {entry.forgotten} forgotten" if entry.forgotten else ""
        write_line(f"{entry.id:>{width}}  {entry.at[:19]}  {entry.kind:6}  {what + gone:28}  {_about(entry)}".rstrip())
    return 0


def _about(entry: Entry) -> str:
    """A few words: the job's first line, or who was forgotten, by what stands for them."""
    if entry.kind == "forget":
        return f"{entry.record['who'][:12]} in {len({n for n, _ in entry.record['parts']})} records"
    text = str(entry.record.get("query", ""))
    return printable(next((line.strip("# ") for line in text.splitlines() if line.strip("# ")), ""), 60)


def _verified(found: Verified, as_json: bool) -> int:
    if as_json:
        write_json_line(
            {"ok": found.ok, "entries": found.entries, "candidates": found.candidates, "forgotten": found.forgotten}
            | {"head": found.head, "problems": list(found.problems)}
        )
        return 0 if found.ok else 1
    for problem in found.problems[:20]:
        write_line(f"wrong  {problem}")
    if not found.ok:
        write_line(f"{len(found.problems)} problems: this is not what was written")
        return 1
    forgotten = f", {found.forgotten} of them forgotten" if found.forgotten else ""
    write_line(f"whole: {found.entries} entries about {found.candidates} candidates{forgotten}")
    write_line(f"head {found.head}")
    write_line("keep the head elsewhere: `--expect` proves later that nothing up to it was rewritten")
    return 0


def _forgotten(found: Forgotten, as_json: bool) -> int:
    if as_json:
        write_json_line(found.to_dict())
        return 0
    if found.entry is None:
        write_line("the log holds nothing about them")
    else:
        write_line(f"forgotten in {len(found.records)} records; entry {found.entry.id} says so, as {found.who}")
    write_line(
        f"scanned {found.scanned_bytes:,} bytes of the log's files for {found.patterns} byte strings of theirs: "
        + ("none is there" if found.clean else "where some still are, they are others' own words:")
    )
    for place in found.found_elsewhere[:20]:
        write_line(f"  {place}")
    write_line(
        "indexes, caches of vectors and a running engine's KV cache have their own: `engine.forget(..., also=[...])`"
    )
    return 0
