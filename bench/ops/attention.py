"""Attention against torch's scaled_dot_product_attention on the same work.

    python -m bench.ops.attention [--threads N] [--only NAME]

Rows of trees quote their share of the FMA ceiling, counting visible pairs only; rows of decoding their share of read
bandwidth. Without --threads each case runs with one thread and with all. Ours and the peer get the same queries; the
peer gets its keys and values already gathered and padded into one dense batch: that copy is not in its time. Decoding
takes another cache a call, as layers do, until all of them are more than twice the last-level cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.ops import measure, options, set_threads
from uma_kernels import dispatch
from uma_kernels.attention import paged_decode, tree_attention
from uma_kernels.attention.cases import PagedCase, Segment, TreeCase, tree_inputs, tree_tokens
from uma_kernels.dispatch import use_backend
from uma_kernels.testing import assert_reduction

Call = Callable[[], torch.Tensor]
PEER = "torch scaled_dot_product_attention, gathered and padded beforehand"

# Query heads, key-value heads, head dimension and windows.
MODELS: dict[str, tuple[int, int, int, tuple[int | None, ...]]] = {
    "smollm2-135m": (9, 3, 64, (None,)),
    "qwen2.5-0.5b": (14, 2, 64, (None,)),
    "gemma3-270m": (4, 1, 256, (None, 128)),  # a window shorter than the sequences, so that it cuts
}
PREFILL = (Segment(None, 450),)
RANKING = (Segment(None, 300), *(Segment(0, 150) for _ in range(64)))
DECODE_BATCHES, DECODE_LENGTH, BLOCK = (1, 16), 2048, 16
CACHES_BYTES = 2**26 + 2**24  # of the caches that decoding takes in turns: more than twice 32 MiB
Case = TreeCase | PagedCase


def cases() -> list[Case]:
    """Trees of each model and window, then decoding: its windows read less and are not listed."""
    trees = [
        TreeCase(f"{model}/{name}", heads, kv_heads, head_dim, segments, window)
        for model, (heads, kv_heads, head_dim, windows) in MODELS.items()
        for name, segments in (("prefill450", PREFILL), ("rank300+64x150", RANKING))
        for window in windows
    ]
    decoding = [
        PagedCase(f"{model}/decode{batch}x{DECODE_LENGTH}", heads, kv_heads, head_dim, BLOCK, (DECODE_LENGTH,) * batch)
        for model, (heads, kv_heads, head_dim, _) in MODELS.items()
        for batch in DECODE_BATCHES
    ]
    return [*trees, *decoding]


def tree_calls(case: TreeCase) -> tuple[Call, Call, int]:
    """Ours; torch's, a call for each run of segments of one length and depth; and how many caches they take: one."""
    q, k, v = tree_tokens(case)
    inputs = tree_inputs(case, q, k, v)
    out = torch.empty_like(inputs.q)
    scale = case.head_dim**-0.5
    parts = []
    for _, run in itertools.groupby(range(len(case.segments)), lambda n: (case.segments[n].length, len(case.path(n)))):
        own = list(run)
        paths, asked = torch.tensor([case.path(n) for n in own]), torch.tensor([case.tokens[n] for n in own])
        len_q, len_k = asked.shape[1], paths.shape[1]
        seen = torch.ones(len_q, len_k, dtype=torch.bool).tril(len_k - len_q)
        if case.window:
            seen &= seen.triu(len_k - len_q - case.window + 1)
        queries, keys, values = (x.transpose(1, 2).contiguous() for x in (q[asked], k[paths], v[paths]))
        parts.append((queries, keys, values, None if len_q == len_k and not case.window else seen))

    def ours() -> torch.Tensor:
        return tree_attention(
            inputs.q, inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.batch, scale, case.window, out
        )

    def peer() -> torch.Tensor:
        results = [
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen, is_causal=seen is None, enable_gqa=True
            )
            for queries, keys, values, seen in parts
        ]
        return torch.cat([x.transpose(1, 2).reshape(-1, case.heads, case.head_dim) for x in results])

    return ours, peer, 1


def paged_calls(case: PagedCase) -> tuple[Call, Call, int]:
    """Ours and torch's, each call with the next cache, and how many caches; all contexts of `case` have one length."""
    rows, length = len(case.context_lens), case.context_lens[0]
    blocks = -(-length // case.block_size)
    shape = (rows * blocks * case.block_size, case.kv_heads, case.head_dim)
    count = max(2, -(-CACHES_BYTES // (8 * shape[0] * shape[1] * shape[2])))
    table = torch.randperm(rows * blocks).view(rows, blocks).int()
    caches = [tuple(torch.randn(2, *shape)) for _ in range(count)]
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    q = torch.randn(rows, case.heads, case.head_dim)
    out = torch.empty_like(q)
    at = torch.arange(length)
    slots = table[:, at // case.block_size].long() * case.block_size + at % case.block_size
    gathered = [tuple(cache[slots].transpose(1, 2).contiguous() for cache in pair) for pair in caches]
    scale = case.head_dim**-0.5
    turns, peer_turns = itertools.cycle(caches), itertools.cycle(gathered)

    def ours() -> torch.Tensor:
        k_cache, v_cache = next(turns)
        return paged_decode(q, k_cache, v_cache, table, lengths, case.block_size, scale, case.window, out)

    def peer() -> torch.Tensor:
        keys, values = next(peer_turns)
        result = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        return result.transpose(1, 2).reshape(q.shape)

    return ours, peer, count


def check(ours: Call, peer: Call, calls: int) -> None:
    """Ours against the reference, torch's error as the measure; after `calls` calls ours takes the same cache again."""
    with use_backend("reference"):
        reference = ours().clone()
    for _ in range(calls - 1):
        ours()
    assert_reduction(ours(), peer(), reference)


def main() -> None:
    args = options(__doc__ or "")
    every = dispatch.extension().hardware_threads()
    for threads in (args.threads,) if args.threads else sorted({1, every}):
        set_threads(threads)
        torch.manual_seed(0)
        for case in cases():
            tree = isinstance(case, TreeCase)
            op = "attention.tree" if tree else "attention.paged_decode"
            if args.only not in f"{op} {case.id} fp32":
                continue
            ours, peer, caches = tree_calls(case) if isinstance(case, TreeCase) else paged_calls(case)
            measure(
                args,
                partial(check, ours, peer, caches),
                ours,
                peer,
                op=op,
                case=case.id,
                dtype="fp32",
                flops=case.flops,
                bytes_moved=case.bytes,
                peer=PEER,
            )


if __name__ == "__main__":
    main()
