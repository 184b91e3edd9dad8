"""What words and notes cost on top of scores: the same ranking without and with them, in tokens and in time, turn by turn in one run.

    python -m bench.explain [--model smollm2-135m] [--candidates 100] [--top 5] [--tokens 96] [--notes 32] [--repeats 3]

Job and candidates are those of `examples/`, repeated with other ids and a line of their own where more are asked for than there are; the
surface is `examples/surface.toml`. Before each run the prefix cache is emptied, so that scores alone and scores with words both compute
everything anew. Time is the processor time of this process, beside it that of the clock. `floor` is the ratio of scores alone to
themselves. Scores must have the same bits with and without words before any number is printed. For the notes the run also says what they
did to the order: nDCG@10 of the shortlist's candidates against the groups of `examples/candidates_key.csv`, before and after.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GOAL = 1.25
GAINS = {"relevant": 2, "adjacent": 1, "far": 0}


def main() -> int:
    from bench.rows import append_row, quantiles
    from uma_engine import Candidate, Engine
    from uma_engine.tasks.candidates import read_candidates, read_job

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--notes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    job = read_job(EXAMPLES / "job.md")
    base = read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)
    people = [
        base[i]
        if i < len(base)
        else Candidate(f"{base[i % len(base)].id}-{i}", f"Profile {i}\n{base[i % len(base)].text}")
        for i in range(args.candidates)
    ]
    scores: dict[str, Any] = {"surface": EXAMPLES / "surface.toml", "job_facts": {"budget": 60}}
    words = scores | {"explain": "words", "explain_top": args.top, "explain_tokens": args.tokens}
    runs = {"scores": scores, "words": words, "notes": scores | {"deliberate": args.notes, "explain_top": args.top}}
    runs["again"] = scores
    with Engine(args.model, num_threads=args.threads) as engine:

        def rank(options: dict[str, Any]) -> tuple[Any, float, float]:
            empty(engine)
            began = time.process_time(), time.perf_counter()
            answer = engine.rank(job, people, **options)
            return answer, time.process_time() - began[0], time.perf_counter() - began[1]

        answers = {name: rank(options)[0] for name, options in runs.items()}  # also warms up
        for a, b in zip(answers["scores"].all_results, answers["words"].all_results, strict=True):
            if a.logits != b.logits:
                print("scores depend on whether words are asked for: no number is reported", file=sys.stderr)
                return 1
        times: dict[str, dict[str, list[float]]] = {"cpu": {}, "wall": {}}
        for _ in range(args.repeats):
            for name, options in runs.items():
                _, cpu, wall = rank(options)
                times["cpu"].setdefault(name, []).append(cpu)
                times["wall"].setdefault(name, []).append(wall)
                time.sleep(0.03)

    def ratios(clock: str, name: str) -> list[float]:
        found = times[clock]
        return [round(q, 4) for q in quantiles([b / a for a, b in zip(found["scores"], found[name], strict=True)])]

    print("floor: " + ", ".join(f"{clock} {ratios(clock, 'again')}" for clock in times))
    alone = answers["scores"].usage.computed_tokens
    for name in ("words", "notes"):
        answer = answers[name]
        found = {clock: ratios(clock, name) for clock in times}
        in_tokens = answer.usage.computed_tokens / alone
        goal = f", goal {GOAL}: {'met' if found['wall'][1] <= GOAL else 'missed'}" if name == "words" else ""
        print(
            f"{name} for {args.top} of {len(people)}: tokens {in_tokens:.3f}, "
            + ", ".join(f"{clock} {q[1]:.3f} ({q[0]:.3f}..{q[2]:.3f})" for clock, q in found.items())
            + goal
        )
        for s in answer.usage.stages:
            print(f"  {s.name}: {s.computed_tokens} tokens computed, {s.output_tokens} written, {s.seconds:.2f} s")
        row: dict[str, object] = {
            "bench": "explain",
            "case": f"{name} for {args.top} of {len(people)}",
            "model": args.model,
            "tokens_alone": alone,
            "tokens": answer.usage.computed_tokens,
            "ratio_tokens": round(in_tokens, 4),
            "stages": {s.name: [s.computed_tokens, s.output_tokens] for s in answer.usage.stages if s.computed_tokens},
            "threads": args.threads,
            "repeats": args.repeats,
        }
        for clock, q in found.items():
            row |= {f"{clock}_p50_s_alone": round(quantiles(times[clock]["scores"])[1], 4), f"{clock}_ratio": q}
            row |= {f"{clock}_floor": ratios(clock, "again")}
        if name == "words":
            kept = [s for a in answer.assessments for part in (a.strengths, a.gaps, a.questions) for s in part]
            own = sum(s.origin == "model" for s in kept)
            dropped = sum(len(a.dropped) for a in answer.assessments)
            print(f"  {own} sentences of the model kept, {dropped} dropped, {len(kept) - own} templates")
            row |= {"kept": own, "dropped": dropped, "templates": len(kept) - own}
        else:
            change = answer.deliberation
            before, after = (ndcg([people[i].id for i in o]) for o in (change.order_before, change.order))
            print(
                f"  tau {change.kendall_tau:.3f}, {change.moved} moved, nDCG of the shortlist {before:.3f} -> {after:.3f}"
            )
            row |= {
                "tau": round(change.kendall_tau, 4),
                "moved": change.moved,
                "ndcg": [round(before, 4), round(after, 4)],
            }
        append_row("explain", row)
    return 0


def empty(engine: Any) -> None:
    """Forget what the prefix cache holds: every block is handed out once."""
    pool = engine._stack.block_pool

    def clear(_: object) -> None:
        taken = pool.allocate(pool.num_free)
        pool.free(taken)

    engine._stack.loop.call(clear)


def ndcg(ids: Sequence[str]) -> float:
    """Of this order of these candidates, at 10; ids made of another's count as that one's."""
    with (EXAMPLES / "candidates_key.csv").open(encoding="utf-8", newline="") as file:
        groups = {row["id"]: GAINS[row["group"]] for row in csv.DictReader(file)}
    gains = [groups[name.partition("-")[0]] for name in ids]

    def dcg(values: Sequence[int]) -> float:
        return math.fsum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(values[:10]))

    best = dcg(sorted(gains, reverse=True))
    return dcg(gains) / best if best else 1.0


if __name__ == "__main__":
    sys.exit(main())
