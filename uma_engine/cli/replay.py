"""`uma replay`: recompute a decision record, or those of a log, and say whether every bit agrees."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uma_engine.cli.console import open_engine, write_line
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.cascade import recorded_cascade
from uma_engine.tasks.records import SURFACE_FORMAT, candidate_data, checked_record, differences, read_record
from uma_engine.tasks.shortlist import recorded_wishes

SQLITE = b"SQLite format 3\0"


def run(args: argparse.Namespace) -> int:
    if not _is_log(args.record):
        if args.id is not None or args.all:
            raise InvalidRequest(
                f"`{args.record}` is not a decision log",
                hint="`ID` and `--all` choose records of a log",
                param="record",
            )
        with _Engines(args) as engines:
            return _compare(*_again(args, engines, read_record(args.record)))
    if (args.id is None) != args.all:
        raise InvalidRequest(
            f"`{args.record}` is a log of many records",
            hint="name one of them, as in `uma replay LOG 7`, or say `--all`",
            param="record",
        )
    return _replay_log(args)


def _replay_log(args: argparse.Namespace) -> int:
    from uma_engine.decision_log import DecisionLog

    wrong = done = 0
    with DecisionLog(args.record, readonly=True) as log, _Engines(args) as engines:
        for entry in log.entries("rank") if args.all else [log.get(args.id)]:
            if entry.kind != "rank":
                raise InvalidRequest(f"entry {entry.id} is of kind `{entry.kind}` and no ranking", param="record")
            if args.all:
                write_line(f"record {entry.id}")
            record = _with_inputs(args, entry.record)
            whole, gone = _without_forgotten(record)
            wrong += _compare(*_again(args, engines, checked_record(whole)), forgotten=gone)
            done += 1
    if args.all:
        write_line(f"{done - wrong} of {done} records are identical")
    return 1 if wrong else 0


def _is_log(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False  # said by who reads it as a record


def _with_inputs(args: argparse.Namespace, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Job and candidates put back where the log holds digests of them."""
    from uma_engine.decision_log.inputs import needs_inputs, with_inputs
    from uma_engine.tasks.candidates import read_candidates, read_job

    if not needs_inputs(record):
        return record
    if not args.job or not args.candidates:
        raise InvalidRequest(
            "the log keeps digests of job and candidates", hint="give what was ranked with `--job` and `--candidates`"
        )
    people = read_candidates(args.candidates, facts_in_text=record["format"] != SURFACE_FORMAT)
    return with_inputs(record, read_job(args.job), [candidate_data(p) for p in people])


def _without_forgotten(record: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The record of those whom the log still knows: nobody's score depends on who else was there."""
    kept = [i for i, c in enumerate(record["candidates"]) if "text" in c]
    gone = len(record["candidates"]) - len(kept)
    data = {**record, "candidates": [record["candidates"][i] for i in kept]}
    return data | {"results": [record["results"][i] for i in kept]}, gone


class _Engines:
    """The engine that a record asks for; the one before it, if that is the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._key: Any = None
        self._open = contextlib.ExitStack()
        self._engine: Any = None

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def get(self, model: str, adapter: str | None, adapters: Mapping[str, str], options: Mapping[str, Any]) -> Any:
        """Engine and the name of `adapter`."""
        key = (model, adapter, tuple(sorted(adapters.items())), tuple(sorted(options.items())))
        if key != self._key:
            self._open.close()
            self._key = None
            args = argparse.Namespace(**vars(self._args) | {"adapter": adapter})
            self._engine = self._open.enter_context(open_engine(args, model, adapters, **options))
            self._key = key
        return self._engine


def _again(
    args: argparse.Namespace, engines: _Engines, record: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The record and what the same question gives now."""
    options = record["options"]
    engine_options = {name: options["engine"][name] for name in ("max_model_len", "precision")}
    model = args.model or record["stack"]["model"]
    people = [Candidate(c["id"], c["text"], c["facts"], c.get("prior", 0.0)) for c in record["candidates"]]
    asked = {
        "instruction": options["instruction"],
        "max_tokens_per_candidate": options["max_tokens_per_candidate"],
        **recorded_wishes(options),
        **recorded_cascade(options),
    }
    if record["format"] == SURFACE_FORMAT:
        # The surface names its reads' adapters; each is loaded from where it was under the name it had.
        if args.adapter:
            raise InvalidRequest(
                "`--adapter` is given but the record's surface names its adapters",
                hint="put the adapters where they were: " + ", ".join(f"`{a['path']}`" for a in record["adapters"])
                if record["adapters"]
                else "leave it out: no adapter was used",
            )
        engine, _ = engines.get(model, None, {a["name"]: a["path"] for a in record["adapters"]}, engine_options)
        asked |= {"surface": options["surface"], "job_facts": options["job_facts"]}
        return record, engine.rank(record["query"], people, **asked).record
    adapter = args.adapter or (options["adapter_path"] if options["adapter"] else None)
    if options["adapter"] and not adapter:
        raise InvalidRequest("the record used an adapter but not from a directory", hint="name it with `--adapter DIR`")
    engine, name = engines.get(model, adapter, {}, engine_options)
    return record, engine.rank(record["query"], people, adapter=name, labels=options["labels"], **asked).record


def _compare(record: Mapping[str, Any], again: Mapping[str, Any], forgotten: int = 0) -> int:
    found = differences(record, again, partial=forgotten > 0)
    for difference in found[:20]:
        write_line(f"differs  {difference}")
    if found:
        write_line(f"{len(found)} differences: this is not the recorded answer")
        return 1
    rest = f"; {forgotten} were forgotten since" if forgotten else ""
    write_line(f"identical: {len(record['candidates'])} candidates, every logit and score bit for bit{rest}")
    return 0
