"""Timing side by side, and the rows that benches append to `bench/results/*.jsonl`.

Knows clocks, machines and rows; does not know any op. Our calls and the peer's alternate in one run, so that both see the
same machine; a row holds what is needed to repeat it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("uma-engine", "torch")
PAUSE = 0.03  # seconds


def interleave(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 5,
    each_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Times the calls in turns until `seconds` have gone and at least `rounds` rounds are done. Seconds of each call, in order.

    A turn begins with a pause, since the worker threads of some libraries spin for up to 20 ms after a call and would take
    a CPU from the next, and with an untimed call, so that nobody starts from the caches another has left. `each_round`
    is called once a round, after such a pause: where the machine's own rates are looked at.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < end or done < rounds:
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            turn = time.perf_counter()
            while (begin := time.perf_counter()) < turn + PAUSE / 2:
                call()
                times[name].append(time.perf_counter() - begin)
        if each_round:
            time.sleep(PAUSE)
            each_round()
        done += 1
    return times


class OthersShare:
    """Share of the machine's CPUs that other processes used since this was made: a busy machine makes a poor bench."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all CPUs that were busy, that this process was, and that there were."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / hertz, time.process_time(), sum(ticks) / hertz

    def read(self) -> float:
        busy, own, total = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return round(max(0.0, busy - own) / total, 3) if total > 0 else 0.0


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """What an earlier run kept in `path`, made if need be; a last line that a kill cut off is taken out, so that more can be appended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80: each one of the values."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the tree, with `+dirty` where files differ from it; `none` outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return (
        (head + ("+dirty" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results") else ""))
        if head
        else "none"
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def op_row(
    op: str,
    case: str,
    dtype: str,
    times: Sequence[float],
    flops: int,
    bytes_moved: int,
    peer: str,
    peer_times: Sequence[float],
    **conditions: Any,
) -> dict[str, Any]:
    """The row of one op and case. `ratio` is the peer's median time over ours: above 1 we are faster. `conditions` are kept."""
    p20, p50, p80 = quantiles(times)
    peer_p50 = quantiles(peer_times)[1]
    return {
        "op": op,
        "case": case,
        "dtype": dtype,
        "p20_ms": round(p20 * 1e3, 5),
        "p50_ms": round(p50 * 1e3, 5),
        "p80_ms": round(p80 * 1e3, 5),
        "flops": flops,
        "bytes": bytes_moved,
        "gflop_s": round(flops / p50 / 1e9, 2),
        "gb_s": round(bytes_moved / p50 / 1e9, 2),
        "peer": peer,
        "peer_p50_ms": round(peer_p50 * 1e3, 5),
        "ratio": round(peer_p50 / p50, 3),
        **conditions,
    }


def module_arguments() -> list[str]:
    """The module this process was started with, and its arguments; of a path outside of the repository the last part alone."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else sys.argv[0], *map(without_place, sys.argv[1:])]


def without_place(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    return name + equals + (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)


def append_row(area: str, row: Mapping[str, Any]) -> None:
    """Add a row to `bench/results/<area>.jsonl`, with the machine, the versions, the commit, the time and the command."""
    complete = {
        **row,
        "device": cpu_model(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", *module_arguments()]),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{area}.jsonl").open("a") as file:
        file.write(json.dumps(complete) + "\n")
