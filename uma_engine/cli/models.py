"""`uma models`: the models known by name, and what of them is in the cache."""

from __future__ import annotations

import argparse
import json

from uma_engine.catalog import list_models, resolve
from uma_engine.cli.console import FetchProgress, write_line


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
        write_line(json.dumps(rows, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for column in ("name", "size", "licence", "cached", "about"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for e in entries:
        table.add_row(e.name, f"{e.size / 2**20:,.0f} MiB", e.licence, "yes" if e.cached else "no", e.description)
    Console().print(table)
    return 0
