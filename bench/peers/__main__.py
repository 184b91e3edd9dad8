"""`python -m bench.peers`: this engine and others in turns on the same token ids; rows go to bench/results/peers.jsonl.

Every contestant is a process of its own; they take turns, so that both see the same machine. Before a speed is printed
the scores of both are compared with those of our `exact` precision: an fp32 peer must agree, and the largest error of both
is printed beside the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.ceiling import Meter
from bench.peers.environments import HOME, environment
from bench.rows import ROOT, append_row, quantiles


@dataclass(frozen=True)
class Contest:
    """A peer's variant, and the precision of ours that it is compared with. `limit`: largest error of a score allowed."""

    peer: str
    variant: str
    label: str
    ours: str
    limit: float
    tasks: tuple[str, ...] = ("rank", "prefill", "decode_1", "decode_16")


SAME, ROUNDED = 0.01, 4.0  # fp32 engines agree to 0.01 of a logit margin; 8-bit ones were seen up to 1.8 away
CONTESTS = (
    Contest("transformers", "fp32", "transformers fp32", "near", SAME),
    Contest("onnxruntime", "fp32", "ONNX Runtime fp32", "near", SAME),
    Contest("uma", "onnx", "ONNX Runtime fp32, our exported graph", "near", SAME, ("rank", "prefill")),
    Contest("onnxruntime", "int8", "ONNX Runtime dynamic int8", "fast", ROUNDED),
    Contest("llama_cpp", "file", "llama.cpp, the file's own 4 bits", "fast", ROUNDED),
    Contest("llama_cpp", "q4_0", "llama.cpp Q4_0 (requantised)", "fast", ROUNDED),
    Contest("llama_cpp", "q8_0", "llama.cpp Q8_0 (requantised)", "fast", ROUNDED),
    Contest("ctranslate2", "int8", "CTranslate2 int8", "fast", ROUNDED),
    Contest("openvino", "q8_0", "OpenVINO, 8-bit weights", "fast", ROUNDED),
    Contest("transformers", "int8", "transformers dynamic int8", "fast", ROUNDED),
    Contest("transformers", "peft", "transformers + PEFT, 4 adapters", "near", SAME, ("rank_lora",)),
)
PEAKS = {"near": "int8_madd", "fast": "int4_madd"}  # the ceiling of ours; the files' weights have 4 bits
UNITS = {"rank": "candidates/s", "rank_lora": "candidates/s"}  # of the others: tokens/s
FLAT, STEPS = 16, 64  # sequences of 450 tokens; decoding steps, the prompt of 64 tokens included in the time


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", default="", help="peers or peer:variant, separated by commas")
    parser.add_argument("--tasks", default="", help="of each contest, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    chosen = [c for c in CONTESTS if not args.only or {c.peer, f"{c.peer}:{c.variant}"} & set(args.only.split(","))]
    from bench.peers.material import make_material

    settings = make_material(args.model, args.threads, args.candidates)
    reference = Reference(settings, args)
    failed = []
    for contest in chosen:
        try:
            run_contest(contest, reference, settings, args)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{contest.label}: not measured: {error}", file=sys.stderr, flush=True)
            failed.append(contest.label)
    return 1 if failed else 0


class Reference:
    """Scores of our `exact` precision, computed once for each task that has scores."""

    def __init__(self, settings: dict[str, Any], args: argparse.Namespace) -> None:
        self._settings = settings
        self._sizes = {"rank": args.candidates, "rank_lora": args.candidates, "prefill": FLAT}
        self._known: dict[str, list[float]] = {}

    def error(self, task: str, scores: list[float] | None) -> float | None:
        """The largest difference of a score from `exact`, None for a task without scores."""
        if scores is None:
            return None
        if task not in self._known:
            worker = Worker("uma", "exact", self._settings)
            try:
                self._known[task] = worker.ask(f"{task} {self._sizes[task]}")["scores"]
            finally:
                worker.stop()
        return max(abs(a - b) for a, b in zip(scores, self._known[task], strict=True))


def run_contest(contest: Contest, reference: Reference, settings: dict[str, Any], args: argparse.Namespace) -> None:
    ours, theirs = Worker("uma", contest.ours, settings), Worker(contest.peer, contest.variant, settings)
    try:
        tasks = [t for t in contest.tasks if t in theirs.tasks and (not args.tasks or t in args.tasks.split(","))]
        rows = [compare(task, contest, reference, (ours, theirs), settings, args) for task in tasks]
        memory = ours.ask("quit")["peak_rss_mib"], theirs.ask("quit")["peak_rss_mib"]
    finally:
        ours.stop()
        theirs.stop()
    for row in rows:
        row |= {"peak_rss_mib": round(memory[0]), "peer_peak_rss_mib": round(memory[1])}
        row |= {"version": ours.version, "peer_version": theirs.version, "threads": args.threads, "model": args.model}
        errors = row["max_score_error"], row["peer_max_score_error"]
        print(
            f"{contest.label:38} {row['task']:10} ours ({contest.ours}) {row['value']:8.2f}  theirs {row['peer_value']:8.2f}"
            f" {row['unit']:13} ratio {row['ratio']:.2f} ({row['ratio_p20']:.2f}..{row['ratio_p80']:.2f})"
            f"  RSS {memory[0]:.0f} / {memory[1]:.0f} MiB"
            + (f"  score errors {errors[0]:.4f} / {errors[1]:.4f}" if errors[0] is not None else ""),
            flush=True,
        )
        if not args.no_save:
            append_row("peers", row)


def compare(
    task: str,
    contest: Contest,
    reference: Reference,
    sides: tuple[Worker, Worker],
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    size = {"rank": args.candidates, "rank_lora": args.candidates, "prefill": FLAT}.get(task, STEPS)
    amount = {"prefill": FLAT * 450, "decode_1": STEPS, "decode_16": 16 * STEPS}.get(task, size)
    for side in sides:
        side.ask(f"{task} {8 if size > STEPS or task.startswith('rank') else 4}")  # warm
    seconds: tuple[list[float], list[float]] = ([], [])
    scores: list[Any] = [None, None]
    meter = Meter(("fp32_fma", PEAKS[contest.ours], "read"), args.threads)
    for _ in range(args.repeats):
        for i, side in enumerate(sides):
            time.sleep(0.1)  # worker threads of some libraries spin for a while after a call
            reply = side.ask(f"{task} {size}")
            seconds[i].append(reply["seconds"])
            scores[i] = reply["scores"]
        time.sleep(0.1)
        meter()
    errors = [reference.error(task, found) for found in scores]
    if errors[1] is not None and errors[1] > contest.limit:
        raise RuntimeError(f"scores of `{task}` are {errors[1]:.3f} from the exact ones, more than {contest.limit}")
    p20, p50, p80 = quantiles(seconds[0])
    ratios = quantiles([b / a for a, b in zip(*seconds, strict=True)])
    ceilings = {kind: round(meter.median(kind), 1) for kind in ("fp32_fma", PEAKS[contest.ours], "read")}
    # Linear layers alone; a decoding step is bound by the weights it reads, and its share of a multiply rate says nothing.
    tokens = {"prefill": FLAT * 450}.get(task, settings["rank_tokens"] if task.startswith("rank") else 0)
    gflop_s = round(tokens * settings["flops_per_token"] / p50 / 1e9, 1)
    return {
        "ceilings": ceilings,
        "peak": PEAKS[contest.ours],
        "gflop_s": gflop_s or None,
        "pct_peak": round(100 * gflop_s / ceilings[PEAKS[contest.ours]], 1) if gflop_s else None,
        "bench": "peers",
        "task": task,
        "peer": contest.label,
        "precision": contest.ours,
        "unit": UNITS.get(task, "tokens/s"),
        "value": round(amount / p50, 3),
        "p20_s": p20,
        "p50_s": p50,
        "p80_s": p80,
        "peer_value": round(amount / quantiles(seconds[1])[1], 3),
        "ratio": round(ratios[1], 3),
        "ratio_p20": round(ratios[0], 3),
        "ratio_p80": round(ratios[2], 3),
        "max_score_error": errors[0],
        "peer_max_score_error": errors[1],
        "candidates": args.candidates,
    }


class Worker:
    """A contestant's process, asked one line at a time."""

    def __init__(self, peer: str, variant: str, settings: dict[str, Any]) -> None:
        module = import_module(f"bench.peers.{peer}")
        python = environment(peer, module.REQUIREMENTS, module.BUILD) if peer != "uma" else Path(sys.executable)
        work = HOME / peer / settings["model"]
        work.mkdir(parents=True, exist_ok=True)
        path = work / "settings.json"
        path.write_text(json.dumps({**settings, "work": str(work)}))
        threads = str(settings["threads"])
        env = os.environ | {"OMP_NUM_THREADS": threads, "UMA_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")]) if peer == "uma" else str(ROOT)
        command = [str(python), "-m", "bench.peers.serve", peer]
        if hasattr(module, "prepare"):
            subprocess.run([*command, "prepare", str(path)], check=True, env=env, cwd=ROOT)
        self.process = subprocess.Popen(
            [*command, variant, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        ready = self._read()
        self.tasks: list[str] = ready["tasks"]
        self.version: str = ready["version"]

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a contestant ended with status {self.process.wait()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    sys.exit(main())
