"""Two small specialists on people's marks that nobody trained on: which requirements a post states, and which replies people like.

    python -m bench.specialists requirements --source SKILLSPAN_DIR [--adapter NAME|DIR]
    python -m bench.specialists replies --data DIR [--adapter NAME|DIR]

requirements  SkillSpan's test posts, sentence by sentence: F1 of spans that agree to the character, and of the words they cover, beside the
              base without an adapter and a list of all requirements of the training posts looked up in the sentence.
replies       `uma data human` made DIR: for every pair of replies that people mark differently, whether the better one is put first, beside
              BM25, MiniLM and the length of a reply, with and without the planted random replies.

Intervals are of a bootstrap over posts or dialogues. Rows go to bench/results/specialists.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from bench.rows import append_row

ROUNDS = 1000
Span = tuple[int, int]


def interval(units: Mapping[str, Sequence[Any]], value: Callable[[list[Any]], float]) -> list[float]:
    """95 %, drawing whole units (posts, dialogues) with replacement."""
    rng, names = random.Random(0), sorted(units)
    values = sorted(value([x for n in rng.choices(names, k=len(names)) for x in units[n]]) for _ in range(ROUNDS))
    return [round(values[int(q * ROUNDS)], 4) for q in (0.025, 0.975)]


def requirements(args: argparse.Namespace) -> None:
    from uma_engine import Engine, SamplingParams
    from uma_engine.train.groups import spread
    from uma_engine.train.requirements import Sentence, f1, find_spans, question, read_skillspan

    train, test = (read_skillspan(args.source / f"{split}.json") for split in ("train", "test"))
    test = test[: args.sentences]

    def said_by(adapter: str | None, test: Sequence[Sentence]) -> tuple[list[set[Span]], int]:
        with Engine(args.model, precision=args.precision) as engine:
            if adapter is not None:
                engine.load_adapter("specialist", _directory(adapter))
            prompts = [engine.chat_tokens([{"role": "user", "content": question(s.text)}]) for s in test]
            done, lost, found = 0, 0, []
            for begin in range(0, len(prompts), 256):
                part = engine.generate(
                    prompts[begin : begin + 256],
                    SamplingParams(max_tokens=96),
                    adapter=None if adapter is None else "specialist",
                )
                for sentence, completion in zip(test[begin : begin + 256], part, strict=True):
                    spans, missing = find_spans(sentence.text, completion.text.splitlines())
                    found.append(spans)
                    lost += missing
                done += len(part)
                sys.stderr.write(f"  {adapter or 'base'}: {done}/{len(prompts)}\n")
        return found, lost

    known = sorted({r.lower() for s in train for r in s.requirements}, key=len, reverse=True)
    looked_up = re.compile("|".join(rf"(?<!\w){re.escape(r)}(?!\w)" for r in known if len(r) > 1), re.IGNORECASE)
    some = spread(test, args.base_sentences)
    systems: dict[str, Callable[[], tuple[Sequence[Sentence], list[set[Span]], int]]] = {
        "looked up": lambda: (test, [{m.span() for m in looked_up.finditer(s.text)} for s in test], 0),
        "adapter": lambda: (test, *said_by(args.adapter, test)),
        "base": lambda: (some, *said_by(None, some)),
    }
    for name in args.systems:
        asked, found, lost = systems[name]()
        whole = f1(found, asked)
        by_post: dict[str, list[tuple[set[Span], Sentence]]] = defaultdict(list)
        for spans, sentence in zip(found, asked, strict=True):
            by_post[sentence.post].append((spans, sentence))
        keep(args, {
            "kind": "requirements", "system": Path(args.adapter).name if name == "adapter" else name,
            "model": args.model, "sentences": len(asked), "posts": len(by_post),
            "spans": whole.spans,
            "precision_of_spans": round(whole.precision, 4), "recall_of_spans": round(whole.recall, 4), "f1": round(whole.f1, 4),
            "f1_interval": interval(by_post, lambda rows: f1([r[0] for r in rows], [r[1] for r in rows]).f1),
            "words_f1": round(whole.words_f1, 4), "lines_not_in_sentence": lost,
        })  # fmt: skip


def replies(args: argparse.Namespace) -> None:
    from uma_engine import Candidate, Engine
    from uma_engine.retrieval.embedder import Embedder
    from uma_engine.train.groups import Group, read_groups
    from uma_engine.train.human import dialogue_of
    from uma_engine.train.prompts import cut_job

    groups = read_groups(args.data / "test.jsonl")
    recipe = json.loads((_directory(args.adapter) / "recipe.json").read_text())
    sampling = recipe["sampling"]
    asked = {"instruction": recipe["instruction"], "max_tokens_per_candidate": sampling["max_candidate_tokens"]}
    scores: dict[str, list[list[float]]] = defaultdict(list)
    with Engine(args.model, precision=args.precision) as engine, Embedder(cache=False) as embedder:
        engine.load_adapter("specialist", _directory(args.adapter))
        surface = {
            "name": "reply",
            "reads": [{"name": "reply", "probe": recipe["probe"], "labels": recipe["labels"], "weight": 1}],
        }
        for number, group in enumerate(groups, 1):
            job = cut_job(engine.tokenizer, group.job, sampling["max_job_tokens"])
            people = [Candidate(c.id, c.text) for c in group.candidates]
            for name, adapter in (("base", None), (Path(args.adapter).name, "specialist")):
                answer = engine.rank(job, people, adapter=adapter, surface=surface, **asked)
                scores[name].append([r.score for r in answer.all_results])
            vectors = embedder.embed([group.job, *(c.text for c in group.candidates)]).vectors
            scores["MiniLM"].append([float(v @ vectors[0]) for v in vectors[1:]])
            scores["BM25"].append(words(group.job, [c.text for c in group.candidates]))
            scores["length"].append([float(len(c.text)) for c in group.candidates])
            if number % 20 == 0:
                sys.stderr.write(f"  {number}/{len(groups)}\n")

    def pairs(name: str, without: str = "") -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for group, values in zip(groups, scores[name], strict=True):
            found[dialogue_of(group.id)] += agreed(group, values, without)
        return found

    def agreed(group: Group, values: Sequence[float], without: str) -> Iterable[float]:
        judged = [(c, v) for c, v in zip(group.candidates, values, strict=True) if c.id != without]
        for (a, x), (b, y) in combinations(judged, 2):
            if a.grade != b.grade:
                yield 0.5 if x == y else float((x > y) == (a.grade > b.grade))

    for name in scores:
        row: dict[str, Any] = {"kind": "replies", "system": name, "model": args.model, "conversations": len(groups)}
        for label, without in (("all", ""), ("without_planted", "random")):
            found = pairs(name, without)
            every = [x for part in found.values() for x in part]
            row[label] = {
                "pairs": len(every), "dialogues": len(found), "right": round(sum(every) / len(every), 4),
                "interval": interval(found, lambda rows: sum(rows) / len(rows)),
            }  # fmt: skip
        keep(args, row)


def words(query: str, texts: Sequence[str]) -> list[float]:
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    return [float(s) for s in index.get_scores(bm25s.tokenize(query, return_ids=False, show_progress=False)[0])]


def _directory(adapter: str) -> Path:
    from uma_engine.adapters.shipped import names, shipped

    return shipped(adapter) if adapter in names() and not Path(adapter).exists() else Path(adapter)


def keep(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if not args.no_save:
        append_row("specialists", {"bench": "specialists", **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    first, second = kinds.add_parser("requirements"), kinds.add_parser("replies")
    first.add_argument("--source", type=Path, required=True, help="SkillSpan's directory")
    first.add_argument("--sentences", type=int, help="of the test posts (default: all)")
    first.add_argument("--base-sentences", type=int, default=600, help="that the bare base is asked, which says much")
    first.add_argument("--adapter", default="requirement-extract")
    first.add_argument(
        "--systems", nargs="+", choices=("looked up", "adapter", "base"), default=["looked up", "adapter", "base"]
    )
    second.add_argument("--data", type=Path, required=True, help="made by `uma data human`")
    second.add_argument("--adapter", default="reply-quality")
    for sub in (first, second):
        sub.add_argument("--model", default="smollm2-135m")
        sub.add_argument("--precision", default="near")
        sub.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    {"requirements": requirements, "replies": replies}[args.kind](args)


if __name__ == "__main__":
    main()
