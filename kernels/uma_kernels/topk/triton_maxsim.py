"""Late interaction on a GPU: a program holds one query's tokens, 32 at a time, and streams one document's.

Knows ragged token embeddings; does not know padding: only tokens that exist are read.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted

QUERY_TOKENS = 32  # summed together: a constant, so that a query's sum has one order
DOC_TOKENS = 64
DEPTH = 128  # of a product, at most
WARPS, STAGES = {2: 4, 4: 8}, 3  # warps by bytes of an element


@triton.jit
def maxsim_kernel(
    queries, query_ends, docs, doc_ends, out, num_queries, num_docs,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[q, d]; a score that is not finite stands for a value that is not, and makes the result NaN."""
    q, d = tl.program_id(0) % num_queries, tl.program_id(0) // num_queries
    query_begin, query_end = tl.load(query_ends + q), tl.load(query_ends + q + 1)
    doc_begin, doc_end = tl.load(doc_ends + d), tl.load(doc_ends + d + 1)
    infinity: tl.constexpr = float("inf")
    length = (doc_end - doc_begin).to(tl.int32)
    total = 0.0
    for s in range(query_begin, query_end, BLOCK_S):
        token = s + tl.arange(0, BLOCK_S)
        best = tl.full((BLOCK_T, BLOCK_S), -infinity, tl.float32)
        for t in range(0, length, BLOCK_T):
            i = t + tl.arange(0, BLOCK_T)
            at = docs + (doc_begin + i) * D
            products = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
            for first in tl.range(0, D, BLOCK_D):
                offs = first + tl.arange(0, BLOCK_D)
                a = tl.load(at[:, None] + offs[None, :], (i < length)[:, None] & (offs < D)[None, :], 0.0)
                b = tl.load(
                    queries + token[None, :] * D + offs[:, None],
                    (token < query_end)[None, :] & (offs < D)[:, None],
                    0.0,
                )
                if UPCAST:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                products = tl.dot(a, b, products, input_precision=PRECISION)
            products = tl.where(products - products == 0.0, products, infinity)
            best = tl.where((i < length)[:, None], tl.maximum(best, products), best)
        of_tokens = tl.max(best, 0)
        total += tl.sum(tl.where(token < query_end, of_tokens, 0.0), 0)
    total = tl.where(total == infinity, float("nan"), total)
    tl.store(out + q.to(tl.int64) * num_docs + d, total)


def maxsim(queries: torch.Tensor, query_ends: torch.Tensor, docs: torch.Tensor, doc_ends: torch.Tensor) -> torch.Tensor:
    num_queries, num_docs = query_ends.shape[0] - 1, doc_ends.shape[0] - 1
    out = torch.empty(num_queries, num_docs, dtype=torch.float32, device=docs.device)
    if not out.numel():
        return out
    width = docs.shape[1]
    fp32 = docs.dtype is torch.float32
    maxsim_kernel[(num_queries * num_docs,)](
        queries, query_ends, docs, doc_ends, out, num_queries, num_docs,
        D=width, BLOCK_S=QUERY_TOKENS, BLOCK_T=DOC_TOKENS, BLOCK_D=_depth(width, fp32), UPCAST=interpreted(),
        PRECISION="tf32x3" if fp32 and not interpreted() else "ieee", num_warps=WARPS[docs.element_size()], num_stages=STAGES,
    )  # fmt: skip
    return out


def _depth(width: int, fp32: bool) -> int:
    return min(DEPTH // 4 if fp32 else DEPTH, max(16, triton.next_power_of_2(width)))


AOT_CASES = [
    AotCase(
        f"maxsim-{name}-{width}",
        maxsim_kernel,
        {
            "queries": f"*{name}", "query_ends": "*i64", "docs": f"*{name}", "doc_ends": "*i64", "out": "*fp32",
            "num_queries": "i32", "num_docs": "i32",
        },
        {
            "D": width, "BLOCK_S": QUERY_TOKENS, "BLOCK_T": DOC_TOKENS, "BLOCK_D": _depth(width, name == "fp32"),
            "UPCAST": False, "PRECISION": "tf32x3" if name == "fp32" else "ieee",
        },
        WARPS[4 if name == "fp32" else 2],
        STAGES,
        is_matmul=name != "fp32",
    )
    for name, width in (("bf16", 128), ("bf16", 768), ("fp16", 96), ("fp32", 128))
]  # fmt: skip
