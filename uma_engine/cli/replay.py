"""`uma replay`: recompute a decision record and say whether every bit agrees."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from uma_engine.cli.console import open_engine, write_line
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.records import SURFACE_FORMAT, differences, read_record
from uma_engine.tasks.shortlist import recorded_wishes


def run(args: argparse.Namespace) -> int:
    record = read_record(args.record)
    options = record["options"]
    if record["format"] == SURFACE_FORMAT:
        return _replay_surface(args, record)
    if options["adapter"] and not args.adapter:
        args.adapter = options["adapter_path"]
        if not args.adapter:
            raise InvalidRequest(
                "the record used an adapter but not from a directory", hint="name it with `--adapter DIR`"
            )
    with open_engine(args, args.model or record["stack"]["model"], **_recorded(options)) as (engine, adapter):
        again = engine.rank(
            record["query"],
            _people(record),
            adapter=adapter,
            instruction=options["instruction"],
            labels=options["labels"],
            max_tokens_per_candidate=options["max_tokens_per_candidate"],
            **recorded_wishes(options),
        ).record
    return _compare(record, again)


def _replay_surface(args: argparse.Namespace, record: Mapping[str, Any]) -> int:
    """The surface names its reads' adapters; each is loaded from where it was under the name it had."""
    if args.adapter:
        raise InvalidRequest(
            "`--adapter` is given but the record's surface names its adapters",
            hint="put the adapters where they were: " + ", ".join(f"`{a['path']}`" for a in record["adapters"])
            if record["adapters"]
            else "leave it out: no adapter was used",
        )
    options = record["options"]
    adapters = {a["name"]: a["path"] for a in record["adapters"]}
    model = args.model or record["stack"]["model"]
    with open_engine(args, model, adapters, **_recorded(options)) as (engine, _):
        again = engine.rank(
            record["query"],
            _people(record),
            surface=options["surface"],
            job_facts=options["job_facts"],
            instruction=options["instruction"],
            max_tokens_per_candidate=options["max_tokens_per_candidate"],
            **recorded_wishes(options),
        ).record
    return _compare(record, again)


def _people(record: Mapping[str, Any]) -> list[Candidate]:
    return [Candidate(c["id"], c["text"], c["facts"]) for c in record["candidates"]]


def _recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """What decided where candidates were cut, and the arithmetic."""
    return {name: options["engine"][name] for name in ("max_model_len", "precision")}


def _compare(record: Mapping[str, Any], again: Mapping[str, Any]) -> int:
    found = differences(record, again)
    for difference in found[:20]:
        write_line(f"differs  {difference}")
    if found:
        write_line(f"{len(found)} differences: this is not the recorded answer")
        return 1
    write_line(f"identical: {len(record['candidates'])} candidates, every logit and score bit for bit")
    return 0
