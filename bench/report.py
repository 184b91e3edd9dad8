"""Tables and pictures of `docs/` from the rows in `bench/results/`: `python -m bench.report`.

Knows rows and documents; measures nothing. Of each comparison the newest row counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.ceiling import KINDS
from bench.charts import Bar, bar_chart
from bench.cost_page import cost_page
from bench.gpu import report as gpu
from bench.rows import RESULTS, ROOT
from bench.tables import Row, interval, newest, source, table

DOCS = ROOT / "docs"
TASKS = {
    "rank": "Ranking {candidates} candidates of 160 tokens under one job of 300",
    "rank_lora": "The same with four adapters mixed",
    "prefill": "Prefill of 16 sequences of 450 tokens",
    "decode_1": "Decoding one sequence, 64 steps after a prompt of 64",
    "decode_16": "Decoding 16 sequences, 64 steps after prompts of 64",
}


def read_rows(area: str) -> list[Row]:
    path = RESULTS / f"{area}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def peers_section(rows: Sequence[Row]) -> str:
    parts = []
    for model, backend in dict.fromkeys((row["model"], _backend(row)) for row in rows):
        for task, title in TASKS.items():
            of = [r for r in rows if r["task"] == task and (r["model"], _backend(r)) == (model, backend)]
            if not of:
                continue
            chosen = newest(of, lambda r: r["peer"])
            name = f"peers-{model}-{backend}-{task.replace('_', '-')}.svg"
            heading = f"{title.format(**chosen[0])}, {model}, a machine with {backend.removeprefix('cpp-').upper()}"
            versions = "; ".join(dict.fromkeys(r["peer_version"] for r in chosen))
            caption = [f"{source(chosen)} {chosen[0]['version']}.", f"Peers: {versions}."]
            (DOCS / name).write_text(bar_chart(heading, chosen[0]["unit"], _bars(chosen), caption))
            parts.append(
                f"### {heading}\n\n![{heading}]({name})\n\n{_peers_table(chosen)}\n\n{source(chosen)} {versions}.\n"
            )
    return "\n".join(parts)


def _backend(row: Row) -> str:
    """Such as cpp-avx2: machines with other instructions are other races."""
    return str(row["version"].split()[-1])


def _bars(rows: Sequence[Row]) -> list[Bar]:
    ours = {f"Uma Engine, {row['precision']}": row["value"] for row in rows}
    bars = [Bar(label, value, "", True) for label, value in ours.items()]
    for row in rows:
        error = row["peer_max_score_error"]
        bars.append(Bar(row["peer"], row["peer_value"], "" if error is None else f"score error {error:.3f}", False))
    return bars


def _peers_table(rows: Sequence[Row]) -> str:
    def error(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    body = [
        (
            row["peer"],
            f"{row['peer_value']:.2f}",
            f"{row['value']:.2f} (`{row['precision']}`)",
            f"{row['pct_peak']:.0f} % of {row['peak']} {row['ceilings'][row['peak']]:.0f}"
            if row.get("pct_peak")
            else "",
            f"{row['ratio']:.2f} ({row['ratio_p20']:.2f}..{row['ratio_p80']:.2f})"
            + ("" if row["ratio"] >= 1 else ", the peer is ahead"),
            f"{error(row['peer_max_score_error'])} / {error(row['max_score_error'])}",
            f"{row['peer_peak_rss_mib']} / {row['peak_rss_mib']}",
        )
        for row in rows
    ]
    unit = rows[0]["unit"]
    header = (
        "peer",
        f"its {unit}",
        f"ours, {unit}",
        "linear layers of ours, share of the ceiling (GOP/s)",
        "ours over its, turn by turn",
        "largest score error, its / ours",
        "peak MiB, its / ours",
    )
    return table(header, body)


def accuracy_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: (r["model"], r["precision"], r["adapter"]))
    body = [
        (
            row["model"], row["precision"] if " " in row["precision"] else f"`{row['precision']}`",
            row["pairs"], f"{row['max_difference']:.4f}", f"{row['mean_difference']:.5f}",
            f"{row['spearman_mean']:.4f}", f"{row['first_ten_kept']:.3f}",
            f"{row['perplexity_change_pct']:+.3f} %" if "perplexity_change_pct" in row else "",
        )
        for row in chosen
    ]  # fmt: skip
    header = (
        "model",
        "precision, or peer",
        "pairs",
        "largest difference",
        "mean",
        "rank correlation",
        "first ten kept",
        "perplexity",
    )
    return f"{table(header, body)}\n\nMargins of label logits against `exact` (fp32 activations, same weights). {source(chosen)}\n"


def ceilings_section(rows: Sequence[Row]) -> str:
    row = newest(rows, lambda r: r["device"])[-1]
    kinds = [name.removesuffix("_1") for name in row if name.endswith("_1")]
    body = [(KINDS[kind], row[f"{kind}_1"], row[f"{kind}_{row['threads']}"]) for kind in kinds if row[f"{kind}_1"]]
    return f"{table(('what', '1 thread', '{} threads'.format(row['threads'])), body)}\n\n{source([row])}\n"


def ops_section(rows: Sequence[Row]) -> str:
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = newest(
            [r for r in rows if r["op"] == op], lambda r: (r["case"], r["dtype"], r.get("threads"), r.get("peer"))
        )
        body = [
            (
                row["case"] + (f" (adds {row['tax']:.1%} to the products)" if "tax" in row else ""), row["dtype"],
                row.get("threads", ""), f"{row['p50_ms']:.3f}", f"{row['gflop_s']:.0f}",
                f"{row['pct_peak']:.0f} % of {row['peak']}" if "peak" in row else "", f"{row.get('pct_read', 0):.0f} %",
                f"{row['ratio']:.2f} x {row['peer']}",
            )
            for row in chosen
        ]  # fmt: skip
        header = ("case", "type", "threads", "ms", "GFLOP/s", "of its ceiling", "of read bandwidth", "against")
        parts.append(f"### {op}\n\n{table(header, body)}\n\n{source(chosen)}\n")
    return "\n".join(parts)


def threads_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: r["case"])
    body = [
        (r["case"], f"{r['ratio']:.2f} ({r['ratio_p20']:.2f}..{r['ratio_p80']:.2f})", f"{r['machine_ratio']:.2f}")
        for r in chosen
    ]
    return f"{table(('case', 'all threads over one', 'the machine itself'), body)}\n\n{source(chosen)}\n"


def growth_section(rows: Sequence[Row]) -> str:
    parts = []
    for row in newest(rows, lambda r: r["case"]):
        if "seconds" in row:
            body = [(n, f"{t:.2f}", f"{1e3 * t / int(n):.2f}") for n, t in row["seconds"].items()]
            parts.append(f"{row['case']}:\n\n{table(('candidates', 'seconds', 'ms each'), body)}\n")
        else:
            parts.append(
                f"{row['case']}: short ones {row['short_s']:.2f} s, the long one alone {row['long_alone_s']:.2f} s,"
                f" together {row['together_s']:.2f} s.\n"
            )
    return "\n".join(parts)


def quality_section(rows: Sequence[Row]) -> str:
    parts = []
    rows = [{"collection": "crosswalk"} | dict(row) for row in rows]
    for part in dict.fromkeys((row["collection"], row["split"]) for row in rows):
        chosen = newest(
            [r for r in rows if (r["collection"], r["split"]) == part],
            lambda r: (r["form"], r["queries"], r["system"], *((r["model"], r["precision"]) if of_model(r) else ())),
        )
        body = [
            (
                r["form"], r["system"], r["model"] if of_model(r) else "", r["precision"] if of_model(r) else "", r["queries"],
                f"{r['ndcg_10']:.4f}", interval(r.get("over_minilm")), interval(r.get("over_fused")),
                f"{r['worst_major_over_fused']:+.3f}",
            )
            for r in chosen
        ]  # fmt: skip
        header = (
            "query", "system", "model", "precision", "queries", "nDCG@10", "over MiniLM", "over the fusion",
            "worst major group over the fusion",
        )  # fmt: skip
        parts.append(f"### {part[0]}, {part[1]}\n\n{table(header, body)}\n\n{source(chosen)}\n")
    return "\n".join(parts)


def of_model(row: Row) -> bool:
    """Whether a row of `quality` is of a language model, not of the first stage."""
    return row["system"] not in ("bm25", "minilm", "fused", "prior")


def cascade_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: (r["model"], r["tuned"], r["precision"], r["prefix_tokens"], r["confidence"]))
    body = [
        (
            r["prefix_tokens"], r["confidence"], f"{r['times']:.2f} ({r['times_p20']:.2f}..{r['times_p80']:.2f})",
            f"{r['tokens_ratio']:.2f}", f"{r['whole_share']:.0%}", f"{r['ndcg']:.4f}", interval(r["ndcg_change"]), r["jobs"],
        )
        for r in chosen
    ]  # fmt: skip
    header = (
        "tokens read cheaply",
        "confidence",
        "times as fast",
        "fewer tokens",
        "read to the end",
        "nDCG@10 of all",
        "change",
        "jobs",
    )
    return f"{table(header, body)}\n\n{source(chosen)}\n"


def index_section(rows: Sequence[Row]) -> str:
    grown = newest([r for r in rows if r["kind"] == "indexing"], lambda r: r["candidates"])
    asked = newest([r for r in rows if r["kind"] == "search"], lambda r: (r["case"], r["candidates"]))
    said = [
        f"Indexing {r['candidates']:,} people of {r['words']} words: {r['candidates_s']:.0f} a second, {r['of_embedder']:.2f}"
        f" ({r['of_embedder_p20']:.2f} to {r['of_embedder_p80']:.2f}) of the embedder alone."
        for r in grown
    ]
    body = [
        (
            r["case"], f"{r['candidates']:,}", f"{r['considered']:,}", f"{r['ms']:.0f} ({r['ms_p20']:.0f}..{r['ms_p80']:.0f})",
            f"{r['ms_most']:.0f}", r["queries"], f"{r['index_mib']:,}", f"{r['peak_rss_mib']:,}",
        )
        for r in asked
    ]  # fmt: skip
    header = (
        "filter", "candidates", "that pass", "ms a query", "slowest", "queries", "MiB on disk", "MiB of process at most, building",
    )  # fmt: skip
    return f"{'  '.join(said)}\n\n{table(header, body)}\n\n{source([*grown, *asked])}\n"


def explain_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: (r["case"], r["model"]))
    body = [
        (r["case"], f"{r['ratio_tokens']:.2f}", f"{r['cpu_ratio'][1]:.2f}", f"{r['wall_ratio'][1]:.2f}") for r in chosen
    ]
    header = ("what, for how many of how many", "tokens over scores alone", "CPU time", "clock")
    return f"{table(header, body)}\n\n{source(chosen)}\n"


def serve_section(rows: Sequence[Row]) -> str:
    parts = []
    load = newest([r for r in rows if r["kind"] == "load"], lambda r: (r["model"], r["share"], r["burst"]))
    if load:
        body = [
            (
                f"{r['share']:.0%}", r["burst"], r["requests"], r["failed"], f"{r['first']['p50_ms']:.0f} / {r['first']['p99_ms']:.0f}",
                f"{r['whole']['p50_ms']:.0f} / {r['whole']['p95_ms']:.0f} / {r['whole']['p99_ms']:.0f}", f"{r['within_objective']:.0%}",
            )
            for r in load
        ]  # fmt: skip
        header = (
            "load of capacity",
            "at once",
            "requests",
            "failed",
            "first event, ms p50 / p99",
            "answer, ms p50 / p95 / p99",
            "within the objective",
        )
        parts.append(f"Open loop, mixed sizes, {load[0]['model']}:\n\n{table(header, body)}\n")
    for r in newest([r for r in rows if r["kind"] == "front"], lambda r: r["request"]):
        parts.append(f"A front end adds {r['adds_ms']:.2f} ms at the median ({r['request']}, {r['rounds']} turns).\n")
    batching = [r for r in rows if r["kind"] == "batching" and "mix" in r]
    for r in newest(batching, lambda r: (r["mix"], r["precision"])):
        static = ", ".join(
            f"{b['times'][1]:.2f}x batches of {b['batch']} (which compute {b['tokens_computed_times']:.1f} times the tokens)"
            for b in r["static"]
        )
        parts.append(
            f"Continuous over static batching, lengths {r['mix']}: {static}; {r['prompts']} completions of {r['mean_length']} tokens on"
            f" average, {r['longest']} at most, `{r['precision']}`, {r['rounds']} turns.\n"
        )
    for r in newest([r for r in rows if r["kind"] == "priority"], lambda r: r["model"]):
        shown = ", ".join(
            f"{name.replace('_', ' ')} {r[name]['p50_ms']:.0f} / {r[name]['p99_ms']:.0f}"
            for name in ("alone", "beside_batch", "beside_interactive")
        )
        parts.append(
            f"Interactive requests at {r['asked_share']:.0%} of the capacity, ms p50 / p99, beside four clients who always have a"
            f" ranking of 64 candidates under way ({r['model']}): {shown}.\n"
        )
    swaps = [r for r in rows if r["kind"] == "swaps" and "added" in r]
    for r in newest(swaps, lambda r: (str(r["models"]), r["own_rate"])):
        whose = "base that answers" if r["own_rate"] else "slowest"
        parts.append(
            f"{r['swaps']} swaps of {', '.join(r['models'])} under load ({r['share']:.0%} of what the {whose} can carry):"
            f" {r['requests']} requests, {r['failed']} failed, {r['of_another_base']} of {r['checked']} recomputed answers were of another"
            f" base; a swap takes {r['swap_s_p50']:.1f} s. `Added`: what a request took more than the same one at the same time while"
            " nobody swapped.\n"
        )

        def spread(found: Mapping[str, float]) -> str:
            return " / ".join(f"{found[f'p{q}_ms']:.0f}" for q in (50, 95, 99))

        body = [
            (
                base, f"{b['asked_per_s']:.2f}", b["requests"], spread(b["quiet"]), spread(b["during"]), f"{b['adds_p99_ms']:+.0f}",
                spread(b["added"]),
            )
            for base, b in r["by_base"].items()
        ]  # fmt: skip
        header = (
            "base that answers", "asked a second", "requests", "nobody swaps, ms p50 / p95 / p99", "while the next is prepared", "p99, ms",
            "added, ms p50 / p95 / p99",
        )  # fmt: skip
        parts.append(f"{table(header, body)}\n")
    return "\n".join(parts) + f"\n{source(rows)}\n"


def specialists_section(rows: Sequence[Row]) -> str:
    parts = []
    wanted = newest([r for r in rows if r["kind"] == "requirements"], lambda r: r["system"])
    if wanted:
        body = [
            (
                r["system"], r["sentences"], r["spans"], f"{r['f1']:.3f}", "{:.3f} to {:.3f}".format(*r["f1_interval"]),
                f"{r['precision_of_spans']:.3f}",
                f"{r['recall_of_spans']:.3f}", f"{r['words_f1']:.3f}", r["lines_not_in_sentence"],
            )
            for r in wanted
        ]  # fmt: skip
        header = (
            "system",
            "sentences",
            "spans",
            "F1 of spans",
            "95 %, over posts",
            "precision",
            "recall",
            "F1 of words",
            "lines that stand nowhere",
        )
        parts.append(
            f"Which requirements a sentence of a post states: SkillSpan's test posts, spans that agree to the"
            f" character. The bare base says much, so it was asked some of the sentences:\n\n{table(header, body)}\n"
        )
    liked = newest([r for r in rows if r["kind"] == "replies"], lambda r: r["system"])
    if liked:
        body = [
            (
                r["system"], *("{:.3f} ({:.3f} to {:.3f})".format(r[k]["right"], *r[k]["interval"]) for k in ("all", "without_planted"))
            )
            for r in liked
        ]  # fmt: skip
        pairs = liked[0]["all"]["pairs"], liked[0]["without_planted"]["pairs"]
        header = ("system", f"all {pairs[0]} pairs", f"without planted replies, {pairs[1]} pairs")
        parts.append(
            f"Of two replies that people marked differently, how often the better one comes first: {liked[0]['conversations']} held-out"
            f" conversations of UPHELD, 95 % over {liked[0]['all']['dialogues']} dialogues; chance is 0.5:\n\n{table(header, body)}\n"
        )
    return "\n".join(parts) + f"\n{source(rows)}\n"


def adapters_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: (r["model"], r["adapters"], r["slots"], r["rank"]))
    body = [
        (
            r["adapters"], r["slots"], r["known"], f"{r['ratio']:.2f}", f"{r['miss_share']:.0%}",
            f"{r['miss_p50_ms']:.1f} / {r['miss_p99_ms']:.1f}",
        )
        for r in chosen
    ]  # fmt: skip
    header = (
        "adapters asked for",
        "slots",
        "known",
        "time over all resident, median",
        "misses",
        "a miss, ms p50 / p99",
    )
    return f"{table(header, body)}\n\n{source(chosen)}\n"


def reliability_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: r["case"])
    about = {"bench", "case", "device", "versions", "commit", "time", "command"}
    body = [
        (r["case"], ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in r.items() if key not in about))
        for r in chosen
    ]
    return (
        "The long form of `make reliability`, on a tiny model: every answer is held against the truth.\n\n"
        f"{table(('case', 'what was done and found'), body)}\n\n{source(chosen)}\n"
    )


def training_section(rows: Sequence[Row]) -> str:
    chosen = newest(rows, lambda r: (r["model"], r["job_tokens"], r["candidate_tokens"], r["candidates"]))
    body = [
        (
            r["model"], r["job_tokens"], f"{r['candidates']} x {r['candidate_tokens']}",
            f"{r['shared_s'][1]:.2f}", f"{r['apart_s'][1]:.2f}",
            "{1:.2f} ({0:.2f}..{2:.2f})".format(*r["times_as_fast"]), f"{r['times_the_cpu']:.2f}", f"{r['logits_differ']:.1e}",
            f"{r['gradients_differ']:.1e}",
        )
        for r in chosen
    ]  # fmt: skip
    header = (
        "model", "tokens of a job", "candidates", "a step with a shared job, s", "whole rows, s", "times as fast", "in CPU time",
        "logits differ by", "gradients, of the largest",
    )  # fmt: skip
    return (
        "A step forwards and backwards, LoRA on every projection, against transformers' own attention on a batch of whole rows.\n\n"
        f"{table(header, body)}\n\n{source(chosen)}\n"
    )


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Row]], str]], ...] = (
    ("peers", "Against other engines, CPU", peers_section),
    ("accuracy", "What a precision costs in accuracy", accuracy_section),
    ("quality", "How well it ranks: held-out occupations", quality_section),
    ("specialists", "Two more specialists on the same base", specialists_section),
    ("training", "Training: candidates that share their job", training_section),
    ("cascade", "Who is not read to the end", cascade_section),
    ("index", "The first stage over a pool", index_section),
    ("explain", "Words and notes", explain_section),
    ("serve", "Serving", serve_section),
    ("reliability", "Chaos", reliability_section),
    ("adapters", "More adapters than slots", adapters_section),
    ("ceiling", "What the machine can do at most", ceilings_section),
    ("ops", "Single ops beside their ceilings", ops_section),
    ("threads", "A second thread", threads_section),
    ("growth", "How cost grows", growth_section),
)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    parts = [
        "# Benchmarks\n\nRendered from `bench/results/*.jsonl` by `python -m bench.report`; each row there holds its command and commit.\n"
    ]
    for area, title, render in SECTIONS:
        rows = read_rows(area)
        if rows:
            parts.append(f"## {title}\n\n{render(rows)}")
    (DOCS / "benchmarks.md").write_text("\n".join(parts))
    print(f"wrote {Path('docs/benchmarks.md')} and its pictures")
    if costs := read_rows("cost"):
        (DOCS / "cost-study.md").write_text(cost_page(costs))
        print("wrote docs/cost-study.md")
    on_gpu = {area: rows for area in gpu.AREAS if (rows := read_rows(area))}
    if on_gpu:
        (DOCS / "gpu.md").write_text(gpu.page(on_gpu, table))
        if "gpu-gemm" in on_gpu:
            (DOCS / "gpu-linear-roofline.svg").write_text(gpu.linear_picture(on_gpu["gpu-gemm"]))
        print(f"wrote {Path('docs/gpu.md')} and its picture")


if __name__ == "__main__":
    main()
