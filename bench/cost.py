"""What a ranking costs beside how good it is: this engine's way against a model that writes the ranking, and against larger models.

    python -m bench.cost --data DIR [--adapter DIR] [--jobs 24] [--candidates 20] [--larger qwen2.5-coder-0.5b ...]

DIR holds test.jsonl of `uma data build`; of each job the first stage's best candidates are ranked. FLOPs are those of the linear layers for
the tokens that went through the model: E2R-FLOPs as in Peng et al. 2025 (arXiv 2507.06223), without a model of hardware. The ways:

    first stage   the candidates' priors alone: words and embeddings, whose cost is not in the FLOPs
    shared        each candidate scored under one job whose keys and values are shared: `Engine.rank`, with priors if tuned
    alone         the same scores, a whole prompt for each candidate
    cascade       `rank(..., cascade=)`: who cannot reach the first ten by the prior is not read; bounds fitted on dev jobs
    first token   list-wise, one token of a window's answer read (FIRST, Reddy et al. 2024): windows of 10 from the end, by 5
    written       the same windows, the order written out
    with reasons  the same, after a paragraph of reasons

Rows go to bench/results/cost.jsonl: nDCG@10, FLOPs a query, queries and nDCG a PFLOP, seconds, and the factor over
`written` of the same model.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import append_row
from uma_engine import Candidate, Engine, SamplingParams
from uma_engine.ranking.metrics import ndcg, paired_bootstrap
from uma_engine.train.groups import Group, read_groups

MOST_TOKENS = 64  # of a candidate, as in training
WINDOW, STEP = 10, 5
LETTERS = "ABCDEFGHIJ"
WORDS = 40  # of a candidate in a window
ORDER_TOKENS, REASON_TOKENS = 40, 120
ASK = (
    "Rank these candidates for the job, the best first.\n\nJob post:\n{job}\n\n{people}\n\n"
    "Answer with the letters of all candidates in order, such as B > A > C."
)
REASONS = "First say in a short paragraph what the job asks for and who has it."


@dataclass
class Outcome:
    """One job, one way."""

    order: list[str]
    flops: float
    seconds: float


def people_of(group: Group, tuned: bool) -> list[Candidate]:
    return [Candidate(c.id, c.text, prior=c.prior if tuned else 0.0) for c in group.candidates]


def shared(engine: Engine, group: Group, adapter: str | None, cascade: Any = None) -> Outcome:
    began = time.perf_counter()
    people = people_of(group, tuned=adapter is not None)
    engine._stack.forget_cached()
    answer = engine.rank(
        group.job, people, adapter=adapter, cascade=cascade, top_n=10, max_tokens_per_candidate=MOST_TOKENS
    )
    return Outcome([r.id for r in answer.results], answer.usage.flops, time.perf_counter() - began)


def alone(engine: Engine, group: Group, adapter: str | None) -> Outcome:
    people = people_of(group, tuned=adapter is not None)
    began = time.perf_counter()
    scores, flops = {}, 0.0
    for person in people:
        engine._stack.forget_cached()
        answer = engine.rank(group.job, [person], adapter=adapter, max_tokens_per_candidate=MOST_TOKENS)
        scores[person.id] = answer.results[0].score
        flops += answer.usage.flops
    places = {p.id: i for i, p in enumerate(people)}
    return Outcome(sorted(scores, key=lambda i: (-scores[i], places[i])), flops, time.perf_counter() - began)


def windows(group: Group, judge: Callable[[str], tuple[list[int], float]]) -> Outcome:
    """A list-wise order: windows from the end to the front, each put in the order that `judge` gives of its letters."""
    began = time.perf_counter()
    texts = {c.id: " ".join(c.text.split()[:WORDS]) for c in group.candidates}
    order, flops = [c.id for c in group.candidates], 0.0
    start = max(0, len(order) - WINDOW)
    while True:
        part = order[start : start + WINDOW]
        people = "\n".join(f"[{LETTERS[i]}] {texts[name]}" for i, name in enumerate(part))
        found, cost = judge(ASK.format(job=group.job, people=people))
        flops += cost
        places = list(dict.fromkeys(i for i in found if i < len(part)))
        order[start : start + WINDOW] = [part[i] for i in (*places, *(i for i in range(len(part)) if i not in places))]
        if start == 0:
            return Outcome(order, flops, time.perf_counter() - began)
        start = max(0, start - STEP)


def first_token(engine: Engine) -> Callable[[str], tuple[list[int], float]]:
    def judge(prompt: str) -> tuple[list[int], float]:
        ids = engine.chat_tokens([{"role": "user", "content": prompt}])
        engine._stack.forget_cached()
        (score,) = engine.score(ids[:-1], [ids[-1:]], labels=list(LETTERS))
        return sorted(range(len(LETTERS)), key=lambda i: -score.logits[i]), len(ids) * engine.flops_per_token

    return judge


def written(engine: Engine, reasons: bool) -> Callable[[str], tuple[list[int], float]]:
    params = SamplingParams(max_tokens=ORDER_TOKENS + (REASON_TOKENS if reasons else 0))

    def judge(prompt: str) -> tuple[list[int], float]:
        engine._stack.forget_cached()
        (done,) = engine.generate(f"{prompt}\n{REASONS}" if reasons else prompt, params, chat=True)
        letters = re.findall(r"\b([A-J])\b(?=\s*(?:>|$|\n))", done.text)
        return [LETTERS.index(letter) for letter in letters], done.usage.flops

    return judge


def report(
    name: str, model: str, outcomes: Sequence[Outcome], groups: Sequence[Group], base: dict[str, Any], save: bool
) -> None:
    values = [
        ndcg([{c.id: c.grade for c in g.candidates}[i] for i in o.order], g.ideal)
        for o, g in zip(outcomes, groups, strict=True)
    ]
    flops = sum(o.flops for o in outcomes) / len(outcomes)
    mean = sum(values) / len(values)
    row: dict[str, Any] = {
        "bench": "cost", "way": name, "model": model, "jobs": len(groups), "candidates": len(groups[0].candidates),
        "ndcg_10": round(mean, 4), "gflop_query": round(flops / 1e9, 2), "queries_pflop": round(1e15 / flops, 1) if flops else None,
        "ndcg_pflop": round(mean * 1e15 / flops, 2) if flops else None,
        "seconds_query": round(sum(o.seconds for o in outcomes) / len(outcomes), 3),
    }  # fmt: skip
    if base:
        change = paired_bootstrap(values, base["values"])
        row |= {"over_shared": [round(x, 4) for x in (change.mean, change.low, change.high)]}
        row |= {"times_the_flops_of_shared": round(flops / base["flops"], 3)}
        row |= {"times_the_seconds_of_shared": round(row["seconds_query"] / base["seconds"], 3)}
    elif flops:
        base |= {"values": values, "flops": flops, "seconds": row["seconds_query"]}
    print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
    if save:
        append_row("cost", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--larger", nargs="*", default=["qwen2.5-coder-0.5b"])
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()

    def some(split: str, count: int) -> list[Group]:
        groups = read_groups(args.data / f"{split}.jsonl")
        chosen = [groups[i * len(groups) // count] for i in range(count)]
        return [Group(g.id, g.job, g.candidates[: args.candidates], g.missed) for g in chosen]

    groups, fit = some("test", args.jobs), some("dev", 12)
    base: dict[str, Any] = {}

    def told(way: str, model: str, outcomes: list[Outcome]) -> None:
        report(way, model, outcomes, groups, base, not args.no_save)

    told("first stage", "bm25 + minilm", [by_prior(g) for g in groups])
    with Engine(args.model, max_lora_rank=64) as engine:
        name = None
        if args.adapter:
            name = "tuned"
            engine.load_adapter(name, args.adapter)
        tuned = f"{args.model}, tuned" if name else args.model
        told("shared", tuned, [shared(engine, g, name) for g in groups])
        told("alone", tuned, [alone(engine, g, name) for g in groups])
        jobs = [(g.job, people_of(g, tuned=True)) for g in fit]
        bounds = engine.fit_cascade(
            jobs, prefix_tokens=0, confidence=0.8, adapter=name, max_tokens_per_candidate=MOST_TOKENS
        )
        told("cascade", tuned, [shared(engine, g, name, bounds) for g in groups])
        listwise(engine, args.model, groups, told)
    for model in args.larger:
        with Engine(model) as engine:
            told("shared", model, [shared(engine, g, None) for g in groups])
            listwise(engine, model, groups, told)


def by_prior(group: Group) -> Outcome:
    return Outcome([c.id for c in sorted(group.candidates, key=lambda c: -c.prior)], 0.0, 0.0)


def listwise(
    engine: Engine, model: str, groups: Sequence[Group], told: Callable[[str, str, list[Outcome]], None]
) -> None:
    told("first token", model, [windows(g, first_token(engine)) for g in groups])
    told("written", model, [windows(g, written(engine, False)) for g in groups])
    told("with reasons", model, [windows(g, written(engine, True)) for g in groups])


if __name__ == "__main__":
    main()
