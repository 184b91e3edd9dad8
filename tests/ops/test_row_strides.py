"""Rows that lie apart, as in columns of one wide tensor: the same bits as with rows of their own, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from uma_kernels import kv_cache
from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention
from uma_kernels.check import ShapeError, check
from uma_kernels.linear import PRECISIONS, linear, pack
from uma_kernels.linear.cases import FORMATS, WeightFormat
from uma_kernels.lora import LoraRouting, lora, pack_lora
from uma_kernels.norm import rms_norm
from uma_kernels.rope import rope, rotary_table
from uma_kernels.testing import SENTINEL, assert_exact, assert_invariant

TOKENS, HEADS, KV_HEADS, DIM = 5, 4, 2, 16


def apart(*parts: torch.Tensor, gap_columns: int = 3) -> list[torch.Tensor]:
    """Copies of tensors [T, ...] as columns of one buffer, with sentinel columns between and around them."""
    gap = torch.full((parts[0].shape[0], gap_columns), SENTINEL)
    buffer = torch.cat([gap] + [c for part in parts for c in (part.reshape(part.shape[0], -1), gap)], dim=1)
    views, start = [], gap_columns
    for part in parts:
        width = part[0].numel()
        views.append(buffer[:, start : start + width].view(part.shape))
        start += width + gap_columns
    return views


def assert_only_inside(*views: torch.Tensor, gap_columns: int = 3) -> None:
    """The views are all of `apart`: its sentinel columns are as they were."""
    buffer = torch.empty(0).set_(views[0].untyped_storage())
    gaps = gap_columns * (len(views) + 1) * views[0].shape[0]
    assert int((buffer == SENTINEL).sum()) == gaps, "a column beside a view was written"


def heads(n: int) -> torch.Tensor:
    return torch.randn(TOKENS, n, DIM)


def test_rope_and_norms_of_heads_in_place(backend: str) -> None:
    q, k = heads(HEADS), heads(KV_HEADS)
    gap = (
        16 if backend == "triton" else 3
    )  # on a GPU rows that are aligned otherwise are shared out to threads otherwise
    q_view, k_view = apart(q, k, gap_columns=gap)
    weight, table = torch.randn(DIM), rotary_table(torch.rand(DIM // 2), 9)
    positions = torch.randint(0, 9, (TOKENS,))
    for x in (q, k, q_view, k_view):
        assert rms_norm(x, weight, 1e-5, x) is x
    rope(q, k, positions, table)
    rope(q_view, k_view, positions, table)
    assert_invariant(q_view, q)
    assert_invariant(k_view, k)
    assert_only_inside(q_view, k_view, gap_columns=gap)


def test_cache_writes(backend: str) -> None:
    k, v = heads(KV_HEADS), heads(KV_HEADS)
    slots = torch.tensor([3, -1, 0, 6, 1], dtype=torch.int32)
    caches = torch.zeros(2, 2, 7, KV_HEADS, DIM)
    kv_cache.write(k, v, *caches[0], slots)
    kv_cache.write(*apart(k, v), *caches[1], slots)
    assert_exact(caches[1], caches[0])


def test_attention(backend: str) -> None:
    q, k, v = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)
    k_cache, v_cache = torch.randn(2, 8, KV_HEADS, DIM)
    ints = {"dtype": torch.int32}
    slots = torch.tensor([4, 0, -1, -2, -3, 2, -4, -5], **ints)
    batch = AttentionBatch(torch.tensor([0, 3, 5], **ints), slots, torch.tensor([0, 5, 8], **ints))
    views = apart(q, k, v)
    assert_invariant(
        tree_attention(*views, k_cache, v_cache, batch, 0.25), tree_attention(q, k, v, k_cache, v_cache, batch, 0.25)
    )
    tables = torch.tensor([[0, 1]] * TOKENS, **ints)
    lens = torch.tensor([1, 8, 3, 5, 4], **ints)
    assert_invariant(
        paged_decode(views[0], k_cache, v_cache, tables, lens, 4, 0.25),
        paged_decode(q, k_cache, v_cache, tables, lens, 4, 0.25),
    )


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda c: c.id)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_and_adapters_write_only_their_columns(tokens: int, weight_format: WeightFormat, backend: str) -> None:
    x, bias = torch.randn(tokens, 64), torch.randn(45)
    weight = pack(weight_format.random(45, 64))
    adapter = pack_lora(torch.randn(3, 64), torch.randn(45, 3), 0.5)
    routing = LoraRouting.build([0] * tokens, 1)
    for precision in PRECISIONS:
        own = linear(x, weight, bias, precision=precision)
        (view,) = apart(torch.zeros(tokens, 45))
        linear(x, weight, bias, view, precision)
        assert_invariant(view, own)
        lora(x, own, [adapter], routing)
        lora(x, view, [adapter], routing)
        assert_invariant(view, own)
        assert_only_inside(view)


def test_rows_must_be_contiguous_and_apart() -> None:
    wide = torch.zeros(4, 10, 8)
    check("x", wide[:, 2:5], (4, 3, 8), strided=True)
    check("x", wide[:, 2:3, :5], (4, 1, 5), strided=True)
    check("x", wide[:0, 2:5], (0, 3, 8), strided=True)
    for bad in (wide[:, :, ::2], wide[:, :, :5], wide.transpose(0, 1), wide[:1].expand(4, 10, 8), wide.transpose(1, 2)):
        with pytest.raises(ShapeError):
            check("x", bad, (None, None, None), strided=True)
