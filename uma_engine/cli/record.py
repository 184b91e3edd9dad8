"""`uma record`: look into a decision log, check it, hand out or remove what it holds of one candidate.

Knows the words for a person; the log itself is `tasks/decision_log.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from uma_engine.cli.console import write_json_line, write_line
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.decision_log import DecisionLog
from uma_engine.tasks.results import LogReceipt

PROBLEMS_SHOWN = 50


def run(args: argparse.Namespace) -> int:
    log = DecisionLog(args.log, create=False)
    try:
        return {"verify": _verify, "list": _list, "show": _show, "export": _export, "forget": _forget}[args.action](
            log, args
        )
    finally:
        log.close()


def _verify(log: DecisionLog, args: argparse.Namespace) -> int:
    found = log.verify(_receipts(args.receipt))
    for problem in found.problems[:PROBLEMS_SHOWN]:
        write_line(f"problem  {problem}")
    if not found.ok:
        write_line(f"{len(found.problems)} problems in {found.entries} entries: this is not the log that was written")
        return 1
    head = f", head {found.head.sequence}:{found.head.id}:{found.head.chain}" if found.head else ""
    write_line(f"whole: {found.entries} entries{head}")
    return 0


def _receipts(given: Sequence[str]) -> list[LogReceipt]:
    receipts = []
    for text in given:
        sequence, _, rest = text.partition(":")
        entry_id, _, chain = rest.partition(":")
        if not sequence.isdecimal() or not entry_id or len(chain) != 64:
            raise InvalidRequest(
                f"`--receipt` is `{text}`", hint="write SEQUENCE:ID:CHAIN as `uma rank --log` prints it"
            )
        receipts.append(LogReceipt(entry_id, int(sequence), chain))
    return receipts


def _list(log: DecisionLog, args: argparse.Namespace) -> int:
    for entry in log.entries():
        what = f"{entry.candidates} candidates" if entry.kind == "decision" else "content removed"
        gone = f", {entry.forgotten} forgotten" if entry.forgotten else ""
        write_line(f"{entry.sequence:6}  {entry.id}  {entry.created_at}  {entry.kind:8}  {what}{gone}")
    return 0


def _show(log: DecisionLog, args: argparse.Namespace) -> int:
    write_json_line(log.record(args.entry))
    return 0


def _export(log: DecisionLog, args: argparse.Namespace) -> int:
    write_json_line({"candidate": args.candidate, "decisions": log.export(args.candidate)})
    return 0


def _forget(log: DecisionLog, args: argparse.Namespace) -> int:
    done = log.forget(args.candidate)
    write_line(
        f"removed from {done.contents} decisions; {done.scanned_bytes:,} bytes of {', '.join(done.scanned_files)} searched: nothing left"
    )
    return 0
