"""Thousands of random cases of every compiled op against what it is specified to compute.

    python -m tests.fuzz [--cases 10000] [--seed 0] [--isa avx2] [--op linear]
    python -m tests.fuzz --seed 0 --case 1234 --isa avx2        one case again, with its traceback

A case is named by seed and number. One that fails is printed as the line that repeats it, with what was drawn; a case that kills
the process too, since cases run in a child.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.fuzz import attention, products, ranking, rows, taped
from tests.fuzz.draw import Draw
from uma_kernels import dispatch
from uma_kernels.testing import poisoned_empty

# How often each op is drawn: products have the most formats and paths.
CHECKS: dict[str, tuple[Callable[[Draw], None], int]] = {
    "linear": (products.check_linear, 6),
    "gather_rows": (products.check_gather_rows, 1),
    "label_head": (products.check_label_head, 1),
    "lora": (products.check_lora, 2),
    "tree_attention": (attention.check_tree_attention, 3),
    "paged_decode": (attention.check_paged_decode, 2),
    "kv_cache": (attention.check_kv_cache, 1),
    "rope": (attention.check_rope, 1),
    "rms_norm": (rows.check_rms_norm, 1),
    "add_rms_norm": (rows.check_add_rms_norm, 1),
    "activation": (rows.check_activation, 1),
    "sampling": (rows.check_sampling, 2),
    "topk": (ranking.check_topk, 2),
    "maxsim": (ranking.check_maxsim, 1),
    "tape": (taped.check_tape, 1),
}
PROGRESS = 500  # cases between two lines


def op_of(seed: int, number: int, only: str | None = None) -> str:
    weights = [weight for _, weight in CHECKS.values()]
    return only or random.Random(f"{seed}:{number}").choices(list(CHECKS), weights)[0]


def run_case(seed: int, number: int, op: str) -> tuple[Exception | None, str]:
    """What a case failed with, and what was drawn for it."""
    draw = Draw(seed, number)
    extension = dispatch.extension()
    before = extension.get_num_threads()
    extension.set_num_threads(draw.pick("threads", (1, 1, 2, 3)))
    try:
        with dispatch.use_backend("cpp"), poisoned_empty():
            CHECKS[op][0](draw)
    except Exception as error:
        return error, _said(draw.drawn)
    finally:
        extension.set_num_threads(before)
    return None, _said(draw.drawn)


def _said(drawn: dict[str, object]) -> str:
    return " ".join(f"{name}={getattr(value, 'id', value)}" for name, value in drawn.items())


def again(seed: int, number: int, isa: str, only: str | None) -> str:
    """The command that repeats a case."""
    return f"python -m tests.fuzz --seed {seed} --case {number} --isa {isa}" + (f" --op {only}" if only else "")


def failure(seed: int, number: int, isa: str, only: str | None, said: str, what: str) -> str:
    """One line that repeats a case and says what it was."""
    return f"{again(seed, number, isa, only)}  # {op_of(seed, number, only)} {said}: {what}"


def run_cases(seed: int, numbers: range, isa: str, only: str | None, current: Any = None) -> list[str]:
    """Lines of the cases that failed. `current` holds the number of the case in hand, for who waits."""
    lines = []
    began, extension = time.perf_counter(), dispatch.extension()
    before = extension.isa()
    assert extension.set_isa(isa), f"this machine does not run {isa}"
    try:
        for number in numbers:
            if current is not None:
                current.value = number
                if number % PROGRESS == 0 and number > numbers.start:
                    print(f"{isa}: {number} cases, {time.perf_counter() - began:.0f} s", flush=True)
            error, said = run_case(seed, number, op_of(seed, number, only))
            if error is not None:
                what = f"{type(error).__name__}: {error}".replace("\n", " ")
                lines.append(failure(seed, number, isa, only, said, what))
                if current is not None:
                    print(lines[-1], flush=True)
    finally:
        extension.set_isa(before)
    return lines


def _in_child(seed: int, numbers: range, isa: str, only: str | None) -> int:
    """Number of failures. A child that dies is followed by another that goes on behind the case that it died of."""
    context = multiprocessing.get_context("fork")
    failures = context.Value("q", 0)
    start = numbers.start

    def work(first: int, current: Any) -> None:
        torch.set_num_threads(1)
        found = len(run_cases(seed, range(first, numbers.stop), isa, only, current))
        failures.value += found

    while start < numbers.stop:
        current = context.Value("q", start)
        child = context.Process(target=work, args=(start, current))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        what = f"the process ended with status {child.exitcode}"
        print(failure(seed, current.value, isa, only, "", what), flush=True)
        failures.value += 1
        start = current.value + 1
    return int(failures.value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each instruction set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", choices=dispatch.extension().available_isas(), help="default: all of this machine")
    parser.add_argument("--op", choices=CHECKS, help="cases of this op alone")
    parser.add_argument("--case", type=int, help="this case alone")
    args = parser.parse_args(arguments)
    isas = [args.isa] if args.isa else dispatch.extension().available_isas()
    if args.case is not None:
        bad = 0
        for isa in isas:
            dispatch.extension().set_isa(isa)
            op = op_of(args.seed, args.case, args.op)
            error, said = run_case(args.seed, args.case, op)
            print(f"{isa}: {op} {said}: {'failed' if error else 'passed'}")
            if error is not None:
                traceback.print_exception(error)
                bad += 1
        return 1 if bad else 0
    failures = sum(_in_child(args.seed, range(args.cases), isa, args.op) for isa in isas)
    print(f"{failures} of {args.cases * len(isas)} cases failed ({', '.join(isas)}, seed {args.seed})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
