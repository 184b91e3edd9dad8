"""The decision record of a rank call: enough to recompute it bit for bit, and the comparison that proves it.

Knows the record's form and how two answers are compared; does not know how an answer is computed.
Floats are stored as hexadecimal literals, so that a record loses no bit.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.results import RankResult, StackInfo, Usage

__all__ = ["FORMAT", "differences", "make_record", "read_record", "write_json"]

FORMAT = "uma-decision-record/1"


def make_record(
    *,
    query: str,
    candidates: Sequence[Candidate],
    options: Mapping[str, Any],
    results: Sequence[RankResult],
    stack: StackInfo,
    usage: Usage,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Everything that was asked, what answered, and what came out, as plain JSON data; `results` in input order."""
    return {
        "format": FORMAT,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "query": query,
        "candidates": [{"id": c.id, "text": c.text, "facts": dict(c.facts)} for c in candidates],
        "options": dict(options),
        "stack": asdict(stack),
        "results": [
            {
                "id": r.id,
                "score": r.score.hex(),
                "logits": [x.hex() for x in r.logits],
                "truncated_tokens": r.truncated_tokens,
                "ledger": [asdict(f) for f in r.ledger],
            }
            for r in results
        ],
        "usage": asdict(usage),
        "warnings": list(warnings),
    }


def differences(record: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """What differs between two records of the same question, in words; empty when every bit agrees."""
    found = []
    for key in ("base_digest", "tokenizer_digest", "template_digest", "adapter_digest", "backend", "version"):
        if record["stack"][key] != again["stack"][key]:
            found.append(f"{key}: `{record['stack'][key]}` then, `{again['stack'][key]}` now")
    if len(record["results"]) != len(again["results"]):
        return [*found, f"{len(record['results'])} results then, {len(again['results'])} now"]
    for then, now in zip(record["results"], again["results"], strict=True):
        for key in ("id", "score", "logits", "truncated_tokens"):
            if then[key] != now[key]:
                found.append(f"candidate `{then['id']}`: {key} `{then[key]}` then, `{now[key]}` now")
    return found


def read_record(path: str | Path) -> dict[str, Any]:
    """A decision record from a JSON file; InvalidRequest when it is not one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}", param="record") from error
    except ValueError as error:
        raise InvalidRequest(f"`{path}` is not JSON: {error}", param="record") from error
    needed = {"query", "candidates", "options", "stack", "results"}
    if not isinstance(record, dict) or record.get("format") != FORMAT or not needed <= record.keys():
        raise InvalidRequest(
            f"`{path}` is not a decision record of format `{FORMAT}`", hint="write one with `uma rank --record FILE`"
        )
    return record


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either whole or absent."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be written: {error.strerror}", param="record") from error
    finally:
        partial.unlink(missing_ok=True)
