"""Ranking 64 candidates under one job: this engine against transformers, interleaved in one run.

    python -m bench.ranking [--model smollm2-135m] [--repeats 5] [--candidates 64]

Both get the same token ids, the same weights and the same threads; transformers computes
in fp32, ours in `--precision`. Transformers runs its best form:
the job's keys and values are computed once and copied into batches of candidates. Each side lives in a process of its
own, so that its peak memory is its own, and the two take turns. Scores are compared before any speed is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

LARGEST_DIFFERENCE = 2e-3  # of a label logit margin between two fp32 engines; above it no speed is printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--precision", choices=("exact", "near", "fast"), default="near", help="of our linear layers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    sides = {name: Side(name, args) for name in SIDES}
    try:
        scores = {name: side.ask("scores")["scores"] for name, side in sides.items()}  # also warms both up
        worst = max(abs(a - b) for a, b in zip(*scores.values(), strict=True))
        print(f"largest difference of a score (logit margin) between the two: {worst:.2e}", flush=True)
        if worst > LARGEST_DIFFERENCE:
            print(f"that is more than {LARGEST_DIFFERENCE}: no speed is reported", file=sys.stderr)
            return 1
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for turn in range(args.repeats):
            for name, side in sides.items():
                seconds[name].append(side.ask("run")["seconds"])
            print(
                f"turn {turn + 1}/{args.repeats}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()),
                flush=True,
            )
        last = {name: side.ask("quit") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.stop()
    report(args, seconds, last, worst)
    return 0


def report(args: argparse.Namespace, seconds: dict[str, list[float]], last: dict[str, Any], worst: float) -> None:
    from bench.ceiling import ceiling
    from bench.rows import append_row, quantiles

    ours, theirs = seconds["uma"], seconds["transformers"]
    ratios = quantiles([b / a for a, b in zip(ours, theirs, strict=True)])
    rows = []
    for name, times in seconds.items():
        p20, p50, p80 = quantiles(times)
        rows.append(
            {
                "bench": "ranking",
                "engine": name,
                "case": last[name]["workload"],
                "model": args.model,
                "precision": args.precision if name == "uma" else "fp32, weights dequantised from the same file",
                "candidates_per_s": args.candidates / p50,
                "p20_s": p20,
                "p50_s": p50,
                "p80_s": p80,
                "gflop_s": last["uma"]["flops"] / p50 / 1e9,  # of the linear layers, each token counted once
                "pct_fma": 100 * last["uma"]["flops"] / p50 / 1e9 / ceiling("fp32_fma", args.threads),
                "peak_rss_mib": last[name]["peak_rss_mib"],
                "version": last[name]["version"],
                "ratio_p20": ratios[0] if name == "uma" else None,
                "ratio_p50": ratios[1] if name == "uma" else None,
                "ratio_p80": ratios[2] if name == "uma" else None,
                "max_score_difference": worst,
                "threads": args.threads,
            }
        )
    print(
        f"\n{'engine':14} {'candidates/s':>12} {'p20..p80 s':>16} {'GFLOP/s':>8} {'% of FMA peak':>14} {'peak RSS MiB':>13}"
    )
    for row in rows:
        times = f"{row['p20_s']:7.2f}..{row['p80_s']:<7.2f}"
        rates = f"{row['gflop_s']:8.0f} {row['pct_fma']:14.0f} {row['peak_rss_mib']:13.0f}"
        print(f"{row['engine']:14} {row['candidates_per_s']:12.2f} {times} {rates}")
        append_row("ranking", row)
    print(f"ratio, turn by turn: {ratios[1]:.2f} ({ratios[0]:.2f}..{ratios[2]:.2f})")


class Side:
    """A worker process, asked one line at a time."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "bench.ranking", "--worker", name, "--model", args.model]
        command += ["--candidates", str(args.candidates), "--threads", str(args.threads), "--precision", args.precision]
        env = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "UMA_NUM_THREADS": str(args.threads),
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker ended with status {self.process.wait()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def worker(args: argparse.Namespace) -> int:
    run, version, workload, flops = SIDES[args.worker](args)
    for line in sys.stdin:
        reply: dict[str, Any] = {}
        if line.strip() == "quit":
            from bench.peers.serve import peak_rss_mib

            peak = peak_rss_mib()
            last = {"peak_rss_mib": peak, "version": version, "workload": workload, "flops": flops}
            print(json.dumps(last), flush=True)
            return 0
        began = time.perf_counter()
        scores = run()
        reply["seconds"] = time.perf_counter() - began
        if line.strip() == "scores":
            reply["scores"] = scores
        print(json.dumps(reply), flush=True)
    return 0


def uma_side(args: argparse.Namespace) -> tuple[Any, str, str, float]:
    from bench.workload import LABELS, make_workload
    from uma_engine import Engine, __version__

    options = {"num_threads": args.threads, "precision": args.precision}
    engine = Engine(args.model, enable_prefix_cache=False, **options)  # every run computes the job anew
    w = make_workload(engine.tokenizer, candidates=args.candidates)
    items = [c + w.suffix for c in w.candidates]

    def run() -> list[float]:
        return [s.logits[0] - s.logits[1] for s in engine.score(w.prefix, items, labels=LABELS)]

    tokens = len(w.prefix) + sum(len(item) for item in items)
    flops = tokens * engine.flops_per_token
    return run, f"uma-engine {__version__} {engine.stack_info().backend}", w.name, flops


def transformers_side(args: argparse.Namespace) -> tuple[Any, str, str, float]:
    import copy

    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from bench.workload import make_workload
    from uma_engine.catalog import open_model, resolve
    from uma_engine.train.base_model import transformers_model

    torch.set_num_threads(args.threads)
    files = open_model(resolve(args.model))
    w = make_workload(files.tokenizer, candidates=args.candidates)
    model = transformers_model(files, AutoModelForCausalLM)
    tails = [c + w.suffix for c in w.candidates]

    @torch.inference_mode()
    def run(batch: int = 4) -> list[float]:
        scores: list[float] = []
        base = model(input_ids=torch.tensor([w.prefix]), use_cache=True, logits_to_keep=1).past_key_values
        for i in range(0, len(tails), batch):
            rows = tails[i : i + batch]
            cache = copy.deepcopy(base)
            cache.batch_repeat_interleave(len(rows))
            logits = model(
                input_ids=torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            scores += (logits[:, w.labels[0]] - logits[:, w.labels[1]]).tolist()
        return scores

    return run, f"transformers {transformers.__version__} torch {torch.__version__}", w.name, 0.0


SIDES = {"uma": uma_side, "transformers": transformers_side}

if __name__ == "__main__":
    sys.exit(main())
