"""How well things rank: two collections, words and vectors beside language models, with paired intervals.

    python -m bench.quality --source DIR [--collection crosswalk] [--split test] [--system base NAME=ADAPTER ...] [--jobs N]

DIR holds esco-onet-crosswalk/ and onet-29.2/ (see `uma data build`). Occupations of O*NET ask, as title and text or as tasks alone, which
read like a post. In `crosswalk` ESCO occupations answer, judged by experts. In `related` the occupations that O*NET relates to the one that
asks answer, graded 3, 2 and 1 by tier (primary short, primary long, supplemental): no adapter was trained on these grades.

BM25, MiniLM and their fusion search all of a collection; language models rank the fusion's best 100, by what they read alone and
(`NAME+prior`) with the log-odds that the first stage gives; `prior` is those log-odds alone. `base` is the model without an adapter. Splits
are those of training: `dev` chose adapters, `test` chose nothing.

Scores of models are kept under build/quality/ as they come, so that a run that was stopped goes on. Rows go to bench/results/quality.jsonl:
nDCG@10 with gain 2^g - 1 by ir-measures, and the mean difference to MiniLM and to the fusion with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import ROOT, append_row, kept_rows
from uma_engine.ranking.metrics import paired_bootstrap
from uma_engine.train.groups import spread
from uma_engine.train.occupations import DEV_MAJORS, TEST_MAJORS, first_stages, read_collection, read_table

Grades = Mapping[str, Mapping[str, int]]  # of each SOC code: grades by document
TIERS = {"Primary-Short": 3, "Primary-Long": 2, "Supplemental": 1}
STATEMENTS = 6  # of a query made of tasks
KEPT = ROOT / "build" / "quality"
POOL = 100
MAJORS = {"dev": DEV_MAJORS, "test": TEST_MAJORS}
MOST_TOKENS = 64  # of a candidate that a model reads
Run = dict[str, list[str]]  # of each query: documents, best first


@dataclass(frozen=True)
class Query:
    id: str  # SOC code / form
    text: str

    @property
    def form(self) -> str:
        return self.id.partition("/")[2]

    @property
    def soc(self) -> str:
        return self.id.partition("/")[0]

    @property
    def major(self) -> str:
        return self.id[:2]


def read_related(source: Path) -> tuple[dict[str, str], list[tuple[str, str]], Grades]:
    """O*NET's related occupations: titles and descriptions by SOC code, (SOC code/form, text) of every query, grades."""
    home = source / "onet-29.2"
    corpus = {
        r["O*NET-SOC Code"]: f"{r['Title']}. {r['Description']}" for r in read_table(home / "Occupation_Data.txt")
    }
    tasks: dict[str, list[str]] = defaultdict(list)
    for row in read_table(home / "Task_Statements.txt"):
        tasks[row["O*NET-SOC Code"]].append(row["Task"])
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    for row in read_table(home / "Related_Occupations.txt"):
        grades[row["O*NET-SOC Code"]][row["Related O*NET-SOC Code"]] = TIERS[row["Relatedness Tier"]]
    queries = [(f"{soc}/title_text", corpus[soc]) for soc in grades]
    queries += [(f"{soc}/tasks", " ".join(tasks[soc][:STATEMENTS])) for soc in grades if len(tasks[soc]) >= STATEMENTS]
    return corpus, queries, grades


def model_run(
    model: str, adapter: str | None, queries: Sequence[Query], pools: Run, corpus: Mapping[str, str], precision: str
) -> dict[str, dict[str, float]]:
    """The margin of everybody in every query's pool, going on where an earlier run stopped."""
    from uma_engine import Candidate, Engine

    with Engine(model, precision=precision, max_lora_rank=64) as engine:
        name = None
        if adapter is not None:
            name = "tuned"
            engine.load_adapter(name, adapter)
        stack = engine.rank("x", ["y"], adapter=name).stack
        key = "\n".join((stack.base_digest, stack.adapter_digest or "", precision, str(MOST_TOKENS)))
        path = KEPT / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
        done: dict[str, dict[str, float]] = {row["id"]: row["scores"] for row in kept_rows(path)}
        missing = [q for q in queries if set(pools[q.id]) - set(done.get(q.id, ()))]
        began = time.perf_counter()
        with path.open("a") as file:
            for number, query in enumerate(missing, 1):
                people = [Candidate(doc, corpus[doc]) for doc in pools[query.id]]
                answer = engine.rank(query.text, people, adapter=name, max_tokens_per_candidate=MOST_TOKENS)
                done[query.id] = {r.id: r.logits[0] - r.logits[1] for r in answer.all_results}
                file.write(json.dumps({"id": query.id, "scores": done[query.id]}) + "\n")
                file.flush()
                if number % 10 == 0 or number == len(missing):
                    left = (time.perf_counter() - began) / number * (len(missing) - number)
                    print(f"  {number}/{len(missing)} jobs, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    return done


def ordered(pools: Run, queries: Sequence[Query], odds: Mapping[str, Mapping[str, float]]) -> Run:
    """Every query's pool by odds, ties in the first stage's order."""
    return {q.id: sorted(pools[q.id], key=lambda doc: (-odds[q.id][doc], pools[q.id].index(doc))) for q in queries}


def ndcg_of(run: Run, qrels: Grades) -> dict[str, float]:
    """nDCG@10 of each query."""
    import ir_measures
    from ir_measures import nDCG

    measure = nDCG(gains={grade: 2**grade - 1 for grade in range(4)}) @ 10  # the tool's own gain is the grade itself
    judged = [ir_measures.Qrel(q, doc, grade) for q in run for doc, grade in qrels[q].items()]
    ranked = [ir_measures.ScoredDoc(q, doc, -float(place)) for q, docs in run.items() for place, doc in enumerate(docs)]
    found = {m.query_id: m.value for m in ir_measures.iter_calc([measure], judged, ranked)}
    return {q: found.get(q, 0.0) for q in run}


def rows_of(
    name: str, values: Mapping[str, float], others: Mapping[str, Mapping[str, float]], queries: Sequence[Query]
) -> Iterator[dict[str, Any]]:
    """One row for each form of a query."""
    for form in sorted({q.form for q in queries}):
        ids = [q.id for q in queries if q.form == form]
        row: dict[str, Any] = {"system": name, "form": form, "queries": len(ids)}
        row["ndcg_10"] = round(sum(values[i] for i in ids) / len(ids), 4)
        for other, theirs in others.items():
            if other != name:
                d = paired_bootstrap([values[i] for i in ids], [theirs[i] for i in ids])
                row[f"over_{other}"] = [round(x, 4) for x in (d.mean, d.low, d.high)]
        majors: dict[str, list[float]] = defaultdict(list)
        for i in ids:
            majors[i[:2]].append(values[i] - others["fused"][i])
        row["worst_major_over_fused"] = round(min(sum(v) / len(v) for v in majors.values()), 4)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--collection", choices=("crosswalk", "related"), default="crosswalk")
    parser.add_argument("--split", choices=MAJORS, nargs="+", default=["test"])
    parser.add_argument("--system", nargs="+", default=["base"], metavar="NAME[=ADAPTER]")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", choices=("exact", "near", "fast"), default="near")
    parser.add_argument("--jobs", type=int, help="so many of each form, spread over the majors")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    corpus, asked, grades = (read_related if args.collection == "related" else read_collection)(args.source)
    majors = frozenset().union(*(MAJORS[s] for s in args.split))
    queries = [Query(i, text) for i, text in asked if i[:2] in majors and grades.get(i.partition("/")[0])]
    if args.jobs:
        forms = sorted({q.form for q in queries})
        queries = [q for form in forms for q in spread([q for q in queries if q.form == form], args.jobs)]
    qrels = {q.id: grades[q.soc] for q in queries}
    stages = first_stages([q.text for q in queries], corpus, lambda line: print(line, file=sys.stderr, flush=True))
    runs: dict[str, Run] = {
        name: {q.id: [doc for doc in docs if doc != q.soc][:POOL] for q, docs in zip(queries, found, strict=True)}
        for name, found in (("bm25", stages.bm25), ("minilm", stages.minilm), ("fused", stages.fused))
    }
    priors = {q.id: odds for q, odds in zip(queries, stages.priors, strict=True)}
    runs["prior"] = ordered(runs["fused"], queries, priors)
    for system in args.system:
        name, _, adapter = system.partition("=")
        print(f"{name}: {len(queries)} jobs of {POOL}", file=sys.stderr, flush=True)
        read = model_run(args.model, adapter or None, queries, runs["fused"], corpus, args.precision)
        runs[name] = ordered(runs["fused"], queries, read)
        both = {q.id: {doc: read[q.id][doc] + priors[q.id][doc] for doc in runs["fused"][q.id]} for q in queries}
        runs[f"{name}+prior"] = ordered(runs["fused"], queries, both)
    values = {name: ndcg_of(run, qrels) for name, run in runs.items()}
    others = {name: values[name] for name in ("minilm", "fused")}
    for name in runs:
        for row in rows_of(name, values[name], others, queries):
            row = {
                "bench": "quality",
                "collection": args.collection,
                "split": "+".join(args.split),
                "model": args.model,
                "precision": args.precision,
                **row,
            }
            print(" ".join(f"{k}={v}" for k, v in row.items() if k != "bench"), flush=True)
            if not args.no_save:
                append_row("quality", row)


if __name__ == "__main__":
    main()
