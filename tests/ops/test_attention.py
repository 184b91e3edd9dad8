"""Attention: every back end against fp64 over trees of segments, and bitwise sameness however a tree is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BACKENDS
from uma_kernels import check, dispatch
from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention
from uma_kernels.attention.cases import (
    HALF_CASES,
    PAGED_CASES,
    TREE_CASES,
    PagedCase,
    Segment,
    TreeCase,
    TreeInputs,
    tree_inputs,
    tree_tokens,
)
from uma_kernels.check import ShapeError
from uma_kernels.testing import assert_invariant, assert_reduction, with_sentinels

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# The back ends that promise bitwise sameness.
each_invariant_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"], indirect=True)


def in_interpreter(backend: str) -> bool:
    return backend == "triton" and dispatch.interpreted()


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """torch's own attention in the dtype given: q [len_q, H, D], the last rows of keys and values [len_k, Hkv, D]."""
    len_q, len_k = q.shape[0], k.shape[0]
    position, key = torch.arange(len_k - len_q, len_k)[:, None], torch.arange(len_k)[None, :]
    seen = (key <= position) & (key > position - (window or len_k))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen).transpose(0, 1)


def tree_sdpa(case: TreeCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of every token of the tree, segment by segment, from the tree alone: no slots, no offsets."""
    out = torch.zeros(case.num_tokens, case.heads, case.head_dim, dtype=q.dtype)
    for n, own in enumerate(case.tokens):
        if own:
            out[own] = sdpa(q[own], k[case.path(n)], v[case.path(n)], case.window)
    return out


def run(case: TreeCase, inputs: TreeInputs, out: torch.Tensor | None = None) -> torch.Tensor:
    return tree_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.k_cache,
        inputs.v_cache,
        inputs.batch,
        case.head_dim**-0.5,
        case.window,
        out,
    )


def per_token(case: TreeCase, tokens: Tokens) -> torch.Tensor:
    """Results by token number, zero for cached tokens."""
    inputs = tree_inputs(case, *tokens)
    results = torch.zeros(case.num_tokens, case.heads, case.head_dim)
    results[inputs.rows] = run(case, inputs)
    return results


@pytest.mark.parametrize("case", TREE_CASES, ids=lambda c: c.id)
def test_tree_attention_matches_fp64_and_reads_no_other_slot(case: TreeCase, backend: str) -> None:
    tokens = tree_tokens(case)
    true, torch_result = tree_sdpa(case, *(x.double() for x in tokens)), tree_sdpa(case, *tokens)
    inputs = tree_inputs(case, *tokens)
    with with_sentinels(inputs.q.shape) as out:
        run(case, inputs, out)
        assert_reduction(out, torch_result[inputs.rows], true[inputs.rows])


def test_large_scores_do_not_overflow(backend: str) -> None:
    case = TreeCase("large", 2, 1, 16, (Segment(None, 70),))
    q, k, v = tree_tokens(case)
    tokens = (q * 40, k * 40, v)
    true, torch_result = tree_sdpa(case, *(x.double() for x in tokens)), tree_sdpa(case, *tokens)
    assert_reduction(per_token(case, tokens), torch_result, true)


def test_a_nan_key_gives_nan_to_those_who_see_it_and_to_nobody_else(backend: str) -> None:
    case = TreeCase("nan", 2, 1, 16, (Segment(None, 70), Segment(0, 5), Segment(0, 5)))
    q, k, v = tree_tokens(case)
    k[72] = float("nan")
    results = per_token(case, (q, k, v))
    assert results[72:75].isnan().all()
    assert torch.isfinite(results[:70]).all()
    assert torch.isfinite(results[75:]).all()


def _cut(case: TreeCase, cached: int, *lengths: int) -> TreeCase:
    """A chain of segments of these lengths; the first `cached` of them lie in the cache."""
    segments = tuple(Segment(n - 1 if n else None, length, n < cached) for n, length in enumerate(lengths))
    return replace(case, segments=segments)


@each_invariant_backend
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 64), (5, 5, 24), (8, 1, 16)])
def test_a_row_has_the_same_bits_however_its_path_is_cut_or_cached(
    backend: str, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    if in_interpreter(backend) and head_dim > 16:
        pytest.skip("many wide heads take minutes in the interpreter")
    whole = TreeCase("chain", heads, kv_heads, head_dim, (Segment(None, 203),), window)
    tokens = tree_tokens(whole)
    expected = per_token(whole, tokens)
    cuts = (
        (0, (1, 63, 64, 75)), (2, (5, 123, 2, 73)), (0, (65, 138)), (1, (200, 3)), (1, (1, 202)), (2, (64, 64, 75)),
        (1, (202, 1)),
    )  # fmt: skip
    for cached, lengths in cuts[:2] if in_interpreter(backend) else cuts:
        case = _cut(whole, cached, *lengths)
        start = sum(lengths[:cached])
        assert_invariant(per_token(case, tokens)[start:], expected[start:])


@each_invariant_backend
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [(70, 33, 1, 64, 90, 17), (130, 3, 1, 4, 1, 1, 20, 2), (65, 1, 0, 2)])
def test_a_candidate_has_the_same_bits_alone_and_in_any_batch(
    backend: str, lengths: tuple[int, ...], window: int | None
) -> None:
    if in_interpreter(backend) and sum(lengths) > 200:
        pytest.skip("long candidates take minutes in the interpreter")
    tree = TreeCase("tree", 9, 3, 64, (Segment(None, lengths[0]), *(Segment(0, n) for n in lengths[1:])), window)
    tokens = tree_tokens(tree)
    expected = per_token(tree, tokens)
    for n, own in enumerate(tree.tokens[1:], start=1):
        alone = replace(tree, segments=(Segment(None, lengths[0], cached=True), Segment(0, lengths[n])))
        picked = tree.path(n)
        q, k, v = tokens
        assert_invariant(per_token(alone, (q[picked], k[picked], v[picked]))[lengths[0] :], expected[own])


@pytest.mark.skipif(dispatch.C is None, reason="the compiled extension is not built")
def test_a_row_has_the_same_bits_with_any_number_of_threads() -> None:
    tree = TreeCase("tree", 9, 3, 64, (Segment(None, 70), *(Segment(0, n) for n in (33, 1, 64, 90, 17))))
    tokens = tree_tokens(tree)
    expected = per_token(tree, tokens)
    extension = dispatch.extension()
    before = extension.get_num_threads()
    try:
        for threads in (1, 2, 3):
            extension.set_num_threads(threads)
            assert_invariant(per_token(tree, tokens), expected)
    finally:
        extension.set_num_threads(before)


@each_invariant_backend
def test_changing_one_candidate_changes_no_other(backend: str) -> None:
    tree = TreeCase("tree", 3, 1, 64, (Segment(None, 70), Segment(0, 33), Segment(0, 40)))
    q, k, v = tree_tokens(tree)
    before = per_token(tree, (q, k, v))
    changed = tree.tokens[1]
    for x in (q, k, v):
        x[changed] = torch.randn_like(x[changed]) * 100
    after = per_token(tree, (q, k, v))
    assert not torch.equal(after[changed], before[changed])
    for n in (0, 2):
        assert_invariant(after[tree.tokens[n]], before[tree.tokens[n]])


def paged_inputs(case: PagedCase) -> tuple[TreeCase, list[Tokens], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sequences as chains and their tokens; caches with shuffled blocks among NaN; the block table, -1 beyond."""
    blocks = [-(-n // case.block_size) for n in case.context_lens]
    order = torch.randperm(sum(blocks) + 2).tolist()
    table = torch.full((len(blocks), max(blocks, default=0) + 1), -1, dtype=torch.int32)
    shape = (len(order) * case.block_size, case.kv_heads, case.head_dim)
    k_cache, v_cache = torch.full((2, *shape), float("nan"))
    tree = TreeCase(case.name, case.heads, case.kv_heads, case.head_dim, (), case.window)
    sequences = []
    for b, length in enumerate(case.context_lens):
        table[b, : blocks[b]] = torch.tensor([order.pop() for _ in range(blocks[b])])
        q, k, v = tree_tokens(_cut(tree, 0, length))
        positions = torch.arange(length)
        slots = table[b, positions // case.block_size].long() * case.block_size + positions % case.block_size
        k_cache[slots], v_cache[slots] = k, v
        sequences.append((q, k, v))
    return tree, sequences, k_cache, v_cache, table


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda c: c.id)
def test_paged_decode_matches_fp64_and_on_the_cpu_is_bitwise_tree_attention(case: PagedCase, backend: str) -> None:
    tree, sequences, k_cache, v_cache, table = paged_inputs(case)
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    empty = torch.zeros(0, case.heads, case.head_dim)
    q = torch.cat([empty, *(q[-1:] for q, _, _ in sequences)])
    true, torch_result = (
        torch.cat([empty.to(t), *(sdpa(q[-1:].to(t), k.to(t), v.to(t), case.window) for q, k, v in sequences)])
        for t in (torch.float64, torch.float32)
    )
    scale = case.head_dim**-0.5
    with with_sentinels(q.shape) as out:
        paged_decode(q, k_cache, v_cache, table, lengths, case.block_size, scale, case.window, out)
        assert_reduction(out, torch_result, true)
    if backend.startswith("cpp"):
        for b, tokens in enumerate(sequences):
            length = case.context_lens[b]
            assert_invariant(out[b], per_token(_cut(tree, 0, length), tokens)[-1])
            assert_invariant(out[b], per_token(_cut(tree, 1, length - 1, 1), tokens)[-1])


def test_slots_blocks_and_lengths_out_of_range_are_refused(backend: str) -> None:
    q, kv = torch.zeros(2, 2, 8), torch.zeros(2, 1, 8)
    cache = torch.zeros(4, 1, 8)
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    for slots in ([0, 4], [0, -3]):
        batch = AttentionBatch(offsets, torch.tensor(slots, dtype=torch.int32), offsets)
        with pytest.raises(IndexError):
            tree_attention(q, kv, kv, cache, cache, batch, 1.0)
    for blocks, length in (([0, 2], 3), ([0, -1], 3), ([0, 1], 5), ([0, 1], 0)):
        table, lens = torch.tensor([blocks], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        if check.readable(table):
            with pytest.raises(IndexError):
                paged_decode(q[:1], cache, cache, table, lens, 2, 1.0)


def test_wrong_shapes_are_refused() -> None:
    def tree(q: torch.Tensor, k: torch.Tensor, cache: torch.Tensor, window: int | None = None) -> None:
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        batch = AttentionBatch(offsets, torch.tensor([-1, -2], dtype=torch.int32), offsets)
        tree_attention(q, k, k, cache, cache, batch, 1.0, window)

    q, k, cache = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8), torch.zeros(3, 2, 8)
    tree(q, k, cache)
    for wrong in (
        (torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), cache),  # three rows, the batch has two
        (torch.zeros(2, 3, 8), k, cache),  # three heads over two
        (torch.zeros(2, 4, 12), torch.zeros(2, 2, 12), torch.zeros(3, 2, 12)),  # twelve is no multiple of eight
        (q, torch.zeros(2, 1, 8), cache),
        (q.double(), k, cache),
    ):
        with pytest.raises(ShapeError):
            tree(*wrong)
    with pytest.raises(ValueError):
        tree(q, k, cache, window=0)


@pytest.mark.parametrize(
    ("starts_q", "slots", "starts_k"),
    [([0, 2], 2, [0, 3]), ([0, 3], 2, [0, 2]), ([1, 2], 2, [0, 2]), ([0, 2, 1], 4, [0, 2, 4]), ([], 0, [])],
)
def test_a_batch_that_does_not_fit_together_is_refused(starts_q: list[int], slots: int, starts_k: list[int]) -> None:
    with pytest.raises(ShapeError):
        AttentionBatch(
            torch.tensor(starts_q, dtype=torch.int32),
            torch.zeros(slots, dtype=torch.int32),
            torch.tensor(starts_k, dtype=torch.int32),
        )


# What only the Triton back end promises, or only a GPU can show.
needs_triton = pytest.mark.parametrize("backend", ["triton"] if dispatch.triton_error() is None else [], indirect=True)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda c: c.id)
def test_sixteen_bit_tree_attention_matches_fp64(case: TreeCase, dtype: torch.dtype, backend: str) -> None:
    tokens = tuple(x.to(dtype) for x in tree_tokens(case))
    true = tree_sdpa(case, *(x.double() for x in tokens))
    torch_result = tree_sdpa(case, *(x.float() for x in tokens)).to(dtype)
    inputs = tree_inputs(case, *tokens)
    with with_sentinels(inputs.q.shape, dtype) as out:
        run(case, inputs, out)
        assert_reduction(out, torch_result[inputs.rows], true[inputs.rows], dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bit_paged_decode_matches_fp64(dtype: torch.dtype, backend: str) -> None:
    case = PagedCase("half", 8, 2, 64, 16, (1, 17, 300))
    _, sequences, k_cache, v_cache, table = paged_inputs(case)
    sequences = [tuple(x.to(dtype) for x in tokens) for tokens in sequences]
    q = torch.cat([q[-1:] for q, _, _ in sequences])
    true = torch.cat([sdpa(q[-1:].double(), k.double(), v.double(), None) for q, k, v in sequences])
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    with with_sentinels(q.shape, dtype) as out:
        paged_decode(q, k_cache.to(dtype), v_cache.to(dtype), table, lengths, case.block_size, 0.125, None, out)
        assert_reduction(out, true.to(dtype), true, dtype)


@each_invariant_backend
@pytest.mark.parametrize("window", [None, 270])
def test_a_sequence_decodes_to_the_same_bits_alone_and_in_any_batch(
    backend: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many programs share a sequence's splits, too."""
    case = PagedCase("batch", 3, 1, 16, 16, (300, 1, 64, 257, 513), window)
    _, sequences, k_cache, v_cache, table = paged_inputs(case)
    q = torch.cat([q[-1:] for q, _, _ in sequences])
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    together = paged_decode(q, k_cache, v_cache, table, lengths, 16, 0.25, window)
    for b, length in enumerate(case.context_lens):
        narrow = table[b : b + 1, : -(-length // 16)].contiguous()
        alone = paged_decode(q[b : b + 1], k_cache, v_cache, narrow, lengths[b : b + 1], 16, 0.25, window)
        assert_invariant(alone[0], together[b])
    if backend == "triton":
        from uma_kernels.attention import triton_kernel

        for programs in (1, 10):
            monkeypatch.setattr(triton_kernel, "DECODE_PROGRAMS", programs)
            shared = paged_decode(q, k_cache, v_cache, table, lengths, 16, 0.25, window)
            assert_invariant(shared, together)


@needs_triton
def test_a_block_that_nobody_checked_gives_nan_and_no_context_gives_zeros(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uma_kernels.attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "readable", lambda tensor: False)
    q, cache = torch.randn(5, 2, 8), torch.randn(4, 1, 8)
    table = torch.tensor([[0, 2], [0, -1], [0, 1], [0, 1], [1, 0]], dtype=torch.int32)
    lengths = torch.tensor([3, 3, 1000, 0, 4], dtype=torch.int32)
    for programs in (triton_kernel.DECODE_PROGRAMS, 1):
        monkeypatch.setattr(triton_kernel, "DECODE_PROGRAMS", programs)
        out = paged_decode(q, cache, cache, table, lengths, 2, 1.0)
        assert out[:3].isnan().all()
        assert_invariant(out[3], torch.zeros(2, 8))
        assert torch.isfinite(out[4]).all()


@needs_triton
def test_a_scale_that_is_not_positive_is_refused(backend: str) -> None:
    case = TreeCase("scale", 1, 1, 8, (Segment(None, 2),))
    inputs = tree_inputs(case, *tree_tokens(case))
    with pytest.raises(ValueError, match="scale"):
        tree_attention(inputs.q, inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.batch, 0.0)


@needs_triton
def test_a_captured_decode_follows_new_lengths_and_blocks(backend: str) -> None:
    if dispatch.interpreted():
        pytest.skip("graphs need a GPU")
    case = PagedCase("graph", 8, 2, 64, 16, (300, 17, 600))
    _, sequences, k_cache, v_cache, table = paged_inputs(case)
    q = torch.cat([q[-1:] for q, _, _ in sequences])
    lengths = torch.tensor(case.context_lens, dtype=torch.int32)
    expected = paged_decode(q, k_cache, v_cache, table, lengths, 16, 0.125)
    static = [torch.zeros_like(x) for x in (q, table, lengths)]
    out = torch.zeros_like(q)
    static[2].fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(static[0], k_cache, v_cache, static[1], static[2], 16, 0.125, None, out)
    for to, x in zip(static, (q, table, lengths), strict=True):
        to.copy_(x)
    graph.replay()
    assert_invariant(out, expected)
