"""How the cost of a ranking grows: with the number of candidates, and with one candidate that is far longer than the others.

    python -m bench.growth [--precision near] [--most 4096]

Two rows go to bench/results/growth.jsonl: seconds for each number of candidates, and what a candidate of 4,000 tokens adds
to a ranking of short ones, beside what it costs when it is ranked alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

from bench.rows import OthersShare, append_row
from uma_engine import Engine

JOB, SHORT, LONG = 200, 32, 4000  # tokens
COUNTS = (16, 64, 256, 1024, 4096)
LABELS = (" Yes", " No")


def seconds(engine: Engine, job: Sequence[int], items: Sequence[Sequence[int]]) -> float:
    began = time.perf_counter()
    engine.score(job, items, labels=LABELS)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", choices=("exact", "near", "fast"), default="near")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="candidates")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    rng = random.Random(7)

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, 40_000) for _ in range(count)]

    job, items, long = ids(JOB), [ids(SHORT) for _ in range(args.most)], ids(LONG)
    options = {"precision": args.precision, "enable_prefix_cache": False, "max_model_len": 8192}
    others = OthersShare()
    with Engine(args.model, **options) as engine:
        seconds(engine, job, items[:16])  # warm
        counts = [count for count in COUNTS if count <= args.most]
        # The smaller ones are repeated, so that all have a few seconds to be timed in.
        times = {n: statistics.median(seconds(engine, job, items[:n]) for _ in range(max(1, 256 // n))) for n in counts}
        for n, took in times.items():
            print(f"{n:5} candidates {took:8.2f} s, {1e3 * took / n:6.2f} ms each", flush=True)
        few = items[:63]
        turns = [
            (seconds(engine, job, few), seconds(engine, job, [long]), seconds(engine, job, [*few, long]))
            for _ in range(3)
        ]
    without, alone, together = (statistics.median(turn[i] for turn in turns) for i in range(3))
    print(f"63 short {without:.2f} s; one of {LONG} tokens alone {alone:.2f} s; both {together:.2f} s", flush=True)
    if args.no_save:
        return
    shared = {"bench": "growth", "model": args.model, "precision": args.precision, "others_share": others.read()}
    append_row("growth", shared | {"case": f"{JOB}+Nx{SHORT} tokens", "seconds": {str(n): t for n, t in times.items()}})
    row = {
        "case": f"63 of {SHORT} tokens and one of {LONG}",
        "short_s": without,
        "long_alone_s": alone,
        "together_s": together,
    }
    append_row("growth", shared | row)


if __name__ == "__main__":
    main()
