"""What sharing a job's prefix is worth in training: one step, forwards and backwards, against the candidates as rows of a batch.

    python -m bench.training [--model smollm2-135m] [--job-tokens 200] [--candidate-tokens 64] [--candidates 16] [--rounds 5]

Both ways on the same LoRA model and the same token ids, in turns: `uma_tree`, a job and its candidates in one row, and transformers' own
`sdpa` on a batch of whole rows, the job in each. Rows are of one length, so the batch needs no padding. Both give the label logits of the
last tokens; the largest difference of logits and of gradients (relative to the largest gradient) is in the row. Goal: 2x. Rows go to
bench/results/training.jsonl.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable
from typing import Any

from bench.rows import OthersShare, append_row, quantiles

LABELS = (5, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--job-tokens", type=int, default=200)
    parser.add_argument("--candidate-tokens", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    from uma_engine.catalog import open_model, resolve
    from uma_engine.train.base_model import add_lora, transformers_model
    from uma_engine.train.recipe import LoRA
    from uma_engine.train.tree_forward import ATTENTION, JobTree, label_logits, register_attention

    register_attention()
    files = open_model(resolve(args.model))
    rng = random.Random(1)
    prefix = [rng.randrange(1000) for _ in range(args.job_tokens)]
    candidates = [[rng.randrange(1000) for _ in range(args.candidate_tokens)] for _ in range(args.candidates)]

    def model_of(attention: str) -> Any:
        model = add_lora(
            transformers_model(files, AutoModelForCausalLM, attention=attention), LoRA(rank=args.rank), seed=3
        )
        with torch.no_grad():  # a fresh adapter's second factor is zero: no gradient would reach the first
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
        return model

    tree, plain = model_of(ATTENTION), model_of("sdpa")
    rows = torch.tensor([prefix + c for c in candidates])

    def shared() -> Any:
        return label_logits(tree, JobTree(prefix, candidates), LABELS)

    def apart() -> Any:
        causal = plain.get_base_model()
        hidden = causal.model(input_ids=rows, use_cache=False).last_hidden_state[:, -1]
        return hidden @ causal.lm_head.weight[list(LABELS)].T

    ways: dict[str, tuple[Any, Callable[[], Any]]] = {"shared": (tree, shared), "apart": (plain, apart)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    logits: dict[str, Any] = {}
    others = OthersShare()
    for round_ in range(args.rounds + 1):
        for name, (model, forward) in ways.items():
            model.zero_grad()
            began, used = time.perf_counter(), time.process_time()
            margins = forward()
            torch.linspace(-1, 1, margins.numel()).reshape(margins.shape).mul(margins).sum().backward()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
            logits[name] = margins.detach()
    pairs = [(p.grad, q.grad) for p, q in zip(tree.parameters(), plain.parameters(), strict=True) if p.grad is not None]
    largest = max(float(q.abs().max()) for _, q in pairs)
    row = {
        "bench": "training", "model": args.model, "rank": args.rank, "job_tokens": args.job_tokens,
        "candidate_tokens": args.candidate_tokens, "candidates": args.candidates, "rounds": args.rounds,
        **{f"{name}_s": [round(x, 3) for x in quantiles(found)] for name, found in seconds.items()},
        **{f"{name}_cpu_s": round(quantiles(found)[1], 3) for name, found in cpu.items()},
        "times_as_fast": [round(x, 3) for x in quantiles([b / a for a, b in zip(seconds["shared"], seconds["apart"], strict=True)])],
        "times_the_cpu": round(quantiles(cpu["apart"])[1] / quantiles(cpu["shared"])[1], 3),
        "logits_differ": float((logits["shared"] - logits["apart"]).abs().max()),
        "gradients_differ": max(float((p - q).abs().max()) for p, q in pairs) / largest,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "others_share": round(others.read(), 3),
    }  # fmt: skip
    print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
    if not args.no_save:
        append_row("training", row)


if __name__ == "__main__":
    main()
