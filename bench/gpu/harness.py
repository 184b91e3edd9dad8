"""Timing on a GPU: ceilings measured first, graph replay over rotated buffers, contestants in turn, rows as JSON lines.

    python -m bench.gpu.harness        prints the ceilings of this device

Knows clocks, graphs, the device and rows; does not know any op.

A call is timed as one of several in a CUDA graph, each over buffers of its own, so that the L2 cache is cold and the host is
out of the picture. Contestants take turns, round after round: all of them see the same clocks and the same neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Ceilings",
    "Timing",
    "ceilings",
    "compare",
    "end",
    "guarded",
    "num_copies",
    "require_gpu",
    "save",
    "table",
    "time_graph",
]

ROOT = Path(__file__).resolve().parent.parent.parent
COLD_BYTES = 4 * 60 * 2**20  # four times the largest L2 we know: what rotated buffers must hold together
Call = Callable[[], object]


def require_gpu() -> None:
    """End the program in words where there is no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none")


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call, over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Timing:
        ordered = sorted(microseconds)
        at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        return cls(statistics.median(ordered), at(0.1), at(0.9), len(ordered))

    def as_row(self) -> dict[str, float]:
        return {"us": round(self.median, 3), "us_p10": round(self.p10, 3), "us_p90": round(self.p90, 3)}


def num_copies(bytes_per_call: int, most: int = 64) -> int:
    """How many sets of buffers to rotate so that a call finds none of its own in the L2 cache."""
    return max(2, min(most, -(-COLD_BYTES // max(1, bytes_per_call)) + 1))


def time_graph(fn_list: Sequence[Call], inner: int | None = None, rounds: int = 20) -> Timing:
    """Time of one call. `fn_list`: the same call over different buffers; a graph holds `inner` of them in turn."""
    return compare({"call": fn_list}, inner, rounds)["call"]


def compare(
    contestants: Mapping[str, Sequence[Call] | Call], inner: int | None = None, rounds: int = 20
) -> dict[str, Timing]:
    """Times contestants in turn, each from a graph of `inner` calls (default: all its buffers once, at least 8 calls)."""
    replays: dict[str, tuple[Call, int]] = {}
    for name, calls in contestants.items():
        listed = list(calls) if isinstance(calls, Sequence) else [calls]
        count = inner or max(8, len(listed))
        replays[name] = _captured(listed, count), count
    for replay, _ in replays.values():  # clocks up, caches and pages settled
        replay()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, (replay, count) in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: Timing.of(values) for name, values in times.items()}


def _captured(calls: Sequence[Call], count: int) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and allocates outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    return graph.replay


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device does at best, measured now: bytes moved a second, products a second, the cost of one more kernel."""

    copy_gb_s: float  # device to device, read plus written
    read_gb_s: float
    bf16_tflop_s: float  # 8192^3, random data, cuBLAS
    launch_us: float  # one empty kernel more in a graph


@functools.cache
def ceilings() -> Ceilings:
    """Measured once a process, about a second."""
    require_gpu()
    copy, read = _bandwidths()
    found = Ceilings(copy, read, _matmul_rate(), _launch_cost())
    torch.cuda.empty_cache()
    return found


def _bandwidths() -> tuple[float, float]:
    source = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()  # 2 GiB
    target = torch.empty_like(source)
    copy = time_graph([lambda: target.copy_(source)], inner=4, rounds=8).median
    read = time_graph([lambda: _read(source)], inner=4, rounds=8).median
    return 2 * source.nbytes / copy / 1e3, source.nbytes / read / 1e3


def _matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / time_graph([lambda: torch.mm(a, b, out=out)], inner=8, rounds=8).median / 1e6


def _launch_cost() -> float:
    one = torch.zeros(1, device="cuda")
    return time_graph([lambda: one.add_(1)], inner=1000, rounds=8).median


def _read(x: torch.Tensor) -> torch.Tensor:
    from bench.gpu import kernels

    return kernels.read(x)


# ---- what fails ----

_failed: list[str] = []


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """A cell that fails is named and has no row; the next ones run, as long as the device still answers. `end` tells."""
    try:
        yield
    except Exception as error:
        _failed.append(what)
        print(f"FAILED {what}: {type(error).__name__}: {str(error)[:400]}", flush=True)
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            sys.exit(f"the device is lost after {what}: {str(lost).splitlines()[0]}")
        del error
        gc.collect()
        torch.cuda.empty_cache()


def end() -> None:
    """The last call of a bench: status 1 where a guarded cell has failed."""
    if _failed:
        sys.exit(f"{len(_failed)} cells failed: {', '.join(_failed)}")


# ---- rows ----


@functools.cache
def environment() -> dict[str, Any]:
    """What a row says of where it comes from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": sys.version.split()[0],
        "commit": os.environ.get("UMA_COMMIT") or _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "command": shlex.join(sys.orig_argv[1:]),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def save(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows to `$OUT/gpu-<name>.jsonl`, or to bench/results/ where OUT is not set; the ceilings go with each."""
    directory = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    path = directory / f"gpu-{name}.jsonl"
    common = {
        "bench": f"gpu-{name}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "ceilings": {key: round(value, 2) for key, value in asdict(ceilings()).items()},
    }
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(common | dict(row)) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A plain table of some columns."""
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def main() -> None:
    argparse.ArgumentParser(description="Measure the ceilings of this device.").parse_args()
    require_gpu()
    row = asdict(ceilings())
    save("ceilings", [row])
    print(environment()["device"], table([row], list(row)), sep="\n")


if __name__ == "__main__":
    main()
