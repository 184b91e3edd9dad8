"""What this machine can do at most: multiply-adds of each kind, and memory read and copied, in C++.

    python -m bench.ceiling [--seconds 0.5]

Every other bench quotes its share of these. One row a run goes to bench/results/ceiling.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Iterable

import numpy as np

from bench.rows import append_row
from uma_kernels import dispatch

KINDS = {
    "fp32_fma": "GFLOP/s, fp32 multiply-add",
    "int16_madd": "GOP/s, 16-bit multiply-add, 32-bit sums",
    "int8_madd": "GOP/s, 8-bit multiply-add, 32-bit sums (no VNNI)",
    "int4_madd": "GOP/s, 4-bit weights by 8-bit values, 16-bit sums (no VNNI)",
    "int16_vnni": "GOP/s, 16-bit multiply-add in one instruction (AVX-512 VNNI)",
    "int8_vnni": "GOP/s, 8-bit multiply-add in one instruction (AVX-512 VNNI)",
    "read": "GB/s read, arrays of 256 MiB a thread",
    "copy": "GB/s read and written by copying",
}
FLOATS = 64 * 2**20


class Meter:
    """Ceilings taken in turns with what is measured: a shared machine's rate changes from second to second."""

    def __init__(self, kinds: Iterable[str], threads: int) -> None:
        self._rates: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(kinds)}
        self._threads = threads
        self._memory, self._aligned = _memory(threads if "read" in self._rates else 0)

    def __call__(self) -> None:
        """One short go of each kind."""
        extension = dispatch.extension()
        for kind, rates in self._rates.items():
            rates.append(extension.ceiling(kind, self._threads, 0.012, self._aligned, FLOATS) / 1e9)

    def median(self, kind: str) -> float:
        """As `ceiling`, of the goes so far; infinite where there is no such instruction, so that its share is 0."""
        return statistics.median(self._rates[kind]) or math.inf


def _memory(arrays: int) -> tuple[np.ndarray, int]:
    """Memory for so many arrays, all of it touched (untouched pages would all be one page of zeros), and where it begins."""
    memory = np.ones(FLOATS * arrays + 16, np.float32)
    return memory, -(-memory.ctypes.data // 64) * 64


@functools.cache
def ceiling(kind: str, threads: int, seconds: float = 0.3) -> float:
    """Operations or bytes per second, in units of 1e9; 0 where the active instruction set has no such instruction."""
    memory, aligned = _memory(threads * {"read": 1, "copy": 2}.get(kind, 0))
    assert memory.size  # alive until the call is over
    return dispatch.extension().ceiling(kind, threads, seconds, aligned, FLOATS) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument("--no-save", action="store_true", help="print, but add no row")
    args = parser.parse_args()
    extension = dispatch.extension()
    most = extension.hardware_threads()
    print(f"instruction set {extension.isa()}; 1 thread, then {most}")
    row: dict[str, object] = {"bench": "ceiling", "isa": extension.isa(), "threads": most}
    for kind, meaning in KINDS.items():
        one, all_ = ceiling(kind, 1, args.seconds), ceiling(kind, most, args.seconds)
        row |= {f"{kind}_1": round(one, 1), f"{kind}_{most}": round(all_, 1)}
        print(f"{kind:12} {one:8.1f} {all_:8.1f}   {meaning}")
    if not args.no_save:
        append_row("ceiling", row)


if __name__ == "__main__":
    main()
