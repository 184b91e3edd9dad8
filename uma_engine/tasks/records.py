"""The decision record of a rank call: enough to recompute it bit for bit, and the comparison that proves it.

Knows the record's form and how two answers are compared; does not know how an answer is computed.
Floats are stored as hexadecimal literals, so that a record loses no bit.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.results import AdapterUse, RankResult, StackInfo, SurfaceResult, Usage

__all__ = [
    "FORMAT",
    "SURFACE_FORMAT",
    "candidate_data",
    "check_writable",
    "checked_record",
    "differences",
    "make_record",
    "make_surface_record",
    "read_record",
    "write_json",
]

FORMAT = "uma-decision-record/1"
SURFACE_FORMAT = "uma-decision-record/2"  # with a surface: several reads and adapters, facts, redactions, ties

_DIGESTS = ("base_digest", "tokenizer_digest", "template_digest", "adapter_digest", "backend", "version")
_ANSWER = ("id", "score", "logits", "truncated_tokens", "ledger")
_SURFACE_ANSWER = (*_ANSWER, "place", "tied_with", "redactions")
_SHORTLISTED = ("deliberation", "assessment")  # what a result of the shortlist has besides
# What a replay reads: types, or tuples of types, in the places of values. A list stands for all of its items.
_SHAPE: dict[str, Any] = {
    "query": str,
    "candidates": [{"id": str, "text": str, "facts": dict}],
    "options": {
        "adapter": (str, NoneType),
        "adapter_path": (str, NoneType),
        "instruction": str,
        "labels": [str],
        "max_tokens_per_candidate": (int, NoneType),
        "engine": {"max_model_len": int, "precision": str},
    },
    "stack": {"model": str, **dict.fromkeys(_DIGESTS, str), "adapter_digest": (str, NoneType)},
    "results": [{"id": str, "score": str, "logits": [str], "truncated_tokens": int, "ledger": [dict]}],
    "warnings": [str],
}
_SURFACE_SHAPE: dict[str, Any] = _SHAPE | {
    "options": {
        "surface": dict,
        "surface_digest": str,
        "job_facts": dict,
        "instruction": str,
        "max_tokens_per_candidate": (int, NoneType),
        "engine": {"max_model_len": int, "precision": str},
    },
    "adapters": [{"name": str, "digest": str, "path": str}],
    "results": [_SHAPE["results"][0] | {"place": int, "tied_with": int, "redactions": [dict]}],
}
_HINT = "records are written by `uma rank --record FILE` and not meant to be edited"
_WORDS = {str: "a string", int: "an integer", dict: "an object", list: "an array", NoneType: "null"}


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
        "candidates": [candidate_data(c) for c in candidates],
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


def candidate_data(candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain data; `prior` where there is one."""
    data: dict[str, Any] = {"id": candidate.id, "text": candidate.text, "facts": dict(candidate.facts)}
    return data | ({"prior": float(candidate.prior)} if candidate.prior else {})


def make_surface_record(
    *,
    query: str,
    candidates: Sequence[Candidate],
    options: Mapping[str, Any],
    results: Sequence[SurfaceResult],
    stack: StackInfo,
    adapters: Sequence[AdapterUse],
    usage: Usage,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """As `make_record`, for a surface: its declaration is among the options, calibrations included, so that a replay needs
    no file but the adapters'. Ledgers hold plain numbers: JSON gives back the same double.
    """
    record = make_record(
        query=query,
        candidates=candidates,
        options=options,
        results=results,
        stack=stack,
        usage=usage,
        warnings=warnings,
    )
    for entry, result in zip(record["results"], results, strict=True):
        for line in entry["ledger"]:
            line["logits"] = list(line["logits"])
        entry |= {
            "place": result.place,
            "tied_with": result.tied_with,
            "redactions": [asdict(r) for r in result.redactions],
        }
    return record | {"format": SURFACE_FORMAT, "adapters": [asdict(a) for a in adapters]}


def differences(record: Mapping[str, Any], again: Mapping[str, Any], *, partial: bool = False) -> list[str]:
    """What differs between two records of the same question, in words; empty when every bit agrees.

    `partial`: of the record some candidates are left out, so what it says of all together (places, ties, warnings) is not compared.
    """
    found = []
    for key in _DIGESTS:
        if record["stack"][key] != again["stack"][key]:
            found.append(f"{key}: `{record['stack'][key]}` then, `{again['stack'][key]}` now")
    if record["format"] != again["format"]:
        return [*found, f"format: `{record['format']}` then, `{again['format']}` now"]
    answer: tuple[str, ...] = _ANSWER
    if record["format"] == SURFACE_FORMAT:
        answer = _SURFACE_ANSWER
        digests = [{a["name"]: a["digest"] for a in r["adapters"]} for r in (record, again)]
        for name in sorted(digests[0].keys() | digests[1].keys()):
            if digests[0].get(name) != digests[1].get(name):
                found.append(f"adapter `{name}`: `{digests[0].get(name)}` then, `{digests[1].get(name)}` now")
        then_declared, now_declared = (r["options"]["surface_digest"] for r in (record, again))
        if then_declared != now_declared:
            found.append(f"surface_digest: `{then_declared}` then, `{now_declared}` now")
        then_found, now_found = (r["options"].get("finders", {}) for r in (record, again))
        for name in sorted(then_found.keys() | now_found.keys()):
            if then_found.get(name) != now_found.get(name):
                found.append(f"finder `{name}`: `{then_found.get(name)}` then, `{now_found.get(name)}` now")
    if len(record["results"]) != len(again["results"]):
        found.append(f"{len(record['results'])} results then, {len(again['results'])} now")
        return found
    if partial:
        answer = tuple(key for key in answer if key not in ("place", "tied_with"))
    for then, now in zip(record["results"], again["results"], strict=True):
        for key in answer:
            if then[key] != now[key]:
                found.append(f"candidate `{then['id']}`: {key} `{then[key]}` then, `{now[key]}` now")
        for key in _SHORTLISTED:
            if then.get(key) != now.get(key):
                found.append(f"candidate `{then['id']}`: {key} `{then.get(key)}` then, `{now.get(key)}` now")
    then_warned, now_warned = _warnings(record), _warnings(again)
    if then_warned != now_warned and not partial:
        found.append(f"warnings: `{then_warned}` then, `{now_warned}` now")
    return found


def _warnings(record: Mapping[str, Any]) -> list[str]:
    """A record's warnings without its model's name: the same files may lie elsewhere today, and digests tell them apart."""
    return [warning.replace(record["stack"]["model"], "MODEL") for warning in record["warnings"]]


def read_record(path: str | Path) -> dict[str, Any]:
    """A decision record from a JSON file; InvalidRequest when it is not one or lacks what a replay needs."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}", param="record") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`{path}` is not JSON: {error}", param="record") from error
    if not isinstance(record, dict) or record.get("format") not in (FORMAT, SURFACE_FORMAT):
        raise InvalidRequest(
            f"`{path}` is not a decision record of format `{FORMAT}` or `{SURFACE_FORMAT}`", hint=_HINT
        )
    return checked_record(record)


def checked_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record, which has what a replay needs. Errors: InvalidRequest naming the place"""
    _check_shape(record, _SHAPE if record["format"] == FORMAT else _SURFACE_SHAPE, "")
    return record


def _check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises InvalidRequest naming the first place at which `value` is not as `shape` says."""
    kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InvalidRequest(
            f"the record's `{where}` is `{json.dumps(value)[:80]}` but must be {' or '.join(_WORDS[k] for k in kinds)}",
            hint=_HINT,
            param="record",
        )
    if isinstance(shape, list):
        for index, item in enumerate(value):
            _check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            place = f"{where}.{key}" if where else key
            if key not in value:
                raise InvalidRequest(
                    f"the record has no `{place}`",
                    hint=_HINT,
                    param="record",
                )
            _check_shape(value[key], inner, place)


def check_writable(path: str | Path) -> None:
    """Raises InvalidRequest unless `write_json` could write there now; leaves nothing behind."""
    target, partial = _places(path)
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "not a file"
        raise InvalidRequest(f"`{path}` cannot be written: it is {kind}", hint="name a file", param="record")
    with _writing(path, partial):
        partial.touch()


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either whole or absent."""
    target, partial = _places(path)
    with _writing(path, partial):
        partial.write_text(json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(target)


def _places(path: str | Path) -> tuple[Path, Path]:
    """Where the file goes, links followed, and where it is made."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name[:200]}.{os.getpid()}.part")


@contextlib.contextmanager
def _writing(path: str | Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(
            f"`{path}` cannot be written: {error.strerror}", hint="name a file in a directory of yours", param="record"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
