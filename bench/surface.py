"""What further probes on one candidate cost: one probe against several, in tokens and in time, interleaved in one run.

    python -m bench.surface [--model smollm2-135m] [--candidates 24] [--repeats 5] [--probes 2 3 4]

One probe is `rank`'s own form: the candidate and its question in one leaf. Several share the candidate's computed text and the
words with which they begin. The job and the candidates are those of `examples/`; the prefix cache is off, so that every run
computes everything anew. `floor` is the ratio of one probe to itself, turn by turn: what this machine's noise is worth. A score must have
the same bits in both forms before any number is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GOAL = 1.35
PROBES = (
    "Answer {labels}: do the skills match the job?",
    "Answer {labels}: does the experience fit the tasks?",
    "Answer {labels}: is the profile clearly written?",
    "Answer {labels}: would the job suit the person?",
    "Answer {labels}: is the seniority right?",
    "Answer {labels}: does the industry match?",
)


def main() -> int:
    from bench.rows import append_row, quantiles
    from uma_engine import Engine
    from uma_engine.ranking.surface import Read, Surface
    from uma_engine.tasks.candidates import read_candidates, read_job

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--probes", type=int, nargs="+", default=[2, 3, 4], choices=range(2, len(PROBES) + 1))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    job = read_job(EXAMPLES / "job.md")
    people = read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)[: args.candidates]
    surfaces = {
        n: Surface(f"{n} probes", reads=tuple(Read(f"probe {i}", PROBES[i]) for i in range(n)))
        for n in (1, *args.probes)
    }
    with Engine(args.model, enable_prefix_cache=False, num_threads=args.threads) as engine:
        answers = {n: engine.rank(job, people, surface=surface) for n, surface in surfaces.items()}  # also warms up
        for answer in answers.values():
            for a, b in zip(answer.all_results, answers[1].all_results, strict=True):
                if a.logits[:2] != b.logits:
                    print("the first probe's logits depend on the others: no number is reported", file=sys.stderr)
                    return 1
        seconds: dict[object, list[float]] = {n: [] for n in (*surfaces, "floor")}
        for _ in range(args.repeats):
            for n in seconds:
                began = time.perf_counter()
                engine.rank(job, people, surface=surfaces[1 if n == "floor" else n])  # type: ignore[index]
                seconds[n].append(time.perf_counter() - began)
                time.sleep(0.03)
    floor = quantiles([b / a for a, b in zip(seconds[1], seconds["floor"], strict=True)])
    tokens = {n: answer.usage.computed_tokens for n, answer in answers.items()}
    print(
        f"{len(people)} candidates, {tokens[1] / len(people):.0f} tokens each with one probe and their share of the job"
    )
    print(f"floor {floor[1]:.3f} ({floor[0]:.3f}..{floor[2]:.3f})")
    for n in args.probes:
        ratio = quantiles([b / a for a, b in zip(seconds[1], seconds[n], strict=True)])
        in_tokens = tokens[n] / tokens[1]
        print(
            f"{n} probes cost {in_tokens:.3f} in tokens, {ratio[1]:.3f} ({ratio[0]:.3f}..{ratio[2]:.3f}) in time; goal {GOAL}"
        )
        append_row(
            "surface",
            {
                "bench": "surface",
                "case": f"{n} probes on {len(people)} candidates",
                "model": args.model,
                "tokens_one": tokens[1],
                "tokens": tokens[n],
                "ratio_tokens": round(in_tokens, 4),
                "ratio_p20": round(ratio[0], 4),
                "ratio_p50": round(ratio[1], 4),
                "ratio_p80": round(ratio[2], 4),
                "floor_p20": round(floor[0], 4),
                "floor_p50": round(floor[1], 4),
                "floor_p80": round(floor[2], 4),
                "p50_s_one": round(quantiles(seconds[1])[1], 4),
                "p50_s": round(quantiles(seconds[n])[1], 4),
                "threads": args.threads,
                "repeats": args.repeats,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
