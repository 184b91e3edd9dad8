"""What a second thread brings: ranking, a linear layer and tree attention with one thread and with all, in turns in one run.

    python -m bench.threads [--precision near] [--repeats 5]

Rows go to bench/results/threads.jsonl. The machine's own gain, fp32 multiply-adds with one thread and with all, is measured
between the turns: on a shared machine it is not always the number of CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Mapping

import torch

from bench.ceiling import Meter
from bench.rows import OthersShare, append_row, quantiles
from bench.workload import LABELS, make_workload
from uma_engine import Engine
from uma_kernels import dispatch
from uma_kernels.attention import tree_attention
from uma_kernels.attention.cases import Segment, TreeCase, tree_inputs, tree_tokens
from uma_kernels.linear import linear, pack
from uma_kernels.linear.cases import WeightFormat

CANDIDATES = 16  # of 150 tokens under a job of 300
OP_SECONDS = 0.1  # of one turn of an op
Call = Callable[[], object]


def linear_call(precision: str) -> Call:
    """SmolLM2's gate or up projection over one step's rows."""
    x, weight, out = torch.randn(960, 576), pack(WeightFormat(4, 32, True).random(1536, 576)), torch.empty(960, 1536)
    return lambda: linear(x, weight, out=out, precision=precision)


def attention_call() -> Call:
    """SmolLM2's heads over one step of a ranking."""
    case = TreeCase("rank", 9, 3, 64, (Segment(None, 300), *(Segment(0, 150) for _ in range(6))))
    i = tree_inputs(case, *tree_tokens(case))
    out = torch.empty_like(i.q)
    return lambda: tree_attention(i.q, i.k, i.v, i.k_cache, i.v_cache, i.batch, 64**-0.5, None, out)


def rank_calls(engines: Mapping[int, Engine]) -> dict[int, Call]:
    w = make_workload(next(iter(engines.values())).tokenizer, candidates=CANDIDATES)
    items = [candidate + w.suffix for candidate in w.candidates]

    def call(engine: Engine) -> Call:
        return lambda: engine.score(w.prefix, items, labels=LABELS)

    return {threads: call(engine) for threads, engine in engines.items()}


def op_calls(call: Call, counts: tuple[int, ...]) -> dict[int, Call]:
    """`call` again and again for a while, with each number of threads."""

    def turn(threads: int) -> int:
        dispatch.extension().set_num_threads(threads)
        end, done = time.perf_counter() + OP_SECONDS, 0
        while time.perf_counter() < end:
            call()
            done += 1
        return done

    def bound(threads: int) -> Call:
        return lambda: turn(threads)

    return {threads: bound(threads) for threads in counts}


def compare(args: argparse.Namespace, case: str, calls: Mapping[int, Call], repeats: int) -> None:
    one, most = calls
    meters = {threads: Meter(("fp32_fma",), threads) for threads in calls}
    others = OthersShare()
    rates: dict[int, list[float]] = {threads: [] for threads in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for threads, call in calls.items():
            began = time.perf_counter()
            done = call()
            rates[threads].append((done if isinstance(done, int) else 1) / (time.perf_counter() - began))
            for _ in range(3):
                meters[threads]()
    ratios = quantiles([b / a for a, b in zip(rates[one], rates[most], strict=True)])
    machine = meters[most].median("fp32_fma") / meters[one].median("fp32_fma")
    print(
        f"{case:24} {most} threads against 1: {ratios[1]:.2f}x ({ratios[0]:.2f}..{ratios[2]:.2f});"
        f" the machine itself {machine:.2f}x; others used {others.read():.0%} of it",
        flush=True,
    )
    if not args.no_save:
        row = {"bench": "threads", "case": case, "model": args.model, "threads": most, "ratio": round(ratios[1], 3)}
        row |= {"ratio_p20": round(ratios[0], 3), "ratio_p80": round(ratios[2], 3), "machine_ratio": round(machine, 3)}
        append_row("threads", row | {"others_share": others.read()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", choices=("exact", "near", "fast"), default="near")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the ranking; ops take four times as many")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    counts = (1, max(2, len(os.sched_getaffinity(0))))
    for name, call in ((f"linear {args.precision}", linear_call(args.precision)), ("tree attention", attention_call())):
        compare(args, name, op_calls(call, counts), 4 * args.repeats)
    with contextlib.ExitStack() as stack:
        options = {"precision": args.precision, "enable_prefix_cache": False}
        engines = {n: stack.enter_context(Engine(args.model, num_threads=n, **options)) for n in counts}
        compare(args, f"rank {args.precision}", rank_calls(engines), args.repeats)


if __name__ == "__main__":
    main()
