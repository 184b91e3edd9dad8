"""The k best rows and late interaction on a GPU, against torch's matmul + topk and padded torch.

    python -m bench.gpu.topk [--quick] [--sweep] [--only maxsim]

Knows corpora larger than the L2 cache, so that each call is cold by itself; does not know the engine. Everything is checked
before it is timed: what is wrong gets no number. `--sweep` times other tiles of the scan. `read %` is the share of the read
bandwidth measured in this process, counting each corpus byte once.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu import harness
from uma_kernels.topk import Corpus, maxsim, pack_corpus, pack_filter, reference, topk, triton_kernel
from uma_kernels.topk.triton_kernel import Tile

DEVICE = "cuda"
PEER_DTYPE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
}
QUERY_TOKENS = 32
COLUMNS = ("case", "us", "us_p10", "us_p90", "gb_s", "pct_read", "tflop_s", "pct_matmul", "torch_us", "ratio")


@dataclass(frozen=True)
class Case:
    format: str
    rows: int
    width: int
    queries: int
    k: int = 100
    allowed: float | None = None  # share of rows that a filter lets through

    @property
    def id(self) -> str:
        kept = "" if self.allowed is None else f"-filter{self.allowed:g}"
        return f"{self.format}-Q{self.queries}-N{self.rows}-D{self.width}-k{self.k}{kept}"


M = 1_000_000
CASES = [
    *[Case(format, M, 384, q) for format in ("bf16", "int8", "fp8", "fp32") for q in (1, 16)],
    Case("bf16", M, 384, 16, allowed=0.5),
    Case("bf16", M, 384, 16, k=4096),
    *[Case("bf16", M, 384, q) for q in (64, 256, 1024)],
    *[Case("bf16", 4 * M, 1024, q) for q in (1, 16)],
    *[Case("int8", 4 * M, 1024, q) for q in (1, 16)],
]
LONG_CASES = [
    *[Case("fp16", M, 384, q) for q in (1, 16)],
    *[Case("bf16", M, 1024, q) for q in (1, 16, 256, 1024)],
    *[Case(format, 10 * M, 384, 16) for format in ("bf16", "int8", "fp8", "fp32")],
    *[Case("bf16", 10 * M, 1024, q) for q in (1, 16)],
    *[Case("bf16", M, 384, 256, k=k) for k in (10, 1000, 4096)],
    *[Case(format, M, 384, q) for format in ("int8", "fp8", "fp32") for q in (64, 256)],
]


def random_corpus(case: Case) -> Corpus:
    """Packed in parts: the fp32 rows of a large corpus need not fit."""
    part = min(case.rows, M)
    data, scales = [], []
    width = 0
    for _ in range(case.rows // part):
        rows = torch.nn.functional.normalize(torch.randn(part, case.width, device=DEVICE), dim=1)
        packed = pack_corpus(rows, case.format)
        width = packed.width
        data.append(packed.data)
        if packed.scales is not None:
            scales.append(packed.scales)
        del rows, packed
    whole = torch.empty(case.rows, data[0].shape[1], dtype=data[0].dtype, device=DEVICE)
    for i in range(len(data)):
        whole[i * part : (i + 1) * part] = data[i]
        data[i] = data[i][:0]
    return Corpus(case.format, width, case.rows, whole, torch.cat(scales) if scales else None)


def rounded(queries: torch.Tensor, format: str) -> torch.Tensor:
    """Queries as a scan of the format multiplies them, fp32."""
    if format not in ("int8", "fp8"):
        return queries.to(PEER_DTYPE[format]).float()
    largest = queries.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(1.004 * largest)) - 14)
    return (queries / scale).round() * scale if format == "int8" else (queries / scale).half().float() * scale


def check(
    case: Case, corpus: Corpus, queries: torch.Tensor, words: torch.Tensor | None, mask: torch.Tensor | None
) -> None:
    """The first queries against torch in the operands' precision: scores agree, and no better row was left out."""
    scores, indices = topk(queries, corpus, case.k, words)
    q = min(2, case.queries)
    operand = rounded(queries[:q], case.format)
    found = torch.full((q, 0), 0.0, device=DEVICE)
    for first in range(0, case.rows, M):
        rows = corpus.data[first : first + M, : corpus.width].float()
        part = (operand.double() @ rows.T.double()) if case.rows <= M else (operand @ rows.T)
        if corpus.scales is not None:
            part *= corpus.scales[first : first + M]
        if mask is not None:
            part = part.masked_fill(~mask[first : first + M], float("-inf"))
        found = (
            torch.cat([found, part.float()], 1)
            if case.rows <= M
            else torch.cat([found, part.float().topk(case.k, 1).values], 1)
        )
    true = found.topk(case.k, 1).values
    error = float((scores[:q] - true).abs().max())
    assert error <= 2e-5 * float(true.abs().max()) + 2e-6, f"{case.id}: scores differ by {error}"
    assert bool((scores.diff(dim=1) <= 0).all()), f"{case.id}: not in order"
    assert all(row.unique().numel() == case.k for row in indices[:8]), f"{case.id}: a row twice"
    alone_scores, alone_indices = topk(queries[q - 1 : q], corpus, case.k, words)
    assert torch.equal(alone_scores[0], scores[q - 1]), f"{case.id}: a query's scores depend on others"
    assert torch.equal(alone_indices[0], indices[q - 1]), f"{case.id}: a query's rows depend on others"
    again = topk(queries, corpus, case.k, words)
    assert torch.equal(again[0], scores), f"{case.id}: not deterministic"
    assert torch.equal(again[1], indices), f"{case.id}: not deterministic"


def torch_topk(
    case: Case, corpus: Corpus, queries: torch.Tensor, mask: torch.Tensor | None
) -> Callable[[], Any] | None:
    """torch in the corpus' own type; int8 and fp8: the same rows as bf16, while these fit beside."""
    if corpus.nbytes * (2 if case.format in ("int8", "fp8") else 0) > 40e9:
        return None
    dtype = PEER_DTYPE[case.format]
    rows = corpus.data if corpus.data.dtype is dtype else corpus.rows().to(dtype)
    operand = torch.nn.functional.pad(queries, (0, rows.shape[1] - corpus.width)).to(dtype)
    hidden = (
        None if mask is None else torch.zeros(case.rows, device=DEVICE, dtype=dtype).masked_fill(~mask, float("-inf"))
    )
    if 2 * dtype.itemsize * case.rows * case.queries > 30e9:
        return None

    def run() -> Any:
        scores = operand @ rows.T
        return torch.topk(scores if hidden is None else scores + hidden, case.k)

    return run


def timed(contestants: dict[str, Callable[[], Any]], inner: int, rounds: int) -> dict[str, harness.Timing]:
    """A contestant that cannot be captured is left out, and said so."""
    try:
        return harness.compare(contestants, inner, rounds)
    except RuntimeError as error:
        print(f"  torch left out: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return harness.compare({"ours": contestants["ours"]}, inner, rounds)


def bench_topk(case: Case, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    corpus = random_corpus(case)
    queries = torch.nn.functional.normalize(torch.randn(case.queries, case.width, device=DEVICE), dim=1)
    mask = None if case.allowed is None else torch.rand(case.rows, device=DEVICE) < case.allowed
    words = None if mask is None else pack_filter(mask)
    check(case, corpus, queries, words, mask)
    contestants: dict[str, Callable[[], Any]] = {"ours": lambda: topk(queries, corpus, case.k, words)}
    peer = torch_topk(case, corpus, queries, mask)
    if peer is not None:
        contestants["torch"] = peer
    times = timed(contestants, 2 if case.queries >= 64 else 4, rounds)
    return row_of("topk", case.id, times, corpus.nbytes, 2 * case.queries * case.rows * case.width)


def row_of(op: str, case: str, times: dict[str, harness.Timing], nbytes: int, flops: int) -> dict[str, Any]:
    ours, ceilings = times["ours"], harness.ceilings()
    row: dict[str, Any] = {"op": op, "case": case, **ours.as_row(), "gb_s": round(nbytes / ours.median / 1e3, 1)}
    row["pct_read"] = round(100 * row["gb_s"] / ceilings.read_gb_s, 1)
    row["tflop_s"] = round(flops / ours.median / 1e6, 2)
    row["pct_matmul"] = round(100 * row["tflop_s"] / ceilings.bf16_tflop_s, 1)
    if "torch" in times:
        row["torch_us"] = round(times["torch"].median, 1)
        row["ratio"] = round(times["torch"].median / ours.median, 2)
    return row


def bench_maxsim(num_queries: int, num_docs: int, width: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    lengths = torch.randint(20, 181, (num_docs,))
    doc_ends = torch.tensor([0, *lengths.tolist()]).cumsum(0).to(DEVICE)
    query_ends = torch.arange(num_queries + 1, device=DEVICE) * QUERY_TOKENS
    docs = torch.nn.functional.normalize(torch.randn(int(doc_ends[-1]), width, device=DEVICE), dim=1).bfloat16()
    queries = torch.nn.functional.normalize(
        torch.randn(num_queries * QUERY_TOKENS, width, device=DEVICE), dim=1
    ).bfloat16()
    longest = int(lengths.max())
    mask = (torch.arange(longest)[None, :] < lengths[:, None]).to(DEVICE)
    padded = torch.zeros(num_docs, longest, width, device=DEVICE, dtype=torch.bfloat16)
    padded[mask] = docs
    hidden = torch.zeros(num_docs, longest, 1, device=DEVICE, dtype=torch.bfloat16).masked_fill(
        ~mask[:, :, None], float("-inf")
    )

    def by_torch() -> torch.Tensor:
        best = (padded @ queries.T + hidden).amax(dim=1)
        return best.view(num_docs, num_queries, QUERY_TOKENS).float().sum(dim=2).T

    few = min(num_docs, 200)
    some_ends = doc_ends[: few + 1]
    true = reference.maxsim(queries.float(), query_ends, docs[: int(some_ends[-1])].float(), some_ends)
    ours = maxsim(queries, query_ends, docs, doc_ends)
    error = float((ours[:, :few] - true).abs().max())
    assert error <= 1e-4 * float(true.abs().max()), f"maxsim: scores differ by {error}"
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: maxsim(queries, query_ends, docs, doc_ends),
        "torch": by_torch,
    }
    times = timed(contestants, 4, rounds)
    name = f"maxsim-bf16-Q{num_queries}x{QUERY_TOKENS}-D{num_docs}x20..180-W{width}"
    return row_of("maxsim", name, times, docs.nbytes, 2 * width * queries.shape[0] * docs.shape[0])


def sweep(rounds: int) -> None:
    """Other tiles for few queries; the plan's own come first."""
    for case, table in (
        (Case("bf16", M, 384, 16), "FEW"),
        (Case("int8", M, 384, 16), "FEW"),
        (Case("bf16", M, 384, 1024), "MANY"),
    ):
        torch.manual_seed(0)
        corpus = random_corpus(case)
        queries = torch.nn.functional.normalize(torch.randn(case.queries, case.width, device=DEVICE), dim=1)
        plans = getattr(triton_kernel, table)
        own = plans[case.format]
        if table == "FEW":
            options = [Tile(rows, 16, depth, warps, stages) for rows in (128, 256) for depth in (64, 128) for warps in (4, 8)
                       for stages in (2, 3, 4)]  # fmt: skip
        else:
            options = [
                Tile(128, 128, 64, 8, 3),
                Tile(128, 128, 64, 4, 4),
                Tile(128, 256, 64, 8, 3),
                Tile(256, 128, 64, 8, 3),
            ]
        for tile in [own, *options]:
            plans[case.format] = tile
            try:
                found = harness.compare({"ours": lambda c=corpus, q=queries: topk(q, c, 100)}, 4, rounds)["ours"]  # type: ignore[misc]
                print(
                    f"  {case.id} {tile}: {found.median:.1f} us, {corpus.nbytes / found.median / 1e3:.0f} GB/s",
                    flush=True,
                )
            except Exception as error:
                print(f"  {case.id} {tile}: {str(error).splitlines()[0][:80]}", flush=True)
        plans[case.format] = own
        del corpus, queries
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the cases that the goals name, fewer rounds")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, and nothing else")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    harness.require_gpu()
    rounds = 7 if args.quick else 20
    if args.sweep:
        sweep(rounds)
        return
    rows: list[dict[str, Any]] = []

    def keep(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        with harness.guarded(name):
            rows.append(measure())
            harness.save("topk", rows[-1:])
        gc.collect()
        torch.cuda.empty_cache()

    for num_queries, num_docs in ((1, 20000), (8, 20000)):
        if args.only in f"maxsim-Q{num_queries}":
            keep(f"maxsim-Q{num_queries}", partial(bench_maxsim, num_queries, num_docs, 128, rounds))
    for case in CASES if args.quick else [*CASES, *LONG_CASES]:
        if args.only in case.id:
            keep(case.id, partial(bench_topk, case, rounds))
    print(harness.table(rows, COLUMNS))
    harness.end()


if __name__ == "__main__":
    main()
