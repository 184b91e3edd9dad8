"""Instructions that a rank of a tiny model takes, counted by valgrind: a figure that a busy machine cannot move.

    python -m bench.instructions               count, and keep the figures in bench/results/instructions.jsonl
    python -m bench.instructions --check       count, compare with those kept last, fail where one grew by more than 3 %
    python -m bench.instructions --repeat 3    count several times and print how far the figures move

Knows valgrind and one workload; does not know seconds: an instruction that waits for memory counts like any other.

A process ranks N and then 2 N candidates with each precision; the difference, by N, is what one candidate takes: start-up, the
job and the template cancel out. Counting is on during these calls alone. `kernels` are the instructions inside of the
compiled extension, the same in every run; `total` are those of Python and torch as well.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, append_row, versions
from uma_kernels import dispatch

ISA = "avx2"
PRECISIONS = ("exact", "near", "fast")
QUANTISED = "Q4_1"
CANDIDATES = 8  # N. Few, and of a small model: valgrind does each fused multiply-add of a vector lane in a call
MOST_GROWTH = 0.03
FIGURES = ("kernels", "total")  # instructions a candidate
# What starts and stops the count from inside of the process: valgrind's own header, which does nothing outside of it.
MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""
Row = dict[str, Any]


class Unavailable(RuntimeError):
    """This machine cannot count."""


def require() -> None:
    """Raise Unavailable where valgrind, its header, a C compiler or the instruction set is missing."""
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"`{tool}` is not installed")
    test = subprocess.run(["cc", "-E", "-xc", "-"], input=MARKS, text=True, capture_output=True, check=False)
    if test.returncode:
        raise Unavailable("the header `valgrind/callgrind.h` is not installed")
    if dispatch.C is None or ISA not in dispatch.C.available_isas():
        raise Unavailable(f"this machine, or this build, has no {ISA}")


def measure() -> list[Row]:
    """One row for each precision."""
    with tempfile.TemporaryDirectory(prefix="uma-instructions-") as name:
        folder = Path(name)
        (folder / "marks.c").write_text(MARKS)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", folder / "marks.so", folder / "marks.c"], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'out'}"]
        command += [sys.executable, "-m", "bench.instructions", "--worker", str(folder)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the counted process ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        counts: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("out*")):
            counts.update(read_counts(path.read_text()))
    return [
        {
            "bench": "instructions",
            "case": f"rank, {QUANTISED}",
            "precision": precision,
            "isa": ISA,
            "compiler": _compiler(),
            **{
                figure: round(
                    (counts[f"{precision}-{2 * CANDIDATES}"][i] - counts[f"{precision}-{CANDIDATES}"][i]) / CANDIDATES
                )
                for i, figure in enumerate(FIGURES)
            },
        }
        for precision in PRECISIONS
    ]


def _environment() -> dict[str, str]:
    """Nothing in it that differs between two runs and that Python's dictionaries or our threads depend on."""
    fixed = {"UMA_ISA": ISA, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    threads = dict.fromkeys(("UMA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
    return kept | fixed | threads


def _compiler() -> str:
    """What builds the extension here, as its first line says: other compilers give other counts."""
    done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.split("\n", 1)[0]


def read_counts(text: str) -> dict[str, tuple[int, int]]:
    """Of a callgrind file that a mark dumped: its name, the instructions inside of the extension, and all."""
    trigger = re.search(r"^desc: Trigger: Client Request: (\S+)$", text, re.M)
    if trigger is None:
        return {}
    kernels = total = 0
    names: dict[str, str] = {}
    inside = skip = False
    for line in text.splitlines():
        if line.startswith("ob="):
            number, _, name = line[3:].partition(" ")
            names[number] = name or names[number]
            inside = "uma_kernels/_C" in names[number]
        elif line.startswith("cob="):  # of a function that is called: the name counts, the costs are elsewhere
            number, _, name = line[4:].partition(" ")
            names[number] = name or names[number]
        elif line.startswith("calls="):
            skip = True  # the next line is what the called function took
        elif line[:1].isdigit() or line[:1] in "+-*":
            words = line.split()
            if not skip and len(words) == 2:
                total += int(words[1])
                kernels += int(words[1]) if inside else 0
            skip = False
    return {trigger[1]: (kernels, total)}


def worker(folder: Path) -> None:
    """Ranks between marks; under valgrind."""
    from bench.tiny_model import CORPUS, make_tiny_gguf
    from uma_engine import Engine

    marks = ctypes.CDLL(str(folder / "marks.so"))
    model = make_tiny_gguf(folder / "tiny.gguf", QUANTISED)
    job = "We need a senior Rust engineer who knows databases, Linux and networks. Python is a plus."
    words = " ".join(CORPUS[-2:]).split()
    people = [
        f"Candidate {i:02}: " + " ".join(words[(i * 5 + j * (i + 3)) % len(words)] for j in range(12))
        for i in range(2 * CANDIDATES)
    ]
    for precision in PRECISIONS:
        options: Row = {"enable_prefix_cache": False, "packed_cache": False, "kv_cache_bytes": 8 * 2**20}
        with Engine(model, precision=precision, num_threads=1, **options) as engine:
            engine.rank(job, people[:2])  # what is done once is done
            for count in (CANDIDATES, 2 * CANDIDATES):
                gc.collect()
                gc.disable()
                marks.begin()
                engine.rank(job, people[:count])
                marks.end(f"{precision}-{count}".encode())
                gc.enable()


def kept(path: Path = RESULTS / "instructions.jsonl") -> dict[str, Row]:
    """The last row of each precision."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["precision"]: row for row in map(json.loads, lines)}


def compare(rows: Sequence[Row], before: Mapping[str, Row]) -> tuple[list[str], list[str]]:
    """What grew too much, and why something could not be compared."""
    grown, other = [], []
    now = versions()
    for row in rows:
        old = before.get(row["precision"])
        if old is None:
            other.append(f"{row['precision']}: no figure is kept")
            continue
        if old["compiler"] != row["compiler"]:
            other.append(f"{row['precision']}: kept of `{old['compiler']}`, this is `{row['compiler']}`")
            continue
        for figure in FIGURES:
            if figure == "total" and any(old["versions"][name] != now[name] for name in ("python", "torch")):
                other.append(f"{row['precision']}, total: kept of another Python or torch")
            elif row[figure] > old[figure] * (1 + MOST_GROWTH):
                change = row[figure] / old[figure] - 1
                grown.append(f"{row['precision']}, {figure}: {old[figure]:,} -> {row[figure]:,} ({change:+.1%})")
    return grown, other


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the figures kept last; keep nothing")
    parser.add_argument("--repeat", type=int, default=1, help="count so often; with more than one keep nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args.worker)
        return 0
    try:
        require()
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0 if args.check else 1
    runs = []
    for _ in range(args.repeat):
        runs.append(measure())
        for row in runs[-1]:
            print(
                f"{row['precision']:6} {row['kernels']:12,} in kernels {row['total']:12,} in all, a candidate",
                flush=True,
            )
    if args.repeat > 1:
        for same in zip(*runs, strict=True):
            for figure in FIGURES:
                values = [row[figure] for row in same]
                spread = (max(values) - min(values)) / min(values)
                print(f"{same[0]['precision']:6} {figure}: moves by {spread:.4%} over {len(values)} runs")
    elif args.check:
        grown, other = compare(runs[0], kept())
        for line in other:
            print(f"not compared: {line}", file=sys.stderr)
        for line in grown:
            print(f"grew by more than {MOST_GROWTH:.0%}: {line}", file=sys.stderr)
        if grown:
            print("hint: if that is meant, keep the new figures: `python -m bench.instructions`", file=sys.stderr)
        return 1 if grown else 0
    else:
        for row in runs[0]:
            append_row("instructions", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
