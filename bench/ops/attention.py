"""Attention against torch's scaled_dot_product_attention on the same work, interleaved, one JSON line a case.

Knows how to time the op; does not know whether it is right: the op's tests run first, and a red test gives no number.
The peer gets its keys and values already gathered and padded into one dense batch: that copy is not in its time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from uma_kernels import dispatch
from uma_kernels.attention import paged_decode, tree_attention
from uma_kernels.attention.cases import LEAVES, PAGED_CASES, PREFILL, PagedCase, TreeCase, tree_inputs, tree_tokens

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[[], object]


def tree_calls(case: TreeCase) -> tuple[Call, Call]:
    """Ours, and torch's on the same queries; all asked segments of `case` have one length and one depth."""
    q, k, v = tree_tokens(case)
    inputs = tree_inputs(case, q, k, v)
    out = torch.empty_like(inputs.q)
    scale = case.head_dim**-0.5
    asked = [n for n, s in enumerate(case.segments) if not s.cached]
    paths = torch.tensor([case.path(n) for n in asked])
    len_q, len_k = case.segments[asked[0]].length, paths.shape[1]
    queries = inputs.q.view(len(asked), len_q, case.heads, case.head_dim).transpose(1, 2).contiguous()
    keys, values = (x[paths].transpose(1, 2).contiguous() for x in (k, v))
    mask = torch.ones(len_q, len_k, dtype=torch.bool).tril(len_k - len_q)

    def ours() -> object:
        return tree_attention(
            inputs.q, inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.batch, scale, case.window, out
        )

    def peer() -> object:
        if len_q == len_k:
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    return ours, peer


def paged_calls(case: PagedCase) -> tuple[Call, Call]:
    """Ours, and torch's on the same queries; all contexts of `case` have one length."""
    rows, length = len(case.context_lens), case.context_lens[0]
    blocks = -(-length // case.block_size)
    table = torch.randperm(rows * blocks).view(rows, blocks).int()
    k_cache, v_cache = torch.randn(2, rows * blocks * case.block_size, case.kv_heads, case.head_dim)
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    q = torch.randn(rows, case.heads, case.head_dim)
    out = torch.empty_like(q)
    keys, values = torch.randn(2, rows, case.kv_heads, length, case.head_dim)
    scale = case.head_dim**-0.5

    def ours() -> object:
        return paged_decode(q, k_cache, v_cache, table, lengths, case.block_size, scale, case.window, out)

    def peer() -> object:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    return ours, peer


def interleaved(calls: tuple[Call, ...], seconds: float) -> list[list[float]]:
    """Seconds of each call, taken in turns for about `seconds`, after one turn that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times


def measured_gflops() -> float:
    """The fp32 ceiling of this machine, as torch's matrix product reaches it with these threads."""
    a, b = torch.randn(2, 1024, 1024)
    (times,) = interleaved((lambda: a @ b,), 1.0)
    return 2 * 1024**3 / min(times) / 1e9


def row(case: TreeCase | PagedCase, ours: list[float], peer: list[float], ceiling: float) -> dict[str, object]:
    p20, p50, p80 = (q * 1e3 for q in _quantiles(ours))
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "op": "attention.tree" if isinstance(case, TreeCase) else "attention.paged_decode",
        "backend": f"cpp-{dispatch.extension().isa()}",
        "case": case.id,
        "dtype": "fp32",
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_s": case.bytes / p50 / 1e6,
        "gflop_s": case.flops / p50 / 1e6,
        "pct_ceiling": 100 * case.flops / p50 / 1e6 / ceiling,
        "peer": "torch scaled_dot_product_attention, gathered and padded beforehand",
        "peer_p50_ms": statistics.median(peer) * 1e3,
        "ratio_p20_p50_p80": _quantiles(ratios),
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench.ops.attention", *sys.argv[1:]]),
    }


def _quantiles(values: list[float]) -> list[float]:
    fifths = statistics.quantiles(values, n=5)
    return [fifths[0], statistics.median(values), fifths[3]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=dispatch.extension().hardware_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case")
    args = parser.parse_args()
    tests = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_attention.py", "-k", "cpp"]
    if subprocess.run(tests, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        print("the tests of attention fail: nothing is measured", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    dispatch.extension().set_num_threads(args.threads)
    ceiling = measured_gflops()
    for case in (PREFILL, LEAVES, PAGED_CASES[-1]):
        calls = tree_calls(case) if isinstance(case, TreeCase) else paged_calls(case)
        print(json.dumps(row(case, *interleaved(calls, args.seconds), ceiling)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
