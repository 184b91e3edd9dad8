"""Attention against torch's scaled_dot_product_attention on the same work.

The peer gets its keys and values already gathered and padded into one dense batch: that copy is not in its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.ops import measure, options, set_threads
from uma_kernels.attention import paged_decode, tree_attention
from uma_kernels.attention.cases import LEAVES, PAGED_CASES, PREFILL, PagedCase, TreeCase, tree_inputs, tree_tokens
from uma_kernels.dispatch import use_backend
from uma_kernels.testing import assert_reduction

Call = Callable[[], torch.Tensor]
PEER = "torch scaled_dot_product_attention, gathered and padded beforehand"


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

    def ours() -> torch.Tensor:
        return tree_attention(
            inputs.q, inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.batch, scale, case.window, out
        )

    def peer() -> torch.Tensor:
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
    at = torch.arange(length)
    slots = table[:, at // case.block_size].long() * case.block_size + at % case.block_size
    keys, values = (cache[slots].transpose(1, 2).contiguous() for cache in (k_cache, v_cache))
    scale = case.head_dim**-0.5

    def ours() -> torch.Tensor:
        return paged_decode(q, k_cache, v_cache, table, lengths, case.block_size, scale, case.window, out)

    def peer() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    return ours, peer


def main() -> None:
    args = options(__doc__ or "")
    set_threads(args.threads)
    torch.manual_seed(0)
    for case in (PREFILL, LEAVES, PAGED_CASES[-1]):
        ours, peer = tree_calls(case) if isinstance(case, TreeCase) else paged_calls(case)

        def check(ours: Call = ours, peer: Call = peer) -> None:
            with use_backend("reference"):
                reference = ours().clone()
            assert_reduction(ours(), peer().transpose(1, 2).reshape(reference.shape), reference)

        measure(
            args,
            check,
            ours,
            peer,
            op="attention.tree" if isinstance(case, TreeCase) else "attention.paged_decode",
            case=case.id,
            dtype="fp32",
            flops=case.flops,
            bytes_moved=case.bytes,
            peer=PEER,
        )


if __name__ == "__main__":
    main()
