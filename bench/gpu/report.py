"""The page `docs/gpu.md` from the rows that GPUs gave: `python -m bench.report` calls it.

Knows rows and tables; measures nothing and needs no GPU. Of each case the newest row counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.charts import Point, roofline

__all__ = ["AREAS", "linear_picture", "page"]

Row = dict[str, Any]
Table = Callable[[Sequence[str], Sequence[Sequence[object]]], str]
AREAS = ("gpu-gemm", "gpu-lora", "gpu-attention", "gpu-topk", "gpu-runner")
PLANNED = (
    ("ours two launches 4 a SM PDL", 4),
    ("ours two launches 8 a SM PDL", 256),
)  # what `plans.PAIR_PLANS` holds, by rows
PEERS = {
    "vs_torch": "",
    "vs_ours_bf16": " (bf16)",
    "vs_four_ops": " (our four launches)",
}  # of a row, and what to call it
FUSED = {"gated": "swiglu", "linear-add": "addition to the residual"}


def page(rows: dict[str, Sequence[Row]], table: Table) -> str:
    """The whole page; `rows` by area."""
    head = (
        "# On a GPU\n\nRendered from `bench/results/gpu-*.jsonl` by `python -m bench.report`. Microseconds are medians of graph"
        " replays over rotated buffers, contestants in turn; ratios above 1 mean that this project is faster.\n"
    )
    parts = [head, _source(next(iter(rows.values())))]
    sections = (
        ("gpu-runner", "Ranking and decoding", _runner),
        ("gpu-gemm", "Matrix products", _gemm),
        ("gpu-lora", "Adapters", _lora),
        ("gpu-attention", "Attention", _attention),
        ("gpu-topk", "Search", _topk),
    )
    parts += [f"## {title}\n\n{render(rows[area], table)}" for area, title, render in sections if rows.get(area)]
    return "\n".join(parts) + "\n"


def _source(rows: Sequence[Row]) -> str:
    row = rows[-1]
    limits = row["ceilings"]
    return (
        f"{row['device']}, driver {row['driver']}, torch {row['torch']}, Triton {row['triton']}, {row['date'][:10]}. Ceilings of the"
        f" same run: copy {limits['copy_gb_s']:.0f} GB/s, read {limits['read_gb_s']:.0f} GB/s, bf16 matrix product"
        f" {limits['bf16_tflop_s']:.0f} TFLOP/s, one more kernel in a graph {limits['launch_us']:.1f} us.\n"
    )


def _newest(rows: Sequence[Row], *fields: str) -> list[Row]:
    found: dict[Any, Row] = {}
    for row in rows:
        found[tuple(row.get(field) for field in fields)] = row
    return list(found.values())


def _runner(rows: Sequence[Row], table: Table) -> str:
    hidden = {"bench", "name", "date", "device", "driver", "torch", "cuda", "triton", "python", "command", "ceilings"}
    body = [
        (r["name"], r["commit"], ", ".join(f"{k} {v}" for k, v in r.items() if k not in hidden | {"commit"}))
        for r in _newest(rows, "name", "mode", "max_num_batched_tokens")
    ]
    note = "600/250/100: a job of 600 tokens and 100 candidates of 250, Qwen3 0.6B's shape with random weights, bf16.\n"
    return f"{note}\n{table(('what', 'commit', 'measured'), body)}\n"


def _tokens(row: Row) -> int:
    return int(row["case"].split("-T")[1].split("-")[0])


def _gemm(rows: Sequence[Row], table: Table) -> str:
    newest = _newest(rows, "op", "case")
    linear = [r for r in newest if r["op"] == "linear"]
    body = []
    for tokens in sorted({_tokens(r) for r in linear}):
        of = [r for r in linear if _tokens(r) == tokens]
        ratios = [r["vs_cublas"] for r in of]
        slowest = min(of, key=lambda r: r["vs_cublas"])
        body.append((
            tokens, len(of), f"{statistics.geometric_mean(ratios):.3f}", f"{min(ratios):.2f} ({slowest['case']})", f"{max(ratios):.2f}",
            f"{max(r['of_matmul'] for r in of):.2f}", f"{max(r['of_read'] for r in of):.2f}",
        ))  # fmt: skip
    header = (
        "rows",
        "shapes",
        "against cuBLAS",
        "least",
        "most",
        "best share of the matrix rate",
        "best share of read",
    )
    others = [
        (r["op"], r["case"], r["us"], next(f"{r[key]}{what}" for key, what in PEERS.items() if key in r), r["of_read"])
        for r in newest
        if r["op"] not in ("linear", *FUSED)
    ]
    same = all(r["same_bits"] for r in newest if "same_bits" in r)
    return (
        "Batch-invariant products (mode `audit`) of the layers of 0.6B, 1.7B and 8B models, bf16. A row alone has the bits it has"
        f" in the batch: {'in every case' if same else 'NOT in every case'}.\n\n![Roofline](gpu-linear-roofline.svg)\n\n"
        f"{table(header, body)}\n\n{_fused(newest, table)}"
        f"{table(('op', 'case', 'us', 'against torch', 'share of read'), others)}\n{_quality(newest)}"
    )


def _quality(newest: Sequence[Row]) -> str:
    """What 8-bit products cost, beside their speed above."""
    found = [r for r in newest if "relative_error_bf16" in r]
    if not found:
        return ""
    eight, sixteen = (max(r[key] for r in found) for key in ("relative_error", "relative_error_bf16"))
    return (
        f"\nOf the products above those in 8 bits are off by {100 * eight:.1f} % (root mean square), those in bf16 by"
        f" {100 * sixteen:.2f} %."
        " What that does to the scores of a real model: [benchmarks](benchmarks.md#what-a-precision-costs-in-accuracy).\n"
    )


def _fused(newest: Sequence[Row], table: Table) -> str:
    """Products that do what follows them in the same launch; nothing where none was measured."""
    body = [
        (FUSED[r["op"]], r["case"], r["us"], r["vs_two_ops"], r["vs_torch"], r["of_matmul"], r["of_read"])
        for r in newest
        if r["op"] in FUSED
    ]
    header = (
        "product with",
        "case",
        "us",
        "against two launches",
        "against torch",
        "share of the matrix rate",
        "share of read",
    )
    return f"{table(header, body)}\n\n" if body else ""


def linear_picture(rows: Sequence[Row]) -> str:
    """A roofline of the 8B shapes."""
    linear = [r for r in _newest(rows, "op", "case") if r["op"] == "linear" and r["case"].startswith("8B")]
    limits = linear[-1]["ceilings"]
    points = []
    for row in linear:
        tokens, n, k = (int(part[1:]) for part in row["case"].split("-")[-3:])
        flops, moved = 2 * tokens * n * k, 2 * (n * k + tokens * (n + k))
        points.append(Point(row["case"].removeprefix("8B-"), flops / moved, flops / row["us"] * 1e6))
    caption = [f"{linear[-1]['device']}; roof: read bandwidth and matrix rate measured in the same run."]
    title = "Matrix products of an 8B layer, bf16, mode audit"
    return roofline(title, limits["read_gb_s"] * 1e9, limits["bf16_tflop_s"] * 1e12, points, caption)


def _lora(rows: Sequence[Row], table: Table) -> str:
    newest = _newest(rows, "part", "site", "T", "adapters", "ranks")
    body, ratios = [], []
    for row in (r for r in newest if r["part"] == "pair"):
        times = {name: t["us"] for name, t in row["contestants"].items()}
        ours = times[next(name for name, most in PLANNED if row["T"] <= most)]
        rivals = {name: us for name, us in times.items() if not name.startswith("ours")}
        best = min(rivals, key=lambda name: rivals[name])
        ratios.append(rivals[best] / ours)
        body.append((
            row["site"], row["T"], row["adapters"], f"{ours:.1f}", f"{rivals[best]:.1f} ({best})", f"{ratios[-1]:.2f}",
            f"{ours / row['floor_us']:.1f}",
        ))  # fmt: skip
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    header = ("site", "rows", "adapters", "ours, us", "best anchor, us", "ratio", "times the byte floor")
    text = (
        f"Shrink and expand alone, rank 16, the plan that ships for each number of rows: geometric mean {mean:.2f} over the best"
        f" of vLLM's, SGLang's (both tuned for the cell) and torch's, least {min(ratios):.2f}.\n\n{table(header, body)}\n"
    )
    taxes = []
    for part in ("site", "prefill"):
        cells = [r for r in newest if r["part"] == part]
        for tokens, adapters in dict.fromkeys((r["T"], r["adapters"]) for r in cells):
            of = [r for r in cells if (r["T"], r["adapters"]) == (tokens, adapters)]
            base = sum(r["contestants"]["base cuBLAS"]["us"] for r in of)
            designs = set.intersection(*(set(r["tax"]) for r in of))
            sums = {d: sum(r["contestants"][d]["us"] for r in of) / base - 1 for d in designs}
            listed = ", ".join(f"{d} {100 * v:+.1f} %" for d, v in sorted(sums.items(), key=lambda item: item[1]))
            taxes.append((tokens, adapters, listed))
    note = "A whole 8B layer with adapters at every site, over the base products by cuBLAS:"
    return f"{text}\n{note}\n\n{table(('rows', 'adapters', 'cost of each design'), taxes)}\n{_limits(newest, table)}"


def _limits(newest: Sequence[Row], table: Table) -> str:
    """Padding of ranks, and plans on shapes that they were not chosen by; nothing where none was measured."""
    body = [
        (
            r["part"],
            r["site"],
            r["T"],
            r["adapters"],
            r["ranks"],
            f"{100 * r.get('cost', r.get('loss')):+.1f} %",
            r.get("best", ""),
        )
        for r in newest
        if r["part"] in ("max-rank", "held-out")
    ]
    header = (
        "",
        "site",
        "rows",
        "adapters",
        "ranks",
        "of rank 8 in pools up to 128 over up to 8; of the plan over the best",
        "best",
    )
    return f"\n{table(header, body)}\n" if body else ""


def _attention(rows: Sequence[Row], table: Table) -> str:
    newest = _newest(rows, "part", "case", "H", "D", "what")
    step = [
        (r["part"], r["case"], r["D"], r["what"], r["us"], r["tflop_s"], r.get("ns_per_tile", ""), r["vs_ours"])
        for r in newest
        if r["part"] != "decode"
    ]
    decode = [
        (r["case"], r["H"], r["D"], r["what"], r["us"], r["of_read"], r["vs_ours"])
        for r in newest
        if r["part"] == "decode"
    ]
    last = "its speed over ours"
    return (
        f"{table(('part', 'case', 'D', 'what', 'us', 'TFLOP/s', 'ns a tile', last), step)}\n\n"
        f"{table(('decode', 'H', 'D', 'what', 'us', 'share of read', last), decode)}\n"
    )


def _topk(rows: Sequence[Row], table: Table) -> str:
    body = [
        (r["case"], r["us"], f"{r['pct_read']} %", f"{r['pct_matmul']} %", r.get("ratio", ""))
        for r in _newest(rows, "case")
    ]
    return f"{table(('case', 'us', 'of read', 'of the matrix rate', 'against torch'), body)}\n"
