"""Tables of documents from rows. Knows rows and Markdown; does not know any bench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def newest(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[Row]:
    """The last row for each key, in the order in which the keys first appear."""
    found: dict[Any, Row] = {}
    for row in rows:
        found[key(row)] = row
    return list(found.values())


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in body)])


def source(rows: Sequence[Row]) -> str:
    """Where the rows are from: machine, threads where they are told, date."""
    devices = sorted({row["device"] for row in rows})
    dates = sorted({row["time"][:10] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = f"{rows[0]['threads']} threads; " if "threads" in rows[0] else ""
    return f"{', '.join(devices)}; {threads}{span}."


def interval(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.4f} ({values[1]:+.4f} to {values[2]:+.4f})"
