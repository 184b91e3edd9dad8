"""What the commands share on a terminal: safe output, progress bars on standard error, an engine opened from arguments.

Knows how things look; does not know any command.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from uma_engine.config import MAX_INT, EngineConfig
from uma_engine.errors import InvalidRequest, UmaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from uma_engine.tasks.api import Engine

__all__ = [
    "FetchProgress",
    "console_output",
    "discard_output",
    "is_thread_count",
    "open_engine",
    "printable",
    "write",
    "write_json_line",
    "write_line",
]

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
    args: argparse.Namespace,
    model: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    **options: Any,
) -> Iterator[tuple[Engine, str | None]]:
    """The engine that the command's options and `options` describe, and the name of `--adapter`'s adapter, if any.

    What is given on the command line goes before `options`. `adapters` are further ones, by name.
    """
    from uma_engine.adapters.shipped import names as shipped_names
    from uma_engine.tasks.api import Engine

    options["max_lora_rank"] = 256
    if args.precision is not None:
        options["precision"] = args.precision
    _check_threads(args.threads)
    options |= {"device": args.device, "dtype": args.dtype, "quantization": args.quantization}
    adapters = adapters or {}
    num_adapters = len(adapters) + bool(args.adapter)
    if args.device != "cpu":
        options["max_loras"] = num_adapters  # a device sets memory aside for each that may come
    elif num_adapters > EngineConfig().max_loras:
        options["max_loras"] = num_adapters
    if args.threads is not None:
        options["num_threads"] = args.threads
    with FetchProgress() as progress:
        engine = Engine(model or args.model, progress=progress, **options)
    with engine:
        name = None
        if args.adapter in shipped_names() and not Path(args.adapter).exists():
            name = args.adapter
            engine.load_adapter(name)
        elif args.adapter:
            name = Path(args.adapter).resolve().name or ADAPTER_NAME
            engine.load_adapter(name, args.adapter)
        for other, path in adapters.items():
            engine.load_adapter(other, path)
        yield engine, name


def printable(text: str, width: int) -> str:
    """One line of at most `width` characters: line breaks gone, control and direction characters made visible."""
    joiner = "\u200d"  # holds emoji of several parts together
    flat = " ".join("".join(c if c.isprintable() or c.isspace() or c == joiner else "\ufffd" for c in text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "\u2026"


def write(text: str) -> None:
    """Write to standard output at once; UmaError when it takes nothing more, BrokenPipeError when its reader left."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise UmaError(
            f"standard output cannot be written: {error.strerror or error}",
            hint="make room there, or send the output elsewhere",
        ) from error


def write_line(text: str = "") -> None:
    write(text + "\n")


def write_json_line(data: Any) -> None:
    """JSON on one line; where standard output is not Unicode other characters are escaped, so that none is lost."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    write_line(json.dumps(data, ensure_ascii=not unicode, allow_nan=False))


class _Page(io.StringIO):
    """Text for standard output that looks to rich as if it were standard output: colours and box lines depend on it."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding or "ascii"

    def isatty(self) -> bool:
        return sys.stdout.isatty()


@contextmanager
def console_output() -> Iterator[Console]:
    """A console whose output is written by `write` when the block ends: rich would exit by itself when a reader left."""
    from rich.console import Console

    page = _Page()
    yield Console(file=page, highlight=False)
    write(page.getvalue())


def discard_output() -> None:
    """Send what is still buffered for standard output nowhere: the flush at exit must not fail a second time."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def is_thread_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_INT["num_threads"]


def _check_threads(threads: int | None) -> None:
    """Refuses a number of threads, from `--threads` or else from the environment, that is none."""
    name, text = (
        ("--threads", str(threads))
        if threads is not None
        else ("UMA_NUM_THREADS", os.environ.get("UMA_NUM_THREADS", ""))
    )
    if text and not is_thread_count(text):
        raise InvalidRequest(
            f"`{name}` is `{text[:80]}` but must be an integer from 1 to {MAX_INT['num_threads']}",
            hint="leave it out to use all CPUs of this process",
        )
