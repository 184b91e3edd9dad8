"""The ledger of a surface as a table: under each candidate what the score is made of.

Knows the table; does not know how scores are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from uma_engine.cli.console import printable
from uma_engine.ranking.ledger import LedgerLine
from uma_engine.tasks.results import SurfaceAnswer

if TYPE_CHECKING:
    from rich.console import Console

NAMES = "candidate, factors"
NAME_WIDTH = 8  # what names have at the least
FROM_WIDTH = 31  # of the column that says where a value comes from, where the terminal has WIDE columns
WIDE, ROOMY = 100, 60  # below ROOMY weights are left out too

if TYPE_CHECKING:
    from rich.console import Console

NAME_WIDTH = 8
FROM_WIDTH = 22  # of the column that says where a value comes from, left out where the terminal is narrower than WIDE
WIDE = 90


def show_ledger(console: Console, title: str, headlines: Mapping[int, str], answer: SurfaceAnswer) -> None:
    """Print the table and what it means. A place that is shared has `=` behind it."""
    from rich.table import Table
    from rich.text import Text

    sign = "+" if answer.surface["aggregate"] == "mean" else "x"
    places = {r.index: f"{r.place}{'=' if r.tied_with else ''}" for r in answer.results}
    widths = {"#": max(map(len, places.values()), default=1), "value": 5, "score": 7}
    if console.width >= ROOMY:
        widths["weight"] = 6
    if console.width >= WIDE:
        widths["from"] = FROM_WIDTH
    free = (
        console.width - sum(w + 3 for w in widths.values()) - 4
    )  # a column has 3 of padding and border, the table 1 more
    widths[NAMES] = max(NAME_WIDTH, free)
    columns = [c for c in ("#", NAMES, "from", "value", "weight", "score") if c in widths]

    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in (NAMES, "from") else "right"
        table.add_column(
            column,
            justify=justify,
            no_wrap=True,
            overflow="ellipsis",
            min_width=widths[column],
            max_width=widths[column],
        )

    def add(cells: Mapping[str, str], indent: str = "", style: str | None = None) -> None:
        texts = {c: printable(cells.get(c, ""), widths[c]) for c in columns}
        texts[NAMES] = indent + printable(cells[NAMES], widths[NAMES] - len(indent))
        table.add_row(*(Text(texts[c]) for c in columns), style=style)

    for result in answer.results:
        cut = f"cut by {result.truncated_tokens} tok" if result.truncated_tokens else ""
        score = f"{result.score:.4f}"
        add({"#": places[result.index], NAMES: headlines[result.index], "from": cut, "score": score}, style="bold")
        for line in result.ledger:
            numbers = {
                "value": f"{line.value:.3f}",
                "weight": f"{line.weight:g}",
                "score": f"{sign}{line.contribution:.4f}",
            }
            add({NAMES: line.name, "from": _from(line), **numbers}, indent="  ")
        table.add_section()
    console.print(table)
    tied = sum(1 for r in answer.all_results if r.tied_with)
    resolution = answer.surface["resolution"]
    if tied:
        rule = "by lot" if answer.surface["tie_order"] == "lot" else "in the order of the input"
        said = (
            f"= {tied} of {len(answer.all_results)} are in a tie: scores less than {resolution:g} apart, placed {rule}"
        )
        console.print(Text(said, style="dim"))
    missing = sum(line.missing for r in answer.all_results for line in r.ledger)
    if missing:
        console.print(Text(f"{missing} facts are not known and count as declared (neutral)", style="dim"))


def _from(line: LedgerLine) -> str:
    """Where a value comes from: a fact's field and number, or the adapter that read and what it said before calibration."""
    if line.kind == "fact":
        return f"{line.source}: {'not known' if line.raw is None else f'{line.raw:g}'}"
    return f"{line.source or 'base'}: {line.raw:.3f}"
