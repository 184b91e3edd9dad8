"""Exact nearest rows and late interaction against numpy, torch, faiss and usearch (the last two where they are installed).

    python -m bench.ops.topk [--rows 1000000] [--only fp32-q1] [--no-save]

Knows peers at their best settings and what a scan must read; does not know approximate indices. All sides score every row,
in turns within one run, with the same threads. Recall is the share of the exact best rows that was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch

from bench import rows
from bench.ceiling import ceiling
from bench.ops import set_threads
from uma_kernels import dispatch
from uma_kernels.testing import assert_reduction
from uma_kernels.topk import Corpus, maxsim, pack_corpus, reference, topk

K = 100
QUERIES = (1, 64)
DOC_TOKENS = (20, 180)  # shortest, longest
QUERY_TOKENS = 32
Search = Callable[[], Any]


def searches(format: str, queries: torch.Tensor, vectors: torch.Tensor, threads: int) -> Iterator[tuple[str, Search]]:
    """Peers that score every row in this format."""
    x, q = vectors.numpy(), queries.numpy()
    if format == "fp32":

        def by_numpy() -> np.ndarray:
            scores = q @ x.T
            found = np.argpartition(-scores, K, axis=1)[:, :K]
            return np.take_along_axis(found, np.argsort(-np.take_along_axis(scores, found, 1), 1), 1)

        yield "numpy", by_numpy
        yield "torch", lambda: torch.topk(queries @ vectors.T, K).indices.numpy()
    try:
        faiss = import_module("faiss")
        faiss.omp_set_num_threads(threads)
        kind = faiss.ScalarQuantizer
        index: Any = {
            "fp32": lambda: faiss.IndexFlatIP(x.shape[1]),
            "fp16": lambda: faiss.IndexScalarQuantizer(x.shape[1], kind.QT_fp16, faiss.METRIC_INNER_PRODUCT),
            "int8": lambda: faiss.IndexScalarQuantizer(x.shape[1], kind.QT_8bit, faiss.METRIC_INNER_PRODUCT),
        }[format]()
        index.train(x[:10000])
        index.add(x)
        yield "faiss", lambda: index.search(q, K)[1]
    except ImportError:
        print("faiss is not installed")
    try:
        usearch = import_module("usearch.index")

        def as_format(values: np.ndarray) -> np.ndarray:
            if format == "int8":
                return np.clip(np.round(values * (127 / np.abs(x).max())), -127, 127).astype(np.int8)
            return values.astype({"fp32": np.float32, "fp16": np.float16}[format])

        stored, asked = as_format(x), as_format(q)
        yield (
            "usearch",
            lambda: np.atleast_2d(
                usearch.search(stored, asked, K, usearch.MetricKind.IP, exact=True, threads=threads).keys
            ),
        )
    except ImportError:
        print("usearch is not installed")


def recall(found: Any, exact: torch.Tensor) -> float:
    hits = [len(set(map(int, a)) & set(map(int, b))) for a, b in zip(found, exact.tolist(), strict=True)]
    return round(sum(hits) / exact.numel(), 4)


def bench_topk(args: argparse.Namespace, format: str, num_queries: int, vectors: torch.Tensor, threads: int) -> None:
    case = f"{format}-q{num_queries}"
    if args.only not in f"topk {case}":
        return
    queries = torch.nn.functional.normalize(torch.randn(num_queries, vectors.shape[1]), dim=1)
    exact = torch.topk(queries @ vectors.T, K).indices
    corpus = pack_corpus(vectors, format)
    calls: dict[str, Search] = {"ours": lambda: topk(queries, corpus, K)[1]}
    if format == "int8":
        kept = Corpus(**{name: getattr(corpus, name) for name in ("format", "width", "count", "data", "scales")})
        kept.originals = pack_corpus(vectors, "fp32")
        calls["ours, rescored"] = lambda: topk(queries, kept, K)[1]
    calls |= dict(searches(format, queries, vectors, threads))
    recalls = {name: recall(call(), exact) for name, call in calls.items()}
    lowest = {"fp32": 1.0, "fp16": 0.99, "int8": 0.95}[format]
    assert recalls["ours"] >= lowest, f"recall {recalls['ours']}: wrong, so no number"
    read = ceiling.__wrapped__("read", threads)  # now, not at the start of the process
    fma, madd = ceiling("fp32_fma", threads), ceiling("int16_madd", threads)
    others = rows.OthersShare()
    times = rows.interleave(calls, args.seconds, rounds=3)
    share = others.read()
    read = max(read, ceiling.__wrapped__("read", threads))
    peers = [name for name in calls if not name.startswith("ours")] or ["ours"]
    best = min(peers, key=lambda name: rows.quantiles(times[name])[1])
    flops = 2 * num_queries * vectors.numel()
    for ours in [name for name in calls if name.startswith("ours")]:
        row = rows.op_row(
            "topk", f"Q{num_queries}-N{vectors.shape[0]}-D{vectors.shape[1]}-k{K}", format, times[ours], flops, corpus.nbytes,
            best, times[best], backend=dispatch.choose("topk"), isa=dispatch.isa(), threads=threads, others_share=share,
            variant=ours, recall=recalls,
        )  # fmt: skip
        row["ratios"] = {name: round(rows.quantiles(times[name])[1] * 1e3 / row["p50_ms"], 2) for name in peers}
        row["pct_read"] = round(100 * row["gb_s"] / read, 1)
        row["pct_fma"] = round(100 * row["gflop_s"] / (madd if format == "int8" else fma), 1)
        report(args, row)


def bench_maxsim(args: argparse.Namespace, num_queries: int, num_docs: int, threads: int) -> None:
    case = f"maxsim-q{num_queries}"
    if args.only not in case:
        return
    width = 128
    lengths = torch.randint(DOC_TOKENS[0], DOC_TOKENS[1] + 1, (num_docs,))
    doc_ends, query_ends = torch.tensor([0, *lengths.tolist()]).cumsum(0), torch.arange(num_queries + 1) * QUERY_TOKENS
    docs = torch.nn.functional.normalize(torch.randn(int(doc_ends[-1]), width), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(num_queries * QUERY_TOKENS, width), dim=1)
    longest = int(lengths.max())
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    padded = torch.zeros(num_docs, longest, width)
    padded[mask] = docs
    hidden = torch.zeros(num_docs, longest).masked_fill(~mask, float("-inf"))[:, None, :]

    def by_torch() -> torch.Tensor:
        products = torch.einsum("td,nsd->nts", queries, padded) + hidden
        return products.amax(dim=2).view(num_docs, num_queries, QUERY_TOKENS).sum(dim=2).T

    def run() -> torch.Tensor:
        return maxsim(queries, query_ends, docs, doc_ends)

    true = reference.maxsim(queries.double(), query_ends, docs.double(), doc_ends)
    assert_reduction(run(), by_torch(), true)
    others = rows.OthersShare()
    times = rows.interleave({"ours": run, "torch, padded": by_torch}, args.seconds, rounds=5)
    flops = 2 * width * queries.shape[0] * docs.shape[0]
    row = rows.op_row(
        "maxsim", f"Q{num_queries}x{QUERY_TOKENS}-D{num_docs}x{DOC_TOKENS[0]}..{DOC_TOKENS[1]}-W{width}", "fp32",
        times["ours"], flops, docs.nbytes, "torch, padded", times["torch, padded"],
        backend=dispatch.choose("topk.maxsim"), isa=dispatch.isa(), threads=threads, others_share=others.read(),
    )  # fmt: skip
    row["pct_fma"] = round(100 * row["gflop_s"] / ceiling("fp32_fma", threads), 1)
    row["pct_read"] = round(100 * row["gb_s"] / ceiling("read", threads), 1)
    report(args, row)


def report(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(
        f"{row['op']:6} {row['dtype']} {row['case']:32} {row.get('variant', ''):15} {row['p50_ms']:9.2f} ms"
        f" {row['gb_s']:6.1f} GB/s ({row['pct_read']:.0f} % of read) {row['gflop_s']:7.1f} GFLOP/s ({row['pct_fma']:.0f} %)"
        f"  {row['ratio']:.2f}x {row['peer']}  {row.get('ratios', '')} recall {row.get('recall', '-')}"
        f"  (others used {row['others_share']:.0%})",
        flush=True,
    )
    if not args.no_save:
        rows.append_row("ops", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=None, help="of all sides (default: all CPUs of the process)")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each case")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the corpus")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--only", default="", help="run the cases whose name contains this, e.g. int8-q64 or maxsim")
    parser.add_argument("--no-save", action="store_true", help="print, but add no row to bench/results/ops.jsonl")
    args = parser.parse_args()
    threads = set_threads(args.threads)
    torch.manual_seed(0)
    for num_queries, num_docs in ((1, 2000), (8, 500)):
        bench_maxsim(args, num_queries, num_docs, threads)
    if args.only.startswith("maxsim"):
        return
    vectors = torch.nn.functional.normalize(torch.randn(args.rows, args.width), dim=1)
    for format in ("fp32", "fp16", "int8"):
        for num_queries in QUERIES:
            bench_topk(args, format, num_queries, vectors, threads)


if __name__ == "__main__":
    main()
