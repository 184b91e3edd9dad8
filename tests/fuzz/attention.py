"""Cases of what happens between projections: rotary embedding, cache moves, tree attention and paged decode.

Knows trees, slots and what each op is specified to compute; does not know how a case came to be drawn.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.fuzz.draw import Draw
from uma_kernels import kv_cache
from uma_kernels.attention import paged_decode, tree_attention
from uma_kernels.attention.cases import Segment, TreeCase, tree_inputs, tree_tokens
from uma_kernels.rope import rope, rotary_table
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction

WORK = 800_000  # products of a query and a key, over all heads: keeps a case short


def _draw_heads(draw: Draw) -> tuple[int, int, int]:
    """Query heads, key-value heads and their width."""
    kv_heads, group = draw.size("Hkv", 1, 3), draw.size("group", 1, 9)
    return kv_heads * group, kv_heads, 8 * draw.size("D/8", 1, draw.pick("widest", (8, 8, 16, 32)))


def check_rope(draw: Draw) -> None:
    tokens, heads, kv_heads = draw.size("T", 0, 70), draw.size("H", 1, 12), draw.size("Hkv", 1, 4)
    half, most = draw.size("D/2", 1, 130), draw.size("P", 1, 600)
    table = draw.place(rotary_table(10000.0 ** -torch.rand(half), most))
    positions = draw.place(torch.randint(most, (tokens,)))
    q, k = torch.randn(tokens, heads, 2 * half), torch.randn(tokens, kv_heads, 2 * half)
    with draw.out(q.shape, rows_apart=True) as q_out, draw.out(k.shape, rows_apart=True) as k_out:
        q_out.copy_(q)
        k_out.copy_(k)
        rope(q_out, k_out, positions, table)
        for out, x in ((q_out, q), (k_out, k)):
            terms = x.double().abs() + x.double().abs().roll(half, dims=-1)
            plain, true = (_rotated(x.to(t), table[positions].to(t)) for t in (torch.float32, torch.float64))
            assert_reduction(out, plain, true, terms=terms)
        some = draw.some_of(tokens)
        alone_q, alone_k = q[some], k[some]
        rope(alone_q, alone_k, positions[some], table)
        assert_invariant(alone_q, q_out[some])
        assert_invariant(alone_k, k_out[some])


def _rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(*turns.split(half, dim=-1))[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


def check_kv_cache(draw: Draw) -> None:
    slots, tokens = draw.size("S", 1, 90), draw.size("T", 0, 90)
    tokens = draw.keep("T", min(slots, tokens))
    shape = draw.size("Hkv", 1, 4), draw.size("D", 1, 130)
    k, v = (draw.place(torch.randn(tokens, *shape), rows_apart=True) for _ in range(2))
    mapping = torch.randperm(slots)[:tokens].int()
    mapping[torch.rand(tokens) < 0.3] = -1
    with draw.out((slots, *shape)) as k_cache, draw.out((slots, *shape)) as v_cache:
        before = torch.randn(2, slots, *shape)
        k_cache.copy_(before[0])
        v_cache.copy_(before[1])
        kv_cache.write(k, v, k_cache, v_cache, draw.place(mapping))
        kept = mapping >= 0
        for cache, expected, rows in ((k_cache, before[0], k), (v_cache, before[1], v)):
            expected[mapping[kept].long()] = rows[kept]
            assert_exact(cache, expected)
        wanted = torch.randint(slots, (draw.size("M", 0, 90),), dtype=torch.int32)
        assert_exact(kv_cache.gather(k_cache, draw.place(wanted)), k_cache[wanted.long()])
        count = draw.size("copied", 0, slots)
        source, target = torch.randint(slots, (count,), dtype=torch.int32), torch.randperm(slots)[:count].int()
        expected_k, expected_v = k_cache.clone(), v_cache.clone()
        expected_k[target.long()], expected_v[target.long()] = k_cache[source.long()], v_cache[source.long()]
        kv_cache.copy(k_cache, v_cache, source, target)
        assert_exact(k_cache, expected_k)
        assert_exact(v_cache, expected_v)


def check_tree_attention(draw: Draw) -> None:
    heads, kv_heads, head_dim = _draw_heads(draw)
    window = draw.size("window", 1, 200) if draw.flag("windowed", 0.3) else None
    segments = _draw_tree(draw, heads)
    case = TreeCase("fuzz", heads, kv_heads, head_dim, segments, window)
    draw.keep("tree", " ".join(f"{s.parent}:{s.length}{'c' * s.cached}" for s in segments))
    tokens, scale = tree_tokens(case), head_dim**-0.5 * draw.pick("steep", (1.0, 1.0, 6.0))
    out, rows = _run_tree(draw, case, tokens, scale)
    true, plain, terms = (torch.zeros(case.num_tokens, heads, head_dim, dtype=t) for t in _THREE)
    for n, own in enumerate(case.tokens):
        path = case.path(n)
        true[own], plain[own], terms[own] = _attended(tokens, own, path, scale, window)
    assert_reduction(out, plain[rows], true[rows], terms=terms[rows])
    # Other segments cached, other slots: the bits stay.
    others = tuple(replace(s, cached=draw.random.random() < 0.5) for s in segments)
    again, again_rows = _run_tree(draw, replace(case, segments=others), tokens, scale)
    results = torch.full((case.num_tokens, heads, head_dim), float("nan"))
    results[rows] = out
    both = torch.isin(again_rows, rows)
    assert_invariant(again[both], results[again_rows[both]])


_THREE = (torch.float64, torch.float32, torch.float64)
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _draw_tree(draw: Draw, heads: int) -> tuple[Segment, ...]:
    """Segments in any order of lengths, each below any earlier one or a root; as many as the work allows."""
    segments: list[Segment] = []
    depth: list[int] = []
    work = 0
    for n in range(draw.size("segments", 0, 9)):
        parent = draw.random.randrange(n) if n and draw.random.random() < 0.8 else None
        length = draw.size(f"len{n}", 0, 320 if n == 0 else 100)
        above = 0 if parent is None else depth[parent]
        work += length * (above + length) * heads
        if work > WORK:
            break
        segments.append(Segment(parent, length, draw.random.random() < 0.4))
        depth.append(above + length)
        del draw.drawn[f"len{n}"]  # the tree itself is kept
    return tuple(segments)


def _run_tree(draw: Draw, case: TreeCase, tokens: Tokens, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of the step and the token of each of its rows. A step may have more keys than queries: NaN rows that nobody sees."""
    inputs = tree_inputs(case, *tokens, spare_slots=draw.random.randrange(1, 9))
    unseen = torch.full((draw.random.randrange(4), *inputs.k.shape[1:]), float("nan"))
    q, k, v = (
        draw.place(x, rows_apart=True) for x in (inputs.q, torch.cat((inputs.k, unseen)), torch.cat((inputs.v, unseen)))
    )
    with draw.out(q.shape) as out:
        tree_attention(q, k, v, inputs.k_cache, inputs.v_cache, inputs.batch, scale, case.window, out)
    return out, inputs.rows


def _attended(
    tokens: Tokens, asked: list[int], path: list[int], scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of the tokens `asked`, the last of `path`: in fp64, in fp32, and the magnitude of what an error may be of."""
    q, k, v = tokens[0][asked], tokens[1][path], tokens[2][path]
    true, weights, scores = _softmax(q.double(), k.double(), v.double(), scale, window)
    plain, _, _ = _softmax(q, k, v, scale, window)
    group = q.shape[1] // k.shape[1]
    magnitude = torch.einsum("hqk,khd->qhd", weights, v.double().abs().repeat_interleave(group, dim=1))
    return true, plain, magnitude * (1 + scores)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Results [len_q, H, D], weights [H, len_q, len_k] and the largest sum of the terms of a score."""
    len_q, len_k, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    position, key = torch.arange(len_k - len_q, len_k)[:, None], torch.arange(len_k)[None, :]
    seen = (key <= position) & (key > position - (window or len_k))
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = (torch.einsum("qhd,khd->hqk", q, keys) * scale).masked_fill(~seen, float("-inf")).softmax(dim=-1)
    largest = float(q.abs().sum(dim=-1).max() * k.abs().max()) * scale if len_q else 0.0
    return torch.einsum("hqk,khd->qhd", weights, values), weights, largest


def check_paged_decode(draw: Draw) -> None:
    heads, kv_heads, head_dim = _draw_heads(draw)
    window = draw.size("window", 1, 300) if draw.flag("windowed", 0.3) else None
    block_size = draw.pick("block", (1, 2, 5, 16, 16, 32))
    most = max(1, min(700, 400_000 // (heads * head_dim)))
    lengths = [draw.size(f"len{b}", 1, most) for b in range(draw.size("B", 0, 6))]
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks) + 2).tolist()
    table = torch.full((len(blocks), max(blocks, default=0) + draw.random.randrange(2)), -1, dtype=torch.int32)
    k_cache, v_cache = torch.full((2, len(order) * block_size, kv_heads, head_dim), float("nan"))
    scale = head_dim**-0.5 * draw.pick("steep", (1.0, 1.0, 6.0))
    true, plain, terms = (torch.zeros(len(lengths), heads, head_dim, dtype=t) for t in _THREE)
    queries = torch.randn(len(lengths), heads, head_dim)
    for b, length in enumerate(lengths):
        table[b, : blocks[b]] = torch.tensor([order.pop() for _ in range(blocks[b])])
        k, v = torch.randn(2, length, kv_heads, head_dim)
        positions = torch.arange(length)
        slots = table[b, positions // block_size].long() * block_size + positions % block_size
        k_cache[slots], v_cache[slots] = k, v
        true[b], plain[b], terms[b] = (
            x[0] for x in _attended((queries[b : b + 1], k, v), [0], list(range(length)), scale, window)
        )
    q, context_lens = draw.place(queries, rows_apart=True), torch.tensor(lengths, dtype=torch.int32)
    with draw.out(q.shape) as out:
        paged_decode(q, k_cache, v_cache, draw.place(table), context_lens, block_size, scale, window, out)
        assert_reduction(out, plain, true, terms=terms)
        some = draw.some_of(len(lengths))
        again = paged_decode(
            queries[some], k_cache, v_cache, table[some], context_lens[some], block_size, scale, window
        )
        assert_invariant(again, out[some])
