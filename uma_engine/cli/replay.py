"""`uma replay`: recompute a decision record, or those of a decision log, and say whether every bit agrees."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uma_engine.cli.console import open_engine, write_line
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.decision_log import DecisionLog
from uma_engine.tasks.records import SURFACE_FORMAT, check_record, differences, read_record

SQLITE = b"SQLite format 3\0"


def run(args: argparse.Namespace) -> int:
    if not _is_log(args.record):
        for option in ("entry", "all"):
            if getattr(args, option):
                raise InvalidRequest(f"`--{option}` is given but `{args.record}` is no decision log")
        return _replay(args, read_record(args.record))
    if bool(args.entry) == args.all:
        raise InvalidRequest(
            f"`{args.record}` is a decision log", hint="name a decision with `--entry ID`, or take them with `--all`"
        )
    log = DecisionLog(args.record, create=False)
    try:
        wanted = [args.entry] if args.entry else [e.id for e in log.entries() if e.kind == "decision"]
        failed = []
        for entry in wanted:
            record = log.record(entry)
            _check_full(entry, record)
            check_record(record, f"entry `{entry}`")
            write_line(f"entry {entry}")
            if _replay(args, record):
                failed.append(entry)
    finally:
        log.close()
    if args.all:
        write_line(f"{len(wanted) - len(failed)} of {len(wanted)} decisions are identical")
    return 1 if failed else 0


def _is_log(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False  # the reader of records says why


def _check_full(entry: str, record: Mapping[str, Any]) -> None:
    if not isinstance(record["query"], str):
        raise InvalidRequest(
            f"entry `{entry}` holds digests of its inputs, not the inputs",
            hint="only a log with `decision_log_inputs='full'` can be replayed",
        )


def _replay(args: argparse.Namespace, record: dict[str, Any]) -> int:
    """An engine as the record has it, the same call, and the comparison. With a surface its reads name the adapters, and each is
    loaded from where it was under the name it had.
    """
    options = record["options"]
    adapters: dict[str, str | Path] = {}
    call: dict[str, Any] = {name: options[name] for name in ("instruction", "max_tokens_per_candidate")}
    own_adapter = args.adapter
    if record["format"] == SURFACE_FORMAT:
        if own_adapter:
            raise InvalidRequest(
                "`--adapter` is given but the record's surface names its adapters",
                hint="put the adapters where they were: " + ", ".join(f"`{a['path']}`" for a in record["adapters"])
                if record["adapters"]
                else "leave it out: no adapter was used",
            )
        adapters = {a["name"]: a["path"] for a in record["adapters"]}
        call |= {name: options[name] for name in ("surface", "job_facts")}
    else:
        call["labels"] = options["labels"]
        if options["adapter"] and not own_adapter:
            own_adapter = options["adapter_path"]
            if not own_adapter:
                raise InvalidRequest(
                    "the record used an adapter but not from a directory", hint="name it with `--adapter DIR`"
                )
    args = argparse.Namespace(**vars(args) | {"adapter": own_adapter})
    # What decided where candidates were cut, and the arithmetic.
    engine_options = {name: options["engine"][name] for name in ("max_model_len", "precision")}
    people = [Candidate(c["id"], c["text"], c["facts"]) for c in record["candidates"]]
    with open_engine(args, args.model or record["stack"]["model"], adapters, **engine_options) as (engine, adapter):
        again = engine.rank(record["query"], people, adapter=adapter, **call).record
    return _compare(record, again)


def _compare(record: Mapping[str, Any], again: Mapping[str, Any]) -> int:
    forgotten = record.get("forgotten", 0)
    found = differences(record, again, alone=bool(forgotten))
    for difference in found[:20]:
        write_line(f"differs  {difference}")
    if found:
        write_line(f"{len(found)} differences: this is not the recorded answer")
        return 1
    gone = f" ({forgotten} forgotten since)" if forgotten else ""
    write_line(f"identical: {len(record['candidates'])} candidates{gone}, every logit and score bit for bit")
    return 0
