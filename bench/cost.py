"""What a ranking costs beside how good it is: this engine's way against a model that writes the ranking, and against larger models.

    python -m bench.cost --data DIR [--adapter DIR] [--jobs 200] [--slow-jobs 60] [--candidates 20] [--ways written ...]
                         [--larger qwen2.5-coder-0.5b=40 ...]

DIR holds test.jsonl of `uma data build`; of each job the first stage's best candidates are ranked. FLOPs are those of the linear layers for
the tokens that went through the model: E2R-FLOPs as in Peng et al. 2025 (arXiv 2507.06223), without a model of hardware. The ways:

    first stage   the candidates' priors alone: words and embeddings, whose cost is not in the FLOPs
    shared        each candidate scored under one job whose keys and values are shared: `Engine.rank`, with priors if tuned
    alone         the same scores, a whole prompt for each candidate
    cascade       `rank(..., cascade=)`: who cannot reach the first ten by the prior is not read; bounds fitted on dev jobs
    with notes    `rank(..., deliberate=32)`: the first ten are read again after the model's own notes on each
    first token   list-wise, one token of a window's answer read (FIRST, Reddy et al. 2024): windows of 10 from the end, by 5
    written       the same windows, the order written out, letter by letter
    with reasons  the same, after the model's own paragraph of reasons
    judged        each candidate in a prompt of its own, nothing shared: the model's own paragraph of reasons, then yes or no

Small models that are asked for an order often write none, so each next letter is the most probable of those not yet named: greedy decoding
under a grammar that has each letter once, each read by a scoring call on the cached prompt. List-wise ways get the first stage's order;
`as_given` is the share of jobs that came out in it.

Ways that compute more may answer fewer jobs (`--slow-jobs`), as may a larger model (NAME=JOBS): some of all jobs, spread over them, and a
comparison is on these alone. Every answer is kept under bench/results/cost/ as it comes, so that a run that was stopped goes on. Rows go
to bench/results/cost.jsonl: nDCG@10, FLOPs a query, queries and nDCG a PFLOP, CPU seconds, seconds, and the share of the machine that other
processes had meanwhile. CPU seconds are of the jobs that were answered on a quiet machine, their ratios of jobs where both ways were; the
ways run one after another, not in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, OthersShare, append_row, kept_rows
from uma_engine import Candidate, Engine, SamplingParams
from uma_engine.ranking.metrics import ndcg, paired_bootstrap
from uma_engine.train.groups import Group, read_groups, spread

KEPT = RESULTS / "cost"
MOST_TOKENS = 64  # of a candidate, as in training
WINDOW, STEP = 10, 5
LETTERS = "ABCDEFGHIJ"
WORDS = 40  # of a candidate in a window
REASON_TOKENS, NOTE_TOKENS = 120, 32
QUIET = 0.1  # largest share of the machine that others may have where CPU time counts
LEAST_QUIET = 5  # such jobs at least
# Of the cascade's bounds: chosen by `bench.cascade` on 24 held-out jobs, some of which may be among these.
CONFIDENCE = 0.6
# No letters as an example: a small model repeats them. Of four wordings the best on dev jobs, written.
ASK = (
    "Rank these candidates for the job, the best first.\n\nJob post:\n{job}\n\n{people}\n\n"
    "Answer with the letters of all candidates, the best first, in the form [] > [] > []."
)
WAYS = ("cascade", "alone", "with notes", "first token", "written", "with reasons", "judged")
JUDGE = (
    "Is this candidate a good match for the job?\n\nCandidate:\n{person}\n\nJob post:\n{job}\n\n"
    "First say in a short paragraph what the job asks for and whether the candidate has it, then answer Yes or No."
)
ANSWERS = (" Yes", " No")
REASONS = "First say in a short paragraph what the job asks for and who has it."
ORDER, NEXT = "Order: [", "] > ["  # what the letters stand in

SETTINGS = (MOST_TOKENS, WINDOW, STEP, WORDS, ASK, REASONS, ORDER, NEXT, REASON_TOKENS, NOTE_TOKENS, CONFIDENCE)


@dataclass
class Outcome:
    """One job, one way. CPU seconds are those of all threads."""

    order: list[str]
    flops: float
    seconds: float
    cpu_seconds: float = 0.0
    others_share: float = 0.0


def first(group: Group, count: int) -> Group:
    """The job with its first candidates alone; the others are among those that the first stage missed."""
    missed = (*group.missed, *(c.grade for c in group.candidates[count:]))
    return Group(group.id, group.job, group.candidates[:count], missed)


def people_of(group: Group, tuned: bool) -> list[Candidate]:
    return [Candidate(c.id, c.text, prior=c.prior if tuned else 0.0) for c in group.candidates]


def shared(engine: Engine, group: Group, adapter: str | None, cascade: Any = None, notes: int | None = None) -> Outcome:
    began = time.perf_counter()
    people = people_of(group, tuned=adapter is not None)
    engine._stack.forget_cached()
    answer = engine.rank(
        group.job, people, adapter=adapter, cascade=cascade, top_n=10, max_tokens_per_candidate=MOST_TOKENS,
        deliberate=notes, explain_top=notes and 10,
    )  # fmt: skip
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


# Of a prompt and the number of its people: their places, the best first, and FLOPs.
Judge = Callable[[str, int], tuple[list[int], float]]


def windows(group: Group, judge: Judge) -> Outcome:
    """A list-wise order: windows from the end to the front, each put in the order that `judge` gives of its letters."""
    began = time.perf_counter()
    texts = {c.id: " ".join(c.text.split()[:WORDS]) for c in group.candidates}
    order, flops = by_prior(group).order, 0.0
    start = max(0, len(order) - WINDOW)
    while True:
        part = order[start : start + WINDOW]
        people = "\n".join(f"[{LETTERS[i]}] {texts[name]}" for i, name in enumerate(part))
        found, cost = judge(ASK.format(job=group.job, people=people), len(part))
        flops += cost
        order[start : start + WINDOW] = [part[i] for i in found]
        if start == 0:
            return Outcome(order, flops, time.perf_counter() - began)
        start = max(0, start - STEP)


def first_token(engine: Engine) -> Judge:
    def judge(prompt: str, count: int) -> tuple[list[int], float]:
        engine._stack.forget_cached()
        ids = engine.chat_tokens([{"role": "user", "content": prompt}])
        (score,) = engine.score(ids[:-1], [ids[-1:]], labels=list(LETTERS[:count]))
        return sorted(range(count), key=lambda i: -score.logits[i]), len(ids) * engine.flops_per_token

    return judge


def written(engine: Engine, reasons: bool) -> Judge:
    params = SamplingParams(max_tokens=REASON_TOKENS)

    def judge(prompt: str, count: int) -> tuple[list[int], float]:
        engine._stack.forget_cached()
        asked = f"{prompt}\n{REASONS}" if reasons else prompt
        ids = engine.chat_tokens([{"role": "user", "content": asked}])
        lead = ORDER
        if reasons:
            (done,) = engine.generate([ids], params)
            lead = f"{done.text.strip()}\n\n{ORDER}"
        return in_letters(engine, ids + engine.tokenize(lead), count)

    return judge


def in_letters(engine: Engine, ids: Sequence[int], count: int) -> tuple[list[int], float]:
    """The order that greedy decoding writes after `ids`, each letter once; FLOPs of one pass over all that was read and written."""
    labels, ids = LETTERS[:count], list(ids)
    places: list[int] = []
    while len(places) < count - 1:
        (score,) = engine.score(ids[:-1], [ids[-1:]], labels=list(labels))
        places.append(max((i for i in range(count) if i not in places), key=lambda i: score.logits[i]))
        ids += engine.tokenize(labels[places[-1]]) + engine.tokenize(NEXT)
    places += [i for i in range(count) if i not in places]
    return places, len(ids) * engine.flops_per_token


def judged(engine: Engine, group: Group) -> Outcome:
    """All candidates at once, as a service would ask for them; a judge's prompt begins with its candidate, so no two share a beginning."""
    began = time.perf_counter()
    engine._stack.forget_cached()
    texts = [engine.tokenizer.decode(engine.tokenize(c.text)[:MOST_TOKENS]) for c in group.candidates]
    asked = [JUDGE.format(person=text, job=group.job) for text in texts]
    prompts = [engine.chat_tokens([{"role": "user", "content": text}]) for text in asked]
    written = engine.generate(prompts, SamplingParams(max_tokens=REASON_TOKENS))
    margins, tokens = [], 0
    for prompt, said in zip(prompts, written, strict=True):
        ids = prompt + engine.tokenize(f"{said.text.strip()}\n\nAnswer:")
        (score,) = engine.score(ids[:-1], [ids[-1:]], labels=ANSWERS)
        margins.append(score.logits[0] - score.logits[1])
        tokens += len(ids)
    best = sorted(range(len(margins)), key=lambda i: -margins[i])
    order = [group.candidates[i].id for i in best]
    return Outcome(order, tokens * engine.flops_per_token, time.perf_counter() - began)


@dataclass
class Study:
    """Ways on the same jobs, each compared with the first that has a cost; answers are kept as they come."""

    groups: Sequence[Group]
    save: bool
    ways: Sequence[str] = ()  # these alone; all if there are none
    base: dict[str, tuple[float, Outcome]] = field(default_factory=dict)  # of each job: nDCG and outcome of `shared`

    def run(self, way: str, model: str, stack: str, judge: Callable[[Group], Outcome], jobs: int | None = None) -> None:
        """One way: `stack` names what decides its answers beside the way itself; `jobs`: of so many of the study's."""
        if self.ways and way not in self.ways:
            return
        groups = self.groups if jobs is None else spread(self.groups, jobs)
        settings = (way, stack, *SETTINGS)
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        path = KEPT / f"{re.sub('[^a-z0-9.]+', '-', f'{way} {model}')}-{digest}.jsonl"
        done = {row.pop("job"): row for row in kept_rows(path)}
        missing = [g for g in groups if _key(g) not in done]
        began = time.perf_counter()
        with path.open("a") as file:
            for number, group in enumerate(missing, 1):
                others, used = OthersShare(), time.process_time()
                outcome = judge(group)
                outcome.cpu_seconds = time.process_time() - used
                outcome.others_share = others.read()
                done[_key(group)] = asdict(outcome) | {"order": _places(group, outcome.order)}
                file.write(json.dumps({"job": _key(group), **done[_key(group)]}) + "\n")
                file.flush()
                if number % 10 == 0 or number == len(missing):
                    left = (time.perf_counter() - began) / number * (len(missing) - number)
                    print(f"  {way}, {model}: {number}/{len(missing)}, {left / 60:.0f} min left", file=sys.stderr)
        outcomes = [
            Outcome(**done[_key(g)] | {"order": [g.candidates[i].id for i in done[_key(g)]["order"]]}) for g in groups
        ]
        self._report(way, model, groups, outcomes)

    def _report(self, way: str, model: str, groups: Sequence[Group], outcomes: Sequence[Outcome]) -> None:
        pairs = list(zip(outcomes, groups, strict=True))
        values = [ndcg([{c.id: c.grade for c in g.candidates}[i] for i in o.order], g.ideal) for o, g in pairs]
        flops, seconds = _mean([o.flops for o in outcomes]), _mean([o.seconds for o in outcomes])
        row: dict[str, Any] = {
            "bench": "cost", "way": way, "model": model, "jobs": len(groups), "candidates": len(groups[0].candidates),
            "ndcg_10": round(_mean(values), 4), "gflop_query": round(flops / 1e9, 2),
            "queries_pflop": round(1e15 / flops, 1) if flops else None,
            "ndcg_pflop": round(_mean(values) * 1e15 / flops, 2) if flops else None,
            "seconds_query": round(seconds, 3), "cpu_seconds_query": _quiet_mean(outcomes), "quiet_jobs": sum(map(_quiet, outcomes)),
            "others_share": round(_mean([o.others_share for o in outcomes]), 3),
            "as_given": round(_mean([o.order == by_prior(g).order[: len(o.order)] for o, g in pairs]), 3),
        }  # fmt: skip
        if self.base:
            theirs = [self.base[g.id] for g in groups]
            change = paired_bootstrap(values, [value for value, _ in theirs])
            row |= {"over_shared": [round(x, 4) for x in (change.mean, change.low, change.high)]}
            row |= {"times_the_flops_of_shared": round(flops / _mean([o.flops for _, o in theirs]), 3)}
            both = [(o, other) for o, (_, other) in zip(outcomes, theirs, strict=True) if _quiet(o) and _quiet(other)]
            ours, others = _quiet_mean([o for o, _ in both]), _quiet_mean([other for _, other in both])
            row |= {"times_the_cpu_seconds_of_shared": round(ours / others, 3) if ours and others else None}
        elif flops:
            self.base = {g.id: pair for g, *pair in zip(groups, values, outcomes, strict=True)}
        print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
        if self.save:
            append_row("cost", row)

    def listwise(self, engine: Engine, model: str, jobs: int | None = None) -> None:
        stack = stack_of(engine, None)
        self.run("first token", model, stack, lambda g: windows(g, first_token(engine)), jobs)
        self.run("written", model, stack, lambda g: windows(g, written(engine, False)), jobs)
        self.run("with reasons", model, stack, lambda g: windows(g, written(engine, True)), jobs)
        self.run("judged", model, f"{stack} {JUDGE}", lambda g: judged(engine, g), jobs)


def _key(group: Group) -> str:
    """Of a job with its candidates: what was kept of others of the same name is not taken for theirs."""
    texts = repr((group.job, [(c.text, c.prior) for c in group.candidates]))
    return f"{group.id} {len(group.candidates)} {hashlib.sha256(texts.encode()).hexdigest()[:12]}"


def _places(group: Group, order: Sequence[str]) -> list[int]:
    places = {c.id: i for i, c in enumerate(group.candidates)}
    return [places[name] for name in order]


def _quiet(outcome: Outcome) -> bool:
    return outcome.others_share <= QUIET


def _quiet_mean(outcomes: Sequence[Outcome]) -> float | None:
    """CPU seconds of those that were measured on a quiet machine; None where they are too few."""
    found = [o.cpu_seconds for o in outcomes if _quiet(o)]
    return round(_mean(found), 3) if len(found) >= LEAST_QUIET else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def stack_of(engine: Engine, adapter: str | None) -> str:
    stack = engine.rank("x", ["y"], adapter=adapter).stack
    return f"{stack.base_digest} {stack.adapter_digest or ''}"


def by_prior(group: Group) -> Outcome:
    return Outcome([c.id for c in sorted(group.candidates, key=lambda c: -c.prior)], 0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--larger", nargs="*", default=["qwen2.5-coder-0.5b"], metavar="NAME[=JOBS]")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--slow-jobs", type=int, help="of the ways beside `shared` and `cascade`; all by default")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument(
        "--ways", nargs="+", default=[], choices=WAYS, help="beside the first stage and `shared`; all by default"
    )
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()

    def some(split: str, count: int) -> list[Group]:
        groups = spread(read_groups(args.data / f"{split}.jsonl"), count)
        return [first(g, args.candidates) for g in groups]

    ways = ["first stage", "shared", *args.ways] if args.ways else []
    study = Study(some("test", args.jobs), not args.no_save, ways)
    study.run("first stage", "bm25 + minilm", "", by_prior)
    with Engine(args.model, max_lora_rank=64) as engine:
        name = None
        if args.adapter:
            name = "tuned"
            engine.load_adapter(name, args.adapter)
        tuned, stack = f"{args.model}, tuned" if name else args.model, stack_of(engine, name)
        study.run("shared", tuned, stack, lambda g: shared(engine, g, name))
        if not ways or "cascade" in ways:
            bounds = engine.fit_cascade(
                [(g.job, people_of(g, tuned=True)) for g in some("dev", 12)],
                prefix_tokens=0,
                confidence=CONFIDENCE,
                adapter=name,
                max_tokens_per_candidate=MOST_TOKENS,
            )
            study.run("cascade", tuned, stack, lambda g: shared(engine, g, name, bounds))
        study.run("alone", tuned, stack, lambda g: alone(engine, g, name), args.slow_jobs)
        study.run("with notes", tuned, stack, lambda g: shared(engine, g, name, notes=NOTE_TOKENS), args.slow_jobs)
        study.listwise(engine, args.model, args.slow_jobs)
    for model, _, jobs in (larger.partition("=") for larger in args.larger):
        count = int(jobs) if jobs else None
        with Engine(model) as engine:
            stack = stack_of(engine, None)
            study.run("shared", model, stack, lambda g, e=engine: shared(e, g, None), count)
            study.run("with notes", model, stack, lambda g, e=engine: shared(e, g, None, notes=NOTE_TOKENS), count)
            study.listwise(engine, model, count)


if __name__ == "__main__":
    main()
