"""Two depths against one: candidates a second and nDCG@10, on judged jobs that the bounds have not seen.

    python -m bench.cascade --data DIR [--adapter DIR] [--jobs 40] [--prefix 0 16 24] [--confidence 0.8 0.9]

DIR holds dev.jsonl and test.jsonl of `uma data build`: bounds are fitted on dev jobs, and every number is from test jobs. Candidates have
the first stage's log-odds as priors; a prefix of 0 tokens leaves out who cannot reach the top by the prior alone. Both ways take turns job
by job, with no prefix cache between jobs. Goal: 2x at a loss of at most 0.002. Rows go to bench/results/cascade.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench.rows import OthersShare, append_row, quantiles
from uma_engine import Candidate, Engine
from uma_engine.ranking.metrics import ndcg, paired_bootstrap
from uma_engine.train.groups import Group, read_groups

FIT_JOBS = 12
TOP = 10
MOST_TOKENS = 64  # of a candidate, as in training


def people(group: Group) -> list[Candidate]:
    return [Candidate(c.id, c.text, prior=c.prior) for c in group.candidates]


def quality(group: Group, ids: list[str]) -> float:
    grades = {c.id: c.grade for c in group.candidates}
    return ndcg([grades[i] for i in ids], group.ideal)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--precision", choices=("exact", "near", "fast"), default="near")
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--offset", type=int, default=0, help="of the first test job: other jobs than in a run before")
    parser.add_argument("--prefix", type=int, nargs="+", default=[0, 16, 24])
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    others = OthersShare()
    fit, test = read_groups(args.data / "dev.jsonl"), read_groups(args.data / "test.jsonl")
    fit = [fit[i * len(fit) // FIT_JOBS] for i in range(FIT_JOBS)]
    test = [test[(args.offset + i * len(test) // args.jobs) % len(test)] for i in range(args.jobs)]
    with Engine(args.model, precision=args.precision, max_lora_rank=64) as engine:
        name = None
        if args.adapter:
            name = "tuned"
            engine.load_adapter(name, args.adapter)
        for prefix in args.prefix:
            jobs = [(g.job, people(g)[:40]) for g in fit]
            for confidence in args.confidence:
                bounds = engine.fit_cascade(
                    jobs,
                    prefix_tokens=prefix,
                    confidence=confidence,
                    adapter=name,
                    max_tokens_per_candidate=MOST_TOKENS,
                )
                found, plain = [], []
                for group in test:
                    plain.append(_timed(engine, group, name, None))
                    found.append(_timed(engine, group, name, bounds))
                    print(f"  {len(found)}/{len(test)}", end="\r", file=sys.stderr, flush=True)
                ratios = quantiles([p["seconds"] / f["seconds"] for p, f in zip(plain, found, strict=True)])
                loss = paired_bootstrap([f["ndcg"] for f in found], [p["ndcg"] for p in plain])
                tokens = sum(p["tokens"] for p in plain) / sum(f["tokens"] for f in found)
                whole = sum(f["whole"] for f in found) / sum(len(g.candidates) for g in test)
                row: dict[str, Any] = {
                    "bench": "cascade", "model": args.model, "tuned": bool(args.adapter), "precision": args.precision,
                    "prefix_tokens": prefix, "confidence": confidence, "jobs": len(test),
                    "times": round(ratios[1], 3), "times_p20": round(ratios[0], 3), "times_p80": round(ratios[2], 3),
                    "tokens_ratio": round(tokens, 3), "whole_share": round(whole, 3), "offset": args.offset,
                    "ndcg": round(sum(p["ndcg"] for p in plain) / len(plain), 4),
                    "ndcg_change": [round(x, 4) for x in (loss.mean, loss.low, loss.high)],
                    "others_share": others.read(),
                }  # fmt: skip
                print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
                if not args.no_save:
                    append_row("cascade", row)


def _timed(engine: Engine, group: Group, adapter: str | None, bounds: Any) -> dict[str, float]:
    engine._stack.forget_cached()
    began = time.perf_counter()
    answer = engine.rank(
        group.job, people(group), top_n=TOP, adapter=adapter, cascade=bounds, max_tokens_per_candidate=MOST_TOKENS
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": answer.usage.computed_tokens,
        "ndcg": quality(group, [r.id for r in answer.results]),
        "whole": len(group.candidates if answer.cascade is None else answer.cascade.whole),
    }


if __name__ == "__main__":
    main()
