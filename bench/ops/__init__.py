"""Benches of single ops, one module an op: `python -m bench.ops.linear`.

Knows what all of them share: options, the threads of both sides, shares of the machine's ceilings, and that a wrong
result gives no number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from bench import rows
from bench.ceiling import Meter
from uma_kernels import dispatch


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--threads", type=int, default=None, help="of ours and of the peer (default: all CPUs of the process)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each case")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--no-save", action="store_true", help="print, but add no row to bench/results/ops.jsonl")
    return parser.parse_args()


def set_threads(threads: int | None) -> int:
    extension = dispatch.extension()
    threads = threads or extension.hardware_threads()
    extension.set_num_threads(threads)
    torch.set_num_threads(threads)
    return threads


def measure(
    args: argparse.Namespace,
    check: Callable[[], None],
    run: Callable[[], object],
    run_peer: Callable[[], object],
    peak: str = "fp32_fma",
    **row: Any,
) -> None:
    """Runs `check` (raises AssertionError where ours is wrong), then times both, prints a line and saves a row.

    `peak` is the kind of ceiling (bench.ceiling) that the arithmetic has.
    """
    if args.only not in f"{row['op']} {row['case']} {row['dtype']}":
        return
    check()
    extension = dispatch.extension()
    others = rows.OthersShare()
    meter = Meter(("fp32_fma", peak, "read"), extension.get_num_threads())
    times = rows.interleave({"ours": run, "peer": run_peer}, args.seconds, each_round=meter)
    made = rows.op_row(
        times=times["ours"],
        peer_times=times["peer"],
        backend="cpp",
        isa=extension.isa(),
        threads=extension.get_num_threads(),
        others_share=others.read(),
        **row,
    )
    made |= {"peak": peak, "ceilings": {kind: round(meter.median(kind), 1) for kind in ("fp32_fma", peak, "read")}}
    made |= {
        f"pct_{name}": round(100 * made["gflop_s"] / meter.median(kind), 1)
        for name, kind in (("fma", "fp32_fma"), ("peak", peak))
    }
    made["pct_read"] = round(100 * made["gb_s"] / meter.median("read"), 1)
    print(
        f"{made['op']:8} {made['dtype']:10} {made['case']:34} {made['p50_ms']:9.3f} ms {made['gflop_s']:8.1f} GFLOP/s"
        f" ({made['pct_peak']:.0f} % of {peak}) {made['gb_s']:6.1f} GB/s ({made['pct_read']:.0f} % of read) {made['ratio']:6.2f}x"
        f" {made['peer']}  (others used {made['others_share']:.0%} of the machine)",
        flush=True,
    )
    if not args.no_save:
        rows.append_row("ops", made)
