"""`uma models`: the models known by name, and what of them is in the cache."""

from __future__ import annotations

import argparse

from uma_engine.catalog import list_models, resolve
from uma_engine.cli.console import FetchProgress, console_output, write_json_line, write_line


def run(args: argparse.Namespace) -> int:
    if args.fetch:
        with FetchProgress() as progress:
            path = resolve(args.fetch, progress=progress)
        write_line(str(path))
        return 0
    entries = list_models()
    if args.json:
        rows = [
            {"name": e.name, "bytes": e.size, "licence": e.licence, "cached": e.cached, "about": e.description}
            for e in entries
        ]
        write_json_line(rows)
        return 0
    from rich.table import Table

    table = Table(header_style="bold")
    for column in ("name", "size", "licence", "cached", "about"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for e in entries:
        table.add_row(e.name, f"{e.size / 2**20:,.0f} MiB", e.licence, "yes" if e.cached else "no", e.description)
    with console_output() as console:
        console.print(table)
    return 0
