"""`uma bench`: how fast this machine ranks token ids of given lengths, and which op takes what share of the time.

Knows clocks and tables; compares with nobody: that is what the repository's `bench/` is for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from uma_engine.cli.console import open_engine, write
from uma_engine.errors import InvalidRequest

OPS = {  # what the functions of the extension belong to
    "linear": "linear",
    "linear_near": "linear",
    "linear_fast": "linear",
    "tree_attention": "attention",
    "paged_decode": "attention",
}
FIRST_IDS = 100  # below lie control tokens in most vocabularies


def run(args: argparse.Namespace) -> int:
    for name in ("candidates", "job_tokens", "candidate_tokens", "repeats"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"`{option}` is {getattr(args, name)} but must be at least 1", param=name)
    # Every run computes everything: nothing is taken from the prefix cache.
    with open_engine(args, enable_prefix_cache=False) as (engine, adapter):
        rng, vocabulary = random.Random(7), engine.vocab_size

        def ids(count: int) -> list[int]:
            return [rng.randrange(min(FIRST_IDS, vocabulary // 2), vocabulary) for _ in range(count)]

        job, items = ids(args.job_tokens), [ids(args.candidate_tokens) for _ in range(args.candidates)]

        def rank() -> float:
            began = time.perf_counter()
            engine.score(job, items, labels=("yes", "no"), adapter=adapter)
            return time.perf_counter() - began

        engine.score(job, items[:1], labels=("yes", "no"), adapter=adapter)  # warm
        seconds = [rank() for _ in range(args.repeats)]
        result = _result(args, engine, statistics.median(seconds), seconds)
        if args.profile:
            result["profile"] = _profile(rank)
    write(json.dumps(result) + "\n" if args.json else _table(result))
    return 0


def _result(args: argparse.Namespace, engine: Any, median: float, seconds: list[float]) -> dict[str, Any]:
    tokens = args.job_tokens + args.candidates * args.candidate_tokens
    return {
        "model": args.model,
        "precision": args.precision,
        "backend": engine.stack_info().backend,
        "workload": f"{args.job_tokens}+{args.candidates}x{args.candidate_tokens} tokens",
        "seconds": seconds,
        "candidates_per_s": args.candidates / median,
        "tokens_per_s": tokens / median,
        "gflop_per_s": tokens * engine.flops_per_token / median / 1e9,
    }


def _profile(rank: Any) -> dict[str, Any]:
    from uma_kernels import dispatch

    with dispatch.profiled() as calls:
        total = rank()
    ops = {name: {"calls": len(s), "seconds": sum(s), "share": sum(s) / total} for name, s in calls.items() if s}
    main = sum(op["share"] for name, op in ops.items() if name in OPS)
    ordered = dict(sorted(ops.items(), key=lambda item: -item[1]["seconds"]))
    return {"seconds": total, "linear_and_attention": main, "ops": ordered}


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, {result['precision']}, {result['backend']}: {result['workload']}",
        f"{result['candidates_per_s']:.2f} candidates/s | {result['tokens_per_s']:,.0f} tokens/s |"
        f" {result['gflop_per_s']:.0f} GFLOP/s in linear layers | runs of"
        f" {min(result['seconds']):.2f}..{max(result['seconds']):.2f} s",
    ]
    if profile := result.get("profile"):
        lines += ["", f"{'op':20} {'calls':>7} {'seconds':>9} {'share':>7}"]
        for name, op in profile["ops"].items():
            lines.append(f"{name:20} {op['calls']:7} {op['seconds']:9.3f} {op['share']:7.1%}")
        rest = 1 - sum(op["share"] for op in profile["ops"].values())
        lines.append(f"{'outside of ops':20} {'':7} {rest * profile['seconds']:9.3f} {rest:7.1%}")
        lines.append(f"linear layers and attention: {profile['linear_and_attention']:.1%}")
    return "\n".join(lines) + "\n"
