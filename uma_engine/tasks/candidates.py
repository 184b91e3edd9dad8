"""Candidates and jobs from files: JSONL or CSV records become `Candidate` values, a text file becomes a job.

Knows file formats, the fields of a profile and how a profile reads as text; does not know models, tokens or scores. A
file that is not what it claims to be ends in a typed error that names the file and the line. Imports no torch.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest, TooLarge, UmaError

__all__ = ["MAX_JOB_BYTES", "MAX_LINE_BYTES", "profile_text", "read_candidates", "read_job"]

Format = Literal["jsonl", "csv"]

MAX_LINE_BYTES = 16 * 2**20
MAX_JOB_BYTES = 4 * 2**20

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_TEXT_FIELDS = ("headline", "summary", "skills", "experience")
_ENTRY_FIELDS = ("title", "years", "description")
# Numeric facts of a profile with their largest value; the smallest is 0.
_NUMBER_FACTS = {
    "rate": math.inf,
    "availability": math.inf,
    "job_success": 100,
    "response_time_hours": math.inf,
    "years_experience": math.inf,
}
_BOM = b"\xef\xbb\xbf"


def read_candidates(path: Path | str, format: Format | None = None, *, facts_in_text: bool = True) -> list[Candidate]:
    """The candidates of a JSONL or CSV file, in file order; `-` reads standard input.

    `format` is taken from the suffix (`.jsonl`, `.ndjson`, `.csv`) unless given, and is `jsonl` for standard input. The
    file is UTF-8, a leading byte order mark and blank lines are passed over.

    A record has `text`, taken as it is, or some of the profile fields `headline`, `summary`, `skills` and
    `experience`, rendered by `profile_text`. A missing or null `id` becomes the record's position, "1", "2", ...; a
    number becomes its decimal string; `prior` is a number of log-odds, 0 if missing. All other fields, and those of an
    object `facts`, become `Candidate.facts` with their types; `rate` (USD per hour), `availability` (hours per week),
    `job_success` (0 to 100), `response_time_hours` and `years_experience` must be numbers or null. In CSV an empty cell
    is null, `skills` are separated by `;`, `experience` is a JSON array or plain text, and columns without a known type
    stay strings.

    Errors: InvalidRequest for anything that is not such a file, naming `file:line`; TooLarge for a line above
    `MAX_LINE_BYTES` or a CSV cell above the limit of the `csv` module.
    """
    name = _display_name(path)
    chosen = format or ("jsonl" if _is_stdin(path) else _FORMATS.get(Path(path).suffix.lower()))
    if chosen not in _FORMATS.values():
        raise InvalidRequest(
            f"cannot read candidates from `{name}`: format `{format or Path(path).suffix}` is not `jsonl` or `csv`",
            hint="name the file `.jsonl` or `.csv`, or give the format",
        )
    candidates: list[Candidate] = []
    first_line: dict[str, int] = {}
    with _open(path, "candidates") as stream:
        records = _jsonl_records(stream, name) if chosen == "jsonl" else _csv_records(stream, name)
        for position, (line, record) in enumerate(records, start=1):
            with _located(f"`{name}:{line}`"):
                candidate = _candidate(record, position, facts_in_text)
            if candidate.id in first_line:
                raise InvalidRequest(
                    f"`{name}:{line}`: id `{candidate.id}` is already used on line {first_line[candidate.id]}",
                    hint="every candidate needs its own `id`; a record without one takes its position",
                    param="id",
                )
            first_line[candidate.id] = line
            candidates.append(candidate)
    if not candidates:
        raise InvalidRequest(f"`{name}` holds no candidates", hint="give at least one record")
    return candidates


def read_job(path: Path | str) -> str:
    """The job's text from a UTF-8 text or markdown file, unchanged but for a byte order mark; `-` reads standard input.

    Errors: InvalidRequest when the file cannot be read, is not UTF-8 (naming the byte offset) or is blank; TooLarge
    above `MAX_JOB_BYTES`.
    """
    name = _display_name(path)
    with _open(path, "job") as stream:
        data = stream.read(MAX_JOB_BYTES + 1)
    if len(data) > MAX_JOB_BYTES:
        raise TooLarge(f"job `{name}` is larger than {MAX_JOB_BYTES} bytes", hint="give the job post as plain text")
    text = _decode(data, f"job `{name}`").removeprefix("\ufeff")
    if not text.strip():
        raise InvalidRequest(f"job `{name}` is blank", hint="the job's text is what candidates are ranked against")
    return text


def profile_text(profile: Mapping[str, Any], *, facts_in_text: bool = True) -> str:
    """A profile as readable text: headline, summary, skills, experience and, unless told otherwise, a line of facts.

    `skills` is a list of strings or one string separated by `;`; `experience` is a list of {title, years, description}
    or plain text. What is missing or null is left out. `name` is never in the text: a score must not depend on it.

    Errors: InvalidRequest when a field has the wrong type or nothing is left to show.
    """
    parts = [_text(profile, "headline"), _text(profile, "summary")]
    if skills := _skills(profile.get("skills")):
        parts.append("Skills: " + ", ".join(skills))
    if experience := _experience(profile.get("experience")):
        parts.append("Experience:\n" + experience)
    if not any(parts):
        raise InvalidRequest(
            "a candidate has neither `text` nor a profile",
            hint="give `text`, or some of " + ", ".join(f"`{field}`" for field in _TEXT_FIELDS),
            param="text",
        )
    if facts_in_text:
        parts.append(_facts_line(profile))
    return "\n\n".join(part for part in parts if part)


def _facts_line(profile: Mapping[str, Any]) -> str:
    years, rate, availability, job_success, response_time = (
        _number(profile, field)
        for field in ("years_experience", "rate", "availability", "job_success", "response_time_hours")
    )
    location = _text(profile, "location")
    facts = (
        years is not None and f"{_count(years, 'year')} of experience",
        rate is not None and f"Rate: {rate} USD/hour",
        availability is not None and f"Available {_count(availability, 'hour')}/week",
        job_success is not None and f"Job success: {job_success}%",
        response_time is not None and f"Replies within {_count(response_time, 'hour')}",
        location and f"Location: {location}",
    )
    return " | ".join(fact for fact in facts if fact)


def _candidate(record: dict[str, Any], position: int, facts_in_text: bool) -> Candidate:
    facts = _facts(record)
    if _text(record, "text"):
        text = record["text"]
        for field in _TEXT_FIELDS:
            if record.get(field):
                raise InvalidRequest(
                    f"a candidate has both `text` and `{field}`", hint="give the text or the profile", param=field
                )
    else:
        text = profile_text({**facts, **record}, facts_in_text=facts_in_text)
    candidate = Candidate(_id(record, position), text, facts, _prior(record))
    for value in (candidate.id, candidate.text, *facts, *facts.values()):
        if isinstance(value, str):
            _check_unicode(value)
    return candidate


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields beside text and profile, and those of the object `facts`, typed and checked."""
    facts = {key: value for key, value in record.items() if key not in ("id", "text", "facts", "prior", *_TEXT_FIELDS)}
    nested = {} if record.get("facts") is None else record["facts"]
    if not isinstance(nested, dict):
        raise InvalidRequest(f"`facts` is {_kind(nested)} but must be an object", param="facts")
    for key, value in nested.items():
        if key in record:
            raise InvalidRequest(f"`{key}` is given twice, beside `facts` and inside it", param=key)
        facts[key] = value
    for key, value in facts.items():
        if isinstance(value, (list, dict)):
            raise InvalidRequest(
                f"fact `{key}` is {_kind(value)} but must be a number, a string, a boolean or null",
                hint="put what the model should read into `text` or the profile fields",
                param=key,
            )
    for key in _NUMBER_FACTS:
        _number(facts, key)
    return facts


def _prior(record: Mapping[str, Any]) -> float:
    value = record.get("prior")
    if isinstance(value, str) and value.strip():  # a cell of CSV
        value = _csv_number(value.strip(), "prior")
    if value is None or value == "":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"`prior` is `{value!r}` but must be a finite number", param="prior")
    return float(value)


def _id(record: Mapping[str, Any], position: int) -> str:
    value = record.get("id")
    if value is None:
        return str(position)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InvalidRequest(f"`id` is {_kind(value)} but must be a string or a number", param="id")
    if not str(value).strip():
        raise InvalidRequest("`id` is blank", hint="leave the id out to use the record's position", param="id")
    return str(value)


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(f"`{field}` is {_kind(value)} but must be a string", param=field)
    return value.strip()


def _number(record: Mapping[str, Any], field: str) -> int | float | None:
    """A field that is a finite number in its range, or null. A whole float comes back as an integer: 65, not 65.0."""
    value = record.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"`{field}` is {_kind(value)} but must be a number or null", param=field)
    most = _NUMBER_FACTS.get(field, math.inf)
    if value in (math.inf, -math.inf) or not 0 <= value <= most:  # a NaN fails the comparison
        rule = "finite and not negative" if most == math.inf else f"between 0 and {most}"
        raise InvalidRequest(f"`{field}` is `{value}` but must be {rule}", hint="use null for not known", param=field)
    return int(value) if value == int(value) else value


def _count(number: int | float, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _skills(value: Any) -> list[str]:
    if value is None:
        return []
    items = value.split(";") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InvalidRequest(f"`skills` is {_kind(value)} but must be a list of strings", param="skills")
    return [item.strip() for item in items if item.strip()]


def _experience(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list):
        raise InvalidRequest(f"`experience` is {_kind(value)} but must be a list or a string", param="experience")
    return "\n".join(_experience_entry(entry, number) for number, entry in enumerate(value, start=1))


def _experience_entry(entry: Any, number: int) -> str:
    with _located(f"`experience` entry {number}"):
        if not isinstance(entry, dict):
            raise InvalidRequest(f"it is {_kind(entry)} but must be an object", param="experience")
        for key in entry:
            if key not in _ENTRY_FIELDS:
                raise InvalidRequest(
                    f"`{key}` is not a field", hint=f"the fields are `{'`, `'.join(_ENTRY_FIELDS)}`", param="experience"
                )
        title, years, description = _text(entry, "title"), _number(entry, "years"), _text(entry, "description")
        if not title and not description:
            raise InvalidRequest("it has neither `title` nor `description`", param="experience")
    if title and years is not None:
        title = f"{title} ({_count(years, 'year')})"
    return "- " + ": ".join(part for part in (title, description) if part)


# ---- bytes to records ----


def _jsonl_records(stream: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(stream, name):
        if text.strip():
            with _located(f"`{name}:{line}`"):
                record = _parse_json(text)
                if not isinstance(record, dict):
                    raise InvalidRequest(
                        f"the line is {_kind(record)} but must be an object", hint="JSONL has one object a line"
                    )
            yield line, record


def _csv_records(stream: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader((text for _, text in _lines(stream, name)), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1  # a record may span lines; it is named by its first
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise TooLarge(
                    f"`{name}:{line}`: a cell is longer than {csv.field_size_limit()} characters",
                    hint="JSONL takes lines up to 16 MiB",
                ) from None
            raise InvalidRequest(
                f"`{name}:{line}`: not CSV: {error}", hint='double a quote inside a quoted cell: `""`'
            ) from None
        if not row:
            continue
        with _located(f"`{name}:{line}`"):
            if not header:
                header = _csv_header(row)
                continue
            if len(row) != len(header):
                raise InvalidRequest(
                    f"the row has {len(row)} cells but the header has {len(header)}",
                    hint="quote cells that hold commas or line breaks",
                )
            record = _csv_record(dict(zip(header, row, strict=True)))
        yield line, record


def _csv_header(row: list[str]) -> list[str]:
    header = [cell.strip() for cell in row]
    if not any(column in ("text", *_TEXT_FIELDS) for column in header):
        raise InvalidRequest(
            f"the header `{','.join(header)[:200]}` names no column `text` and no profile column",
            hint="the first row names the columns, separated by commas, such as `id,text` or `id,headline,skills`",
        )
    for column in header:
        if not column or header.count(column) > 1:
            raise InvalidRequest(
                f"the header names column `{column}` {header.count(column)} times", hint="name each once"
            )
    if "facts" in header:
        raise InvalidRequest(
            "a CSV file has no column `facts`", hint="give each fact a column of its own", param="facts"
        )
    return header


def _csv_record(row: dict[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {key: cell if cell.strip() else None for key, cell in row.items()}
    for key in _NUMBER_FACTS:
        if record.get(key) is not None:
            record[key] = _csv_number(record[key].strip(), key)
    experience = record.get("experience")
    if experience is not None and experience.lstrip().startswith(("[{", "[]")):
        record["experience"] = _parse_json(experience)
    return record


def _csv_number(cell: str, column: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        pass
    try:
        return float(cell)  # `nan` and `inf` are refused where the range is checked
    except ValueError:
        raise InvalidRequest(f"`{column}` is `{cell[:80]}` but must be a number or empty", param=column) from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"not JSON: {error.msg} at character {error.pos + 1}", hint="JSONL has one complete object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested thousands deep
        raise InvalidRequest(f"not readable JSON: {error}") from None


def _refuse_constant(literal: str) -> Any:
    raise InvalidRequest(f"`{literal}` is not a JSON number", hint="use null for not known")


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise InvalidRequest(f"number `{literal[:80]}` does not fit a double", hint="use null for not known")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequest(f"key `{twice}` is given twice in one object", param=twice)
    return record


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    line = 0
    while data := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(data) > MAX_LINE_BYTES:
            raise TooLarge(
                f"`{name}:{line}`: the line is longer than {MAX_LINE_BYTES} bytes", hint="shorten the candidate's text"
            )
        yield line, _decode(data.removeprefix(_BOM) if line == 1 else data, f"`{name}:{line}`")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{where}: byte `0x{data[error.start]:02x}` at offset {error.start} is not UTF-8",
            hint="save the file as plain text in UTF-8",
        ) from None


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text holds half of a surrogate pair, `\\u{ord(text[error.start]):04x}`", hint="write both halves"
        ) from None


# ---- files and places ----


def _is_stdin(path: Path | str) -> bool:
    return str(path) == "-"


def _display_name(path: Path | str) -> str:
    return "<stdin>" if _is_stdin(path) else str(path)


@contextmanager
def _open(path: Path | str, what: str) -> Iterator[BinaryIO]:
    try:
        if _is_stdin(path):
            if sys.stdin is None:
                raise InvalidRequest("standard input is closed", hint=f"pipe the {what} in, or name a file")
            yield sys.stdin.buffer  # not ours to close
            return
        with Path(path).open("rb") as stream:
            yield stream
    except FileNotFoundError:
        raise InvalidRequest(f"{what} file `{path}` does not exist", hint="`-` reads standard input") from None
    except IsADirectoryError:
        raise InvalidRequest(f"{what} file `{path}` is a directory", hint="name one file") from None
    except OSError as error:
        raise InvalidRequest(f"cannot read {what} file `{path}`: {error.strerror or error}") from None


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the place in front of a message: whoever checks a value need not know where it stood."""
    try:
        yield
    except UmaError as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint, param=error.param) from None


def _kind(value: Any) -> str:
    """What a JSON value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"the string `{value[:80]}`"
    if isinstance(value, (int, float)):
        return f"the number `{value}`"
    return "an array" if isinstance(value, list) else "an object"
