"""Low-rank updates of mixed batches: against fp64 row by row, and rows bitwise independent of their neighbours."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.check import NotFinite, ShapeError
from uma_kernels.lora import LoraRouting, LoraSlice, PackedLora, lora, lora_merged, pack_lora
from uma_kernels.lora.cases import CASES, LoraCase
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels

# Bitwise promises hold for compiled kernels alone: torch's own products depend on the batch.
compiled_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"], indirect=True)

threads_matter = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp")], indirect=True)

# Slices without a pool: a pool's own tests are in test_lora_gpu.py.
merged_backends = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"], indirect=True)

Factors = tuple[torch.Tensor, torch.Tensor, float]


def random_factors(case: LoraCase) -> list[Factors | None]:
    return [
        (torch.randn(r, case.width) * case.width**-0.5, torch.randn(case.rows, r) * r**-0.5, 0.5 + i) if r else None
        for i, r in enumerate(case.ranks)
    ]


def pack_all(factors: list[Factors | None]) -> list[PackedLora | None]:
    return [None if f is None else pack_lora(*f) for f in factors]


def row_by_row(
    x: torch.Tensor, out: torch.Tensor, factors: list[Factors | None], mapping: list[int], dtype: torch.dtype
) -> torch.Tensor:
    result = out.to(dtype)
    for t, slot in enumerate(mapping):
        chosen = factors[slot] if slot >= 0 else None
        if chosen is not None:
            lora_a, lora_b, scaling = chosen
            result[t] += scaling * (x[t].to(dtype) @ lora_a.to(dtype).T) @ lora_b.to(dtype).T
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_lora_matches_fp64_row_by_row(case: LoraCase, backend: str) -> None:
    factors, mapping = random_factors(case), case.token_lora_mapping
    x, base = torch.randn(case.tokens, case.width), torch.randn(case.tokens, case.rows)
    routing = LoraRouting.build(mapping, len(case.ranks))
    with with_sentinels(base.shape) as out:
        out.copy_(base)
        lora(x, out, pack_all(factors), routing)
        assert_reduction(
            out,
            row_by_row(x, base, factors, mapping, torch.float32),
            row_by_row(x, base, factors, mapping, torch.float64),
        )
    untouched = [t for t, slot in enumerate(mapping) if slot < 0 or factors[slot] is None]
    assert_exact(out[untouched], base[untouched])


@compiled_only
def test_a_row_has_the_same_bits_in_every_batch(backend: str) -> None:
    slow = backend == "triton" and dispatch.interpreted()
    case = LoraCase(9, 96, 70, (3, 0, 33), 5) if slow else LoraCase(60, 96, 70, (1, 3, 0, 8, 16, 64, 256, 33), 5)
    packed, mapping = pack_all(random_factors(case)), case.token_lora_mapping
    x, base = torch.randn(case.tokens, case.width), torch.randn(case.tokens, case.rows)

    def run(rows: list[int]) -> torch.Tensor:
        out = base[rows].clone()
        lora(x[rows].clone(), out, packed, LoraRouting.build([mapping[t] for t in rows], len(packed)))
        return out

    together = run(list(range(case.tokens)))
    assert_invariant(torch.cat([run([t]) for t in range(case.tokens)]), together)
    for _ in range(2 if slow else 5):
        some = random.sample(range(case.tokens), random.randrange(1, case.tokens))
        assert_invariant(run(some), together[some])


def factors_of(case: LoraCase, dtype: torch.dtype) -> list[Factors | None]:
    """Rounded to `dtype`, with its smallest numbers and both zeros among them."""
    normal = torch.finfo(dtype).smallest_normal
    smallest = normal * torch.finfo(dtype).eps
    odd = torch.tensor([smallest, -3 * smallest, normal, 0.0, -0.0])
    found: list[Factors | None] = []
    for factors in random_factors(case):
        if factors is None:
            found.append(None)
            continue
        lora_a, lora_b = (f.to(dtype) for f in factors[:2])
        lora_a.view(-1)[: len(odd)] = odd[: lora_a.numel()].to(dtype)
        lora_b.view(-1)[-5:] = odd[: lora_b.numel()].to(dtype)
        found.append((lora_a, lora_b, factors[2]))
    return found


@threads_matter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_factors_of_16_bits_give_the_bits_of_the_same_in_fp32(case: LoraCase, dtype: torch.dtype, backend: str) -> None:
    factors = factors_of(case, dtype)
    wide = [None if f is None else (f[0].float(), f[1].float(), f[2]) for f in factors]
    narrow, packed = pack_all(factors), pack_all(wide)
    x, base = torch.randn(case.tokens, case.width), torch.randn(case.tokens, case.rows)
    routing = LoraRouting.build(case.token_lora_mapping, len(case.ranks))
    out, expected = base.clone(), base.clone()
    lora(x, out, narrow, routing)
    lora(x, expected, packed, routing)
    assert_exact(out, expected)
    for half, whole in zip(narrow, packed, strict=True):
        if half is not None and whole is not None:
            assert half.nbytes - whole.nbytes == -(whole.nbytes - 64) // 2, "two bytes a factor, behind the header"


@threads_matter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_16_bits_is_read_exactly(dtype: torch.dtype, backend: str) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()].view(-1, 1)  # as B of rank 1: out = 0 + 1 * value
    out = torch.zeros(1, len(values))
    lora(torch.ones(1, 1), out, [pack_lora(torch.ones(1, 1, dtype=dtype), values, 1.0)], LoraRouting.build([0], 1))
    assert_exact(out[0], values.flatten().float() + 0.0)


@threads_matter
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_the_number_of_threads_changes_no_bit(tokens: int, backend: str) -> None:
    case = LoraCase(tokens, 96, 160, (64, 5, 256))
    packed = pack_all(random_factors(case))
    x, base = torch.randn(tokens, case.width), torch.randn(tokens, case.rows)
    routing = LoraRouting.build([t % 3 for t in range(tokens)], 3)
    extension = dispatch.extension()
    before = extension.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            extension.set_num_threads(threads)
            results.append(base.clone())
            lora(x, results[-1], packed, routing)
    finally:
        extension.set_num_threads(before)
    assert_invariant(results[1], results[0])
    assert_invariant(results[2], results[0])


def merged_case(
    tokens: int,
) -> tuple[list[LoraSlice], list[list[Factors | None]], torch.Tensor, torch.Tensor, list[int]]:
    """Three projections of 70, 33 and 64 columns under four slots, one of them empty in one projection and one in all."""
    cases = [
        LoraCase(tokens, 600, n, ranks)
        for n, ranks in ((70, (16, 0, 3, 0)), (33, (8, 17, 33, 0)), (64, (1, 16, 64, 0)))
    ]
    factors = [random_factors(case) for case in cases]
    slices = [LoraSlice(case.rows, pack_all(own)) for case, own in zip(cases, factors, strict=True)]
    mapping = [(3 * t + t // 5) % 5 - 1 for t in range(tokens)]
    return slices, factors, torch.randn(tokens, 600), torch.randn(tokens, 167), mapping


@merged_backends
@pytest.mark.parametrize("tokens", [0, 1, 3, 90])
def test_merged_projections_match_fp64_row_by_row(tokens: int, backend: str) -> None:
    slices, factors, x, base, mapping = merged_case(tokens)
    with with_sentinels(base.shape) as out:
        out.copy_(base)
        lora_merged(x, out, slices, LoraRouting.build(mapping, 4))
        first = 0
        for part, own in zip(slices, factors, strict=True):
            columns = slice(first, first + part.num_columns)
            assert_reduction(
                out[:, columns],
                row_by_row(x, base[:, columns], own, mapping, torch.float32),
                row_by_row(x, base[:, columns], own, mapping, torch.float64),
            )
            first += part.num_columns


@threads_matter
def test_merged_projections_have_the_bits_of_single_ones_in_every_batch(backend: str) -> None:
    slices, _, x, base, mapping = merged_case(90)
    together = base.clone()
    lora_merged(x, together, slices, LoraRouting.build(mapping, 4))
    single, first = base.clone(), 0
    for part in slices:
        lora(x, single[:, first : first + part.num_columns], part.adapters, LoraRouting.build(mapping, 4))
        first += part.num_columns
    assert_invariant(single, together)
    for size in (1, 2, 7, 40):
        rows = random.sample(range(90), size)
        out = base[rows].clone()
        lora_merged(x[rows].clone(), out, slices, LoraRouting.build([mapping[t] for t in rows], 4))
        assert_invariant(out, together[rows])


@merged_backends
def test_merged_projections_of_wrong_shapes_are_refused(backend: str) -> None:
    routing = LoraRouting.build([0, 1], 2)
    good, other = (
        pack_lora(torch.zeros(4, 7), torch.zeros(5, 4), 1.0),
        pack_lora(torch.zeros(4, 7), torch.zeros(6, 4), 1.0),
    )
    slices = [LoraSlice(5, [good, None]), LoraSlice(5, [None, other])]
    with pytest.raises(ShapeError, match="slot 1"):
        lora_merged(torch.zeros(2, 7), torch.zeros(2, 10), slices, routing)
    with pytest.raises(ShapeError):
        lora_merged(torch.zeros(2, 7), torch.zeros(2, 9), slices[:1], routing)
    with pytest.raises(ShapeError):
        lora_merged(torch.zeros(2, 8), torch.zeros(2, 5), slices[:1], routing)
    lora_merged(torch.zeros(2, 7), torch.zeros(2, 0), [], routing)
    if backend.startswith("cpp"):
        with dispatch.use_backend("reference"):
            plain = pack_lora(torch.zeros(4, 7), torch.zeros(5, 4), 1.0)
        with pytest.raises(ShapeError, match="reference"):
            lora_merged(torch.zeros(2, 7), torch.zeros(2, 5), [LoraSlice(5, [plain, None])], routing)


def test_routing_groups_rows_by_slot_in_order() -> None:
    routing = LoraRouting.build(torch.tensor([2, -1, 0, 2, 0, -1, 2], dtype=torch.int32), 4)
    assert routing.slots == (0, 2)
    assert routing.order.tolist() == [2, 4, 0, 3, 6]
    assert routing.offsets.tolist() == [0, 2, 5]
    assert not routing.is_empty


def test_a_batch_without_adapters_is_left_alone(backend: str) -> None:
    for mapping in ([-1, -1, -1], []):
        routing = LoraRouting.build(mapping, 2)
        assert routing.is_empty
        out = torch.randn(len(mapping), 5)
        before = out.clone()
        lora(torch.randn(len(mapping), 7), out, [None, None], routing)
        assert_exact(out, before)


@compiled_only
def test_a_packed_adapter_has_its_own_rank(backend: str) -> None:
    small, large = (pack_lora(torch.zeros(r, 64), torch.zeros(32, r), 1.0) for r in (16, 256))
    assert (small.rank, large.rank) == (16, 256)
    assert large.nbytes - small.nbytes == 240 * (64 + 32) * 4


@pytest.mark.parametrize("bad", [-2, 2])
def test_slots_out_of_range_are_refused(bad: int) -> None:
    with pytest.raises(IndexError):
        LoraRouting.build([0, bad], 2)


def test_wrong_shapes_are_refused(backend: str) -> None:
    adapter = pack_lora(torch.zeros(4, 7), torch.zeros(5, 4), 1.0)
    routing = LoraRouting.build([0, 0], 1)
    for x, out in (
        (torch.zeros(2, 6), torch.zeros(2, 5)),
        (torch.zeros(2, 7), torch.zeros(2, 6)),
        (torch.zeros(3, 7), torch.zeros(3, 5)),
    ):
        with pytest.raises(ShapeError):
            lora(x, out, [adapter], routing)
    for lora_a, lora_b in (
        (torch.zeros(4, 7), torch.zeros(5, 3)),
        (torch.zeros(0, 7), torch.zeros(5, 0)),
        (torch.zeros(4, 7).double(), torch.zeros(5, 4)),
    ):
        with pytest.raises(ShapeError):
            pack_lora(lora_a, lora_b, 1.0)
    with pytest.raises(IndexError):
        lora(torch.zeros(1, 7), torch.zeros(1, 5), [adapter], LoraRouting.build([1], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_not_finite_is_refused_wherever_it_is(backend: str, dtype: torch.dtype, bad: float) -> None:
    largest = torch.finfo(dtype).max
    for part, place in ((0, 0), (0, 4 * 37 - 1), (1, 0), (1, 70), (1, 4 * 45 - 1)):
        factors = [torch.full((4, 37), -largest, dtype=dtype), torch.full((45, 4), largest, dtype=dtype)]
        pack_lora(factors[0], factors[1], 1.0)
        factors[part].view(-1)[place] = bad
        with pytest.raises(NotFinite):
            pack_lora(factors[0], factors[1], 1.0)
