"""What the commands share on a terminal: progress bars on standard error, and an engine opened from arguments.

Knows how things look; does not know any command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID

    from uma_engine.tasks.api import Engine

__all__ = ["FetchProgress", "open_engine", "printable"]

ADAPTER_NAME = "adapter"


class FetchProgress:
    """A progress bar a fetched file, called as `progress(bytes_done, bytes_total, label)`; shown once there is something to show."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, done: int, total: int, label: str) -> None:
        if not self._tasks:
            self._bar.start()
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=total)
        self._bar.update(self._tasks[label], completed=done, total=total)

    def __enter__(self) -> FetchProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._bar.stop()


@contextmanager
def open_engine(
    args: argparse.Namespace, model: str | None = None, **options: Any
) -> Iterator[tuple[Engine, str | None]]:
    """The engine that `--model`, `--adapter`, `--precision`, `--threads` and `options` describe, and its adapter's name, if any.

    What is given on the command line goes before `options`.
    """
    from uma_engine.tasks.api import Engine

    options["max_lora_rank"] = 256
    if args.precision is not None:
        options["precision"] = args.precision
    if args.threads is not None:
        options["num_threads"] = args.threads
    with FetchProgress() as progress:
        engine = Engine(model or args.model, progress=progress, **options)
    with engine:
        name = None
        if args.adapter:
            name = Path(args.adapter).resolve().name or ADAPTER_NAME
            engine.load_adapter(name, args.adapter)
        yield engine, name


def printable(text: str, width: int) -> str:
    """One line of at most `width` characters: line breaks gone, control and direction characters made visible."""
    joiner = "\u200d"  # holds emoji of several parts together
    flat = " ".join("".join(c if c.isprintable() or c.isspace() or c == joiner else "\ufffd" for c in text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "\u2026"


def write_line(text: str = "") -> None:
    sys.stdout.write(text + "\n")
