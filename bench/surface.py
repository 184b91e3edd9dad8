"""What further probes on one candidate cost: one probe against several, in tokens and in time, interleaved in one run.

    python -m bench.surface [--model smollm2-135m] [--candidates 24] [--repeats 5] [--probes 2 3 4]

One probe is `rank`'s own form: the candidate and its question in one leaf. Several share the candidate's computed text and the
words with which they begin. The job and the candidates are those of `examples/`; the prefix cache is off, so that every run
computes everything anew; the forms take turns, another one first each time. Time is the processor time of this process, beside it that
of the clock, which other load inflates. `floor` is
the ratio of one probe to itself, turn by turn: a ratio says no more than its floor lets it, and where the floor is wider than
`FLOOR_WIDTH` the run says so and gives no verdict. A score must have the same bits in both forms before any number is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GOAL = 1.35
FLOOR_WIDTH = 0.10  # from p20 to p80
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
        times: dict[str, dict[int, list[float]]] = {clock: {n: [] for n in (*surfaces, 0)} for clock in ("cpu", "wall")}
        order = [*times["cpu"]]  # 0: one probe again, for the floor
        for turn in range(args.repeats):
            for n in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody is always first
                began = time.process_time(), time.perf_counter()
                engine.rank(job, people, surface=surfaces[n or 1])
                times["cpu"][n].append(time.process_time() - began[0])
                times["wall"][n].append(time.perf_counter() - began[1])
                time.sleep(0.03)

    def ratios(clock: str, n: int) -> list[float]:
        found = times[clock]
        return [round(q, 4) for q in quantiles([b / a for a, b in zip(found[1], found[n], strict=True)])]

    floors = {clock: ratios(clock, 0) for clock in times}
    tokens = {n: answer.usage.computed_tokens for n, answer in answers.items()}
    print(
        f"{len(people)} candidates, {tokens[1] / len(people):.0f} tokens each with one probe and their share of the job"
    )
    print("floor: " + ", ".join(f"{clock} {q[1]:.3f} ({q[0]:.3f}..{q[2]:.3f})" for clock, q in floors.items()))
    for n in args.probes:
        found = {clock: ratios(clock, n) for clock in times}
        in_tokens = tokens[n] / tokens[1]
        said = ", ".join(f"{clock} {q[1]:.3f} ({q[0]:.3f}..{q[2]:.3f})" for clock, q in found.items())
        steady = floors["cpu"][2] - floors["cpu"][0] <= FLOOR_WIDTH
        within = "within" if max(in_tokens, found["cpu"][1]) <= GOAL else "above"
        print(
            f"{n} probes: tokens {in_tokens:.3f}, {said}: {f'{within} {GOAL}' if steady else 'too noisy for a verdict'}"
        )
        row: dict[str, object] = {
            "bench": "surface",
            "case": f"{n} probes on {len(people)} candidates",
            "model": args.model,
            "tokens_one": tokens[1],
            "tokens": tokens[n],
            "ratio_tokens": round(in_tokens, 4),
            "threads": args.threads,
            "repeats": args.repeats,
        }
        for clock, q in found.items():
            row[f"{clock}_p50_s_one"] = round(quantiles(times[clock][1])[1], 4)
            row[f"{clock}_p50_s"] = round(quantiles(times[clock][n])[1], 4)
            row[f"{clock}_ratio"] = q
            row[f"{clock}_floor"] = floors[clock]
        append_row("surface", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
