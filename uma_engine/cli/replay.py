"""`uma replay`: recompute a decision record and say whether every bit agrees."""

from __future__ import annotations

import argparse

from uma_engine.cli.console import open_engine, write_line
from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.records import differences, read_record


def run(args: argparse.Namespace) -> int:
    record = read_record(args.record)
    options = record["options"]
    if options["adapter"] and not args.adapter:
        args.adapter = options["adapter_path"]
        if not args.adapter:
            raise InvalidRequest(
                "the record used an adapter but not from a directory", hint="name it with `--adapter DIR`"
            )
    candidates = [Candidate(c["id"], c["text"], c["facts"]) for c in record["candidates"]]
    # What decided where candidates were cut, and the arithmetic.
    recorded = {name: options["engine"][name] for name in ("max_model_len", "precision")}
    with open_engine(args, args.model or record["stack"]["model"], **recorded) as (engine, adapter):
        again = engine.rank(
            record["query"],
            candidates,
            adapter=adapter,
            instruction=options["instruction"],
            labels=options["labels"],
            max_tokens_per_candidate=options["max_tokens_per_candidate"],
        ).record
    found = differences(record, again)
    for difference in found[:20]:
        write_line(f"differs  {difference}")
    if found:
        write_line(f"{len(found)} differences: this is not the recorded answer")
        return 1
    write_line(f"identical: {len(candidates)} candidates, every logit and score bit for bit")
    return 0
