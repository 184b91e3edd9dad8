"""What each precision costs in accuracy: score margins of 1,008 (job, candidate) pairs, and perplexity, against `exact`.

    python -m bench.accuracy [--model smollm2-135m] [--precisions near,fast] [--adapter DIR]
    python -m bench.accuracy --precisions "" --peer llama_cpp:file
    python -m bench.accuracy --precisions "" --formats bfloat16,fp8 --jobs 4

Jobs are 21 real postings (bench/data), candidates the 48 people of examples/. `exact` computes fp32 activations on the same
weights; a margin is the logit of the first label less that of the second. Perplexity is over the postings' tokens. A peer is given the
same token ids, and held against the same `exact`. `--formats`: what a GPU rounds, computed by the ops' references on the CPU: the
device's runner with weights, activations and KV cache in bf16, and with the blocks' products in e4m3.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.rows import ROOT, append_row
from uma_engine import Candidate
from uma_engine.tasks.candidates import read_candidates

POSTINGS = ROOT / "bench/data/postings.jsonl"
CANDIDATES = ROOT / "examples/candidates.jsonl"


def margins(
    model: str, precision: str, threads: int, jobs: Sequence[str], people: Sequence[Candidate], adapter: str | None
) -> torch.Tensor:
    """[jobs, candidates] fp64: logit of the first label less the second's, in the candidates' order."""
    from uma_engine import Engine

    with Engine(model, precision=precision, num_threads=threads, max_lora_rank=64) as engine:
        if adapter:
            engine.load_adapter("tuned", adapter)
        rows = []
        for number, job in enumerate(jobs, 1):
            answer = engine.rank(job, people, adapter="tuned" if adapter else None)
            rows.append([r.logits[0] - r.logits[1] for r in sorted(answer.all_results, key=lambda r: r.index)])
            print(f"\r{precision}: job {number}/{len(jobs)}", end="", flush=True)
        print()
        return torch.tensor(rows, dtype=torch.float64)


def format_margins(format: str, model: str, jobs: Sequence[str], people: Sequence[Candidate]) -> torch.Tensor:
    """[jobs, candidates] fp64, as `margins`, of the device's runner over the references, in bf16 (`bfloat16`) or with e4m3 products
    (`fp8`)."""
    from uma_engine.catalog import open_model, resolve
    from uma_engine.catalog.chat_template import ChatTemplate
    from uma_engine.config import EngineConfig
    from uma_engine.core import Request, RequestKind, Segment
    from uma_engine.kv_cache import BlockPool
    from uma_engine.models import load_model
    from uma_engine.models.weights import Placement
    from uma_engine.ranking.surface import DEFAULT_PROBE, question_of
    from uma_engine.runner import DeviceRunner
    from uma_engine.scheduler import Scheduler, ScoreReady
    from uma_engine.tasks.base import DEFAULT_LABELS
    from uma_engine.tasks.rank import DEFAULT_INSTRUCTION, RankPrompt, label_ids
    from uma_kernels import dispatch

    files, cpu, blocks, longest = open_model(resolve(model)), torch.device("cpu"), 512, 4096
    encode = files.tokenizer.encode
    question = question_of(DEFAULT_PROBE, DEFAULT_LABELS)
    prompt = RankPrompt.build(files.tokenizer, ChatTemplate(files.chat_template, files.tokenizer), question)
    labels = tuple(label_ids(files.tokenizer, DEFAULT_LABELS))
    config = EngineConfig(max_loras=0, enforce_eager=True, max_num_batched_tokens=2048)
    rows = []
    with dispatch.use_backend("reference"):
        placement = Placement(cpu, torch.bfloat16, fp8=format == "fp8")
        with torch.inference_mode():
            loaded = load_model(files, max_positions=longest, placement=placement)
        runner = DeviceRunner(loaded, config, longest)
        runner.allocate(blocks)
        for number, job in enumerate(jobs, 1):
            scheduler = Scheduler(config, BlockPool(blocks, config.block_size), longest)
            above = (
                prompt.head
                + encode(DEFAULT_INSTRUCTION)
                + prompt.after_instruction
                + encode(job.strip())
                + prompt.after_job
            )
            leaves = [encode(person.text.strip()) + prompt.after_candidate for person in people]
            segments = [Segment(above), *(Segment(leaf, parent=0, scored=True) for leaf in leaves)]
            scheduler.add_request(Request("job", RequestKind.SCORE, segments, label_token_ids=labels))
            found: dict[int, float] = {}
            while scheduler.has_unfinished():
                output = scheduler.schedule()
                for event in scheduler.update(output, runner.run(output)):
                    if isinstance(event, ScoreReady):
                        found[event.segment_index] = event.logits[0] - event.logits[1]
            rows.append([found[i] for i in sorted(found)])
            print(f"\r{format}: job {number}/{len(jobs)}", end="", flush=True)
        print()
    return torch.tensor(rows, dtype=torch.float64)


def peer_margins(name: str, model: str, threads: int, jobs: Sequence[str], people: Sequence[Candidate]) -> torch.Tensor:
    """[jobs, candidates] fp64, as `margins`, of a contestant of `bench.peers`: a process a job."""
    from bench.peers.__main__ import Worker
    from bench.peers.material import make_material
    from uma_engine.catalog import open_model, resolve
    from uma_engine.catalog.chat_template import ChatTemplate
    from uma_engine.ranking.surface import DEFAULT_PROBE, question_of
    from uma_engine.tasks.base import DEFAULT_LABELS
    from uma_engine.tasks.rank import DEFAULT_INSTRUCTION, RankPrompt, label_ids

    settings = make_material(model, threads, len(people))
    files = open_model(resolve(model))
    encode = files.tokenizer.encode
    question = question_of(DEFAULT_PROBE, DEFAULT_LABELS)
    prompt = RankPrompt.build(files.tokenizer, ChatTemplate(files.chat_template, files.tokenizer), question)
    yes, no = label_ids(files.tokenizer, DEFAULT_LABELS)
    workload = json.loads(Path(settings["workload"]).read_text()) | {
        "suffix": [],
        "yes": yes,
        "no": no,
        "label_words": DEFAULT_LABELS,
    }
    above = prompt.head + encode(DEFAULT_INSTRUCTION) + prompt.after_instruction
    workload["candidates"] = [encode(p.text.strip()) + prompt.after_candidate for p in people]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        settings["workload"] = str(Path(scratch) / "workload.json")
        for number, job in enumerate(jobs, 1):
            workload["prefix"] = above + encode(job.strip()) + prompt.after_job
            Path(settings["workload"]).write_text(json.dumps(workload))
            worker = Worker(*name.split(":"), settings)
            try:
                rows.append(worker.ask(f"rank {len(people)}")["scores"])
            finally:
                worker.stop()
            print(f"\r{name}: job {number}/{len(jobs)}", end="", flush=True)
    print()
    return torch.tensor(rows, dtype=torch.float64)


@torch.inference_mode()
def perplexity(model_name: str, precision: str, threads: int, texts: Sequence[str], context: int = 512) -> float:
    """exp of the mean negative log-probability of each token after the first, in windows of `context` tokens."""
    from uma_engine.catalog import open_model, resolve
    from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
    from uma_engine.models import load_model
    from uma_kernels import dispatch
    from uma_kernels.attention import AttentionBatch

    files = open_model(resolve(model_name))
    total, count = 0.0, 0
    with dispatch.threads(threads):
        model = load_model(files, max_positions=context, precision=precision)
        c = files.config
        empty = [torch.zeros(1, c.num_kv_heads, c.head_dim) for _ in range(c.num_layers)]
        for text in texts:
            ids = files.tokenizer.encode(text)[:context]
            n = len(ids)
            ends = torch.tensor([0, n], dtype=torch.int32)
            batch = BatchInput(
                input_ids=torch.tensor(ids),
                positions=torch.arange(n),
                attention=AttentionBatch(ends, -1 - torch.arange(n, dtype=torch.int32), ends),
                slot_mapping=torch.full((n,), -1, dtype=torch.int32),
                output_rows=torch.arange(n),
            )
            logits = model.logits(model.forward(batch, KVCacheTensors(empty, empty)))
            chosen = torch.log_softmax(logits[:-1].double(), -1).gather(1, torch.tensor(ids[1:])[:, None])
            total -= chosen.sum().item()
            count += n - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precisions", default="near,fast")
    parser.add_argument("--adapter", help="a PEFT directory to rank with")
    parser.add_argument("--peer", help="PEER:VARIANT of bench.peers; `uma:exact` must differ by 0")
    parser.add_argument("--formats", default="", help="bfloat16, fp8 or both: what a GPU rounds")
    parser.add_argument("--jobs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    jobs = [json.loads(line)["text"] for line in POSTINGS.read_text().splitlines()][: args.jobs]
    people = read_candidates(CANDIDATES)
    exact = margins(args.model, "exact", args.threads, jobs, people, args.adapter)
    print(f"{exact.numel()} pairs, standard deviation of the margins within a job {exact.std(1).mean():.4f}")

    def keep(precision: str, row: dict[str, Any]) -> None:
        print(f"{precision}: " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if not args.no_save:
            conditions = {"model": args.model, "precision": precision, "adapter": args.adapter, "pairs": exact.numel()}
            append_row("accuracy", {"bench": "accuracy", **conditions, **row})

    if args.peer:
        from bench.peers.__main__ import CONTESTS

        (label,) = {c.label for c in CONTESTS if f"{c.peer}:{c.variant}" == args.peer} or {args.peer}
        keep(label, compare(exact, peer_margins(args.peer, args.model, args.threads, jobs, people)))
    for name in filter(None, args.formats.split(",")):
        with_names = {"bfloat16": "bfloat16 (GPU)", "fp8": "fp8 (GPU)"}
        keep(with_names[name], compare(exact, format_margins(name, args.model, jobs, people)))
    precisions = [p for p in args.precisions.split(",") if p]
    exact_perplexity = perplexity(args.model, "exact", args.threads, jobs) if precisions else math.nan
    for precision in precisions:
        found = margins(args.model, precision, args.threads, jobs, people, args.adapter)
        ratio = perplexity(args.model, precision, args.threads, jobs) / exact_perplexity
        changed = {"perplexity": round(exact_perplexity, 4), "perplexity_change_pct": round(100 * (ratio - 1), 4)}
        keep(precision, compare(exact, found) | changed)


def compare(exact: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Differences of margins, and what they do to the order: rank correlation and the share of the first ten kept."""
    difference = (found - exact).abs()

    def ranks(scores: torch.Tensor) -> torch.Tensor:
        return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double()

    first, second = ranks(exact), ranks(found)
    n = exact.shape[1]
    spearman = 1 - 6 * (first - second).square().sum(1) / (n * (n * n - 1))
    kept = ((first < 10) & (second < 10)).sum(1).double() / 10
    return {
        "max_difference": round(difference.max().item(), 5),
        "mean_difference": round(difference.mean().item(), 6),
        "spearman_mean": round(spearman.mean().item(), 5),
        "spearman_min": round(spearman.min().item(), 5),
        "first_ten_kept": round(kept.mean().item(), 4),
    }


if __name__ == "__main__":
    main()
