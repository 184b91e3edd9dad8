"""The page `docs/cost-study.md` from the rows of `bench.cost`: `python -m bench.report` calls it.

Knows those rows and a price; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables import Row, interval, newest, source, table

PRICE = 0.085  # USD an hour, of two virtual CPUs with 4 GiB on demand at a large cloud in 2026


def cost_page(rows: Sequence[Row]) -> str:
    chosen = newest([r for r in rows if "as_given" in r], lambda r: (r["way"], r["model"], r["candidates"]))
    pages = []
    for count in sorted({r["candidates"] for r in chosen}):
        some = [r for r in chosen if r["candidates"] == count]
        commands = ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in some))
        pages.append(
            f"## The first stage's best {count} candidates\n\n{_ways(some)}\n\n{source(some)} {commands}\n\n{_factors(some)}"
        )
    head = (
        "# What a ranking costs\n\nRendered from `bench/results/cost.jsonl` by `python -m bench.report`; the ways are in `bench/cost.py`."
        f" Prices are those of a machine of two CPUs at {PRICE} USD an hour, kept busy. Queries are held-out jobs."
        " List-wise ways begin from the first stage's order, and a model that has none of its own leaves it as given."
        " Comparisons with `shared` are on the queries that a way answered. CPU time counts where other processes had at most a tenth"
        " of the machine; the ways ran one after another, so it is no race in turns. A factor's parts are ratios to `shared`,"
        " each on the queries of its own way: the cascade's of more than the others'.\n\n"
    )
    return head + "\n".join(pages)


def _ways(rows: Sequence[Row]) -> str:
    body = [
        (
            r["way"], r["model"], r["jobs"], f"{r['ndcg_10']:.4f}", f"{r['as_given']:.0%}",
            interval(r.get("over_shared")), f"{r['gflop_query']:,.0f}",
            f"{r.get('times_the_flops_of_shared', 1):.2f}", f"{r['queries_pflop']:,.0f}" if r["queries_pflop"] else "",
            f"{r['ndcg_pflop']:,.0f}" if r["ndcg_pflop"] else "",
            *(
                ("beside other work", "", "")
                if r["cpu_seconds_query"] is None
                else (
                    f"{r['cpu_seconds_query']:.2f} ({r['quiet_jobs']})",
                    _times(r.get("times_the_cpu_seconds_of_shared", 1.0)),
                    f"{r['cpu_seconds_query'] / 2 / 3600 * PRICE * 1e6:,.0f}",
                )
            ),
        )
        for r in rows
    ]  # fmt: skip
    header = (
        "way", "model", "queries", "nDCG@10", "order as given", "over shared", "GFLOP a query", "of shared", "queries a PFLOP",
        "nDCG a PFLOP", "CPU seconds a query (quiet jobs)", "of shared", "USD a million queries",
    )  # fmt: skip
    return table(header, body)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _factors(rows: Sequence[Row]) -> str:
    """What the tuned small model's cascade saves against each other model's way, split: factors multiply to the total."""
    found = {(r["way"], r["model"]): r for r in rows}
    small = next((m for w, m in found if w == "cascade"), None)
    if small is None:
        return ""
    body = []
    for way, model in found:
        if (
            way not in ("shared", "written", "with reasons", "judged")
            or ("shared", model) not in found
            or model == small
        ):
            continue
        parts = [(way, model), ("shared", model), ("shared", small), ("cascade", small)]
        for what, ratio in (("FLOPs", "times_the_flops_of_shared"), ("CPU seconds", "times_the_cpu_seconds_of_shared")):
            # Each row knows its ratio to the small model's shared scoring on the jobs that it answered, in CPU time those that both
            # answered on a quiet machine.
            written, theirs, _, cascade = (found[part].get(ratio, 1.0) for part in parts)
            if None in (written, theirs, cascade):
                continue
            factors = [written / theirs, theirs, 1 / cascade]
            body.append(
                (f"{model}, {way}", found[parts[0]]["jobs"], f"{found[parts[0]]['as_given']:.0%}", what,
                 *(f"{x:.2f}" for x in factors), f"{written / cascade:.1f}",
                 interval([-x for x in (found[parts[0]]["over_shared"][i] for i in (0, 2, 1))]))
            )  # fmt: skip
    header = (
        "ranking by",
        "queries",
        "order as given",
        "of",
        "method",
        "size",
        "cascade",
        "total",
        "nDCG@10 gained by shared",
    )
    return (
        "### The factor, split\n\nHow many times less the tuned small model with a cascade needs than another model's way:"
        " by the method (scoring under a shared job, same model), by the model's size, by the cascade.\n\n"
        f"{table(header, body)}\n"
    )
