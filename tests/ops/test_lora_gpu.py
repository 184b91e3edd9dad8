"""Pools, routing on the device and the kernels of a merged site: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.check import ShapeError
from uma_kernels.linear import FP8, PackedLinear, linear, pack
from uma_kernels.lora import (
    DeviceRouting,
    LoraPool,
    LoraRouting,
    LoraSlice,
    PoolFull,
    lora_linear,
    lora_merged,
    pack_lora,
    plans,
)
from uma_kernels.lora.pool import Factors
from uma_kernels.lora.routing import chunk_rows
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels

pytestmark = [
    pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"], indirect=True),
    pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed"),
]

ON_GPU = torch.cuda.is_available()
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE = -1


def random_factors(
    k: int, slices: Sequence[int], ranks: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[Factors | None]:
    """One pair for each slice; rank 0: none."""
    return [
        ((torch.randn(r, k) * k**-0.5).to(dtype), (torch.randn(n, r) * r**-0.5).to(dtype), 0.75 + i) if r else None
        for i, (n, r) in enumerate(zip(slices, ranks, strict=True))
    ]


def make_pool(
    k: int, slices: Sequence[int], adapters: Sequence[list[Factors | None]], dtype: torch.dtype, storage: str = "dense"
) -> LoraPool:
    """One slot for each adapter; the memory of unused blocks is poisoned."""
    device = torch.empty(0).device
    pool = LoraPool(k, slices, len(adapters), 24, max_rank=64, dtype=dtype, storage=storage, device=device)
    for tensor in (pool.a, pool.b):
        tensor.view(torch.uint8).fill_(0xFF)
    for slot, factors in enumerate(adapters):
        if any(f is not None for f in factors):
            pool.load(slot, factors)
    return pool


def true_update(
    x: torch.Tensor,
    slices: Sequence[int],
    adapters: Sequence[Sequence[Factors | None]],
    mapping: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The update of every row in `dtype`, rounding s to x's dtype where `dtype` is that."""
    result = torch.zeros(x.shape[0], sum(slices), dtype=dtype)
    for t, slot in enumerate(mapping):
        first = 0
        for i, n in enumerate(slices):
            pair = adapters[slot][i] if slot >= 0 else None
            if pair is not None:
                lora_a, lora_b, scaling = pair
                result[t, first : first + n] = scaling * (lora_b.to(dtype) @ (lora_a.to(dtype) @ x[t].to(dtype)))
            first += n
    return result


def routed(mapping: Sequence[int], pool: LoraPool, extra: int = 5) -> DeviceRouting:
    routing = DeviceRouting(len(mapping) + extra, pool.num_slots, [pool])
    routing.build(torch.tensor(mapping, dtype=torch.int32))
    return routing


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (17, 3), (300, 5), (700, 33), (1100, 2)])
def test_routing_sorts_rows_by_slot_and_cuts_them_into_chunks(backend: str, tokens: int, slots: int) -> None:
    pool = LoraPool(32, [16], slots, 4, dtype=torch.float32, device=torch.empty(0).device)
    routing = DeviceRouting(1200, slots, [pool])
    for mapping in (
        torch.randint(-1, slots, (tokens,), dtype=torch.int32),
        torch.full((tokens,), slots - 1, dtype=torch.int32),
        torch.full((tokens,), BASE, dtype=torch.int32),
        torch.randint(-3, slots + 3, (tokens,), dtype=torch.int32),  # out of range: as the base
    ):
        routing.build(mapping)
        rows = [t for s in range(slots) for t, slot in enumerate(mapping.tolist()) if slot == s]
        assert routing.order[: len(rows)].tolist() == rows
        assert routing.slots[:tokens].tolist() == [s if 0 <= s < slots else BASE for s in mapping.tolist()]
        chunks, begin = [], 0
        for slot in range(slots):
            left = int((mapping == slot).sum())
            while left > 0:
                size = min(left, chunk_rows(tokens))
                chunks.append((slot, begin, size))
                begin, left = begin + size, left - size
        assert int(routing.count) == len(chunks)
        assert [tuple(c) for c in routing.chunks[:, : len(chunks)].T.tolist()] == chunks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["dense", "fp8", "int4"])
@pytest.mark.parametrize(
    ("k", "slices", "ranks", "tokens"),
    [
        (96, (64, 32, 32), ((3, 16, 1), (0, 17, 8), (0, 0, 0), (33, 4, 20)), 23),
        (1100, (48,), ((8,), (64,)), 5),
        (70, (34, 98), ((5, 5), (16, 0)), 40),
    ],
    ids=["qkv", "split-k", "odd"],
)
def test_merged_update_matches_fp64(
    backend: str,
    dtype: torch.dtype,
    storage: str,
    k: int,
    slices: tuple[int, ...],
    ranks: tuple[tuple[int, ...], ...],
    tokens: int,
) -> None:
    if storage != "dense" and dtype is torch.float16:
        pytest.skip("stored formats are tried in fp32 and bf16")
    adapters = [random_factors(k, slices, r, dtype) for r in ranks]
    pool = make_pool(k, slices, adapters, dtype, storage)
    if storage != "dense":  # what is stored is what counts: its own error is measured in another test
        adapters = [stored_factors(pool, slot, factors) for slot, factors in enumerate(adapters)]
    mapping = [t * 3 % (len(ranks) + 1) - 1 for t in range(tokens)]
    x, base = torch.randn(tokens, k).to(dtype), torch.randn(tokens, sum(slices)).to(dtype)
    routing = routed(mapping, pool)
    results = []
    for one_launch in (True, False):
        with with_sentinels(base.shape, dtype) as out:
            out.copy_(base)
            run_with(one_launch, x, out, pool, routing)
            results.append(out.clone())
    true = base.double() + true_update(x, slices, adapters, mapping, torch.float64)
    torch_result = (base.float() + true_update(x, slices, adapters, mapping, torch.float32)).to(dtype)
    assert_reduction(results[0], torch_result, true, dtype)
    assert_invariant(results[1], results[0])
    untouched = [t for t, slot in enumerate(mapping) if slot < 0 or not any(ranks[slot])]
    assert_exact(results[0][untouched], base[untouched])
    assert int(routing.ready.abs().sum()) == 0
    assert int(routing.arrivals.abs().sum()) == 0


def run_with(one_launch: bool, x: torch.Tensor, out: torch.Tensor, pool: LoraPool, routing: DeviceRouting) -> None:
    from uma_kernels.lora import triton_kernel

    plan = plans.pair_plan(routing.num_tokens, x.element_size())
    changed = plans.PairPlan(one_launch, plan.block_k, plan.programs, plan.num_warps, plan.num_stages)
    triton_kernel.lora_merged(x, out, pool, routing, changed)


def stored_factors(pool: LoraPool, slot: int, factors: list[Factors | None]) -> list[Factors | None]:
    """The factors as the pool's bytes say, in fp32, all scales in lora_a."""

    def plain(stored: torch.Tensor) -> torch.Tensor:
        if pool.storage == "fp8":
            return stored.view(torch.float8_e4m3fn).float()
        return torch.stack(((stored & 15).float() - 8, (stored >> 4).float() - 8), -1).flatten(-2)

    found: list[Factors | None] = []
    for i, pair in enumerate(factors):
        if pair is None:
            found.append(None)
            continue
        blocks = torch.tensor(pool.blocks_of(slot)[i])
        # As bytes: indexing does not know fp8 on every device.
        a = plain(pool.a.view(torch.uint8)[blocks]) * pool.row_scale[blocks][:, :, None]
        b = plain(pool.b_of(i).view(torch.uint8)[blocks - i * pool.rank_blocks])
        found.append((a.flatten(0, 1), b.flatten(0, 1).T, 1.0))
    return found


@pytest.mark.parametrize(("storage", "most"), [("fp8", 0.06), ("int4", 0.4)])
def test_stored_formats_are_near_the_factors(backend: str, storage: str, most: float) -> None:
    """Relative error of the update in the root mean square: two roundings of 3 bits, or of 4-bit levels."""
    k, slices = 256, (64,)
    adapters = [random_factors(k, slices, (16,))]
    pool = make_pool(k, slices, adapters, torch.float32, storage)
    x, out = torch.randn(20, k), torch.zeros(20, 64)
    lora_merged(x, out, pool, routed([0] * 20, pool))
    true = true_update(x, slices, adapters, [0] * 20, torch.float64)
    assert ((out - true).norm() / true.norm()).item() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(backend: str, dtype: torch.dtype) -> None:
    k, slices, many = (1100, (64, 32), (1, 6)) if not ON_GPU else (2304, (512, 256), (1, 3, 60, 256, 300, 1030, 2100))
    ranks = ((3, 16), (40, 5), (0, 17))
    adapters = [random_factors(k, slices, r, dtype) for r in ranks]
    pool = make_pool(k, slices, adapters, dtype)
    x, base = torch.randn(max(many), k).to(dtype), torch.randn(max(many), sum(slices)).to(dtype)
    mapping = [t * 5 % 4 - 1 for t in range(max(many))]

    def run(rows: list[int], one_launch: bool) -> torch.Tensor:
        out = base[rows].clone()
        run_with(one_launch, x[rows].clone(), out, pool, routed([mapping[t] for t in rows], pool))
        return out

    together = run(list(range(max(many))), False)
    for count in many:
        rows = torch.randperm(max(many), device="cpu")[:count].tolist()
        assert_invariant(run(rows, count <= 256), together[rows])


def test_rows_may_lie_apart(backend: str) -> None:
    k, slices = 64, (32, 32)
    adapters = [random_factors(k, slices, (4, 8))]
    pool = make_pool(k, slices, adapters, torch.float32)
    x, base = torch.randn(6, k), torch.randn(6, 64)
    wide_x, wide_out = torch.full((6, 80), float("nan")), torch.full((6, 96), 7.0)
    wide_x[:, :k], wide_out[:, 16:80] = x, base
    plain = base.clone()
    routing = routed([0, BASE, 0, 0, BASE, 0], pool)
    lora_merged(x, plain, pool, routing)
    lora_merged(wide_x[:, :k], wide_out[:, 16:80], pool, routing)
    assert_invariant(wide_out[:, 16:80], plain)
    assert bool((wide_out[:, :16] == 7.0).all())
    assert bool((wide_out[:, 80:] == 7.0).all())


def test_slots_can_be_replaced_and_emptied(backend: str) -> None:
    k, slices = 32, (32, 32)
    device = torch.empty(0).device
    pool = LoraPool(k, slices, 3, 4, max_rank=64, dtype=torch.float32, device=device)
    first, second = random_factors(k, slices, (16, 40)), random_factors(k, slices, (20, 3))
    pool.load(0, first)
    assert pool.free_blocks == (3, 1)
    with pytest.raises(PoolFull):
        pool.load(1, random_factors(k, slices, (1, 30)))
    assert pool.free_blocks == (3, 1)
    pool.load(0, second)
    assert pool.free_blocks == (2, 3)
    x, routing = torch.randn(4, k), routed([0, 1, 0, BASE], pool)
    out = torch.zeros(4, 64)
    lora_merged(x, out, pool, routing)
    assert_reduction(
        out,
        true_update(x, slices, [second, [None, None]], [0, 1, 0, BASE], torch.float32),
        true_update(x, slices, [second, [None, None]], [0, 1, 0, BASE], torch.float64),
    )
    pool.unload(0)
    assert pool.free_blocks == (4, 4)
    again = out.clone()
    lora_merged(x, again, pool, routing)
    assert_exact(again, out)
    for slot in (-1, 3):
        with pytest.raises(IndexError):
            pool.load(slot, second)
    for bad in ([None], random_factors(k, slices, (65, 1)), random_factors(k + 1, slices, (1, 1))):
        with pytest.raises(ShapeError):
            pool.load(0, bad)


def test_memory_follows_the_real_ranks(backend: str) -> None:
    device = torch.empty(0).device
    small, large = (LoraPool(64, (64,), 4, 8, max_rank=r, dtype=torch.float32, device=device) for r in (8, 128))
    assert small.a.nbytes == large.a.nbytes
    factors = random_factors(64, (64,), (8,))
    x, outs = torch.randn(3, 64), []
    for pool in (small, large):
        pool.load(2, factors)
        outs.append(torch.zeros(3, 64))
        lora_merged(x, outs[-1], pool, routed([2, 2, BASE], pool))
        assert pool.free_blocks == (7,)
        assert int(pool.row_tiles) == 1
    assert_invariant(outs[1], outs[0])


def test_misfits_are_refused(backend: str) -> None:
    pool = make_pool(64, (32,), [random_factors(64, (32,), (4,))], torch.float32)
    routing = routed([0, 0], pool)
    for x, out in (
        (torch.zeros(2, 63), torch.zeros(2, 32)),
        (torch.zeros(2, 64), torch.zeros(2, 31)),
        (torch.zeros(3, 64), torch.zeros(3, 32)),
        (torch.zeros(2, 64).half(), torch.zeros(2, 32).half()),
        (torch.zeros(64, 2).T, torch.zeros(2, 32)),
    ):
        with pytest.raises(ShapeError):
            lora_merged(x, out, pool, routing)
    with pytest.raises(ShapeError):
        lora_merged(torch.zeros(2, 64), torch.zeros(2, 32), pool, LoraRouting.build([0, 0], 1))
    with pytest.raises(ShapeError):
        routing.build(torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ShapeError):
        routing.build(torch.zeros(2))


def test_slices_without_a_pool_are_separate_updates(backend: str) -> None:
    with dispatch.use_backend("reference"):
        factors = random_factors(16, (8, 24), (4, 2))
        packed = [pack_lora(*f) for f in factors if f is not None]
        x, out = torch.randn(3, 16), torch.zeros(3, 32)
        slices = [LoraSlice(8, [packed[0]]), LoraSlice(24, [packed[1]])]
        lora_merged(x, out, slices, LoraRouting.build([0, BASE, 0], 1))
        update = true_update(x, (8, 24), [factors], [0, BASE, 0], torch.float64)
        assert_reduction(out, update.float(), update)


def by_form(
    form: str,
    x: torch.Tensor,
    weight: PackedLinear,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pool: LoraPool,
    routing: DeviceRouting,
    add: bool = False,
) -> None:
    """A site in one form, whatever the plans say."""
    from uma_kernels.lora import triton_augmented, triton_kernel, triton_site

    if form == plans.DECODE:
        plan = plans.SitePlan(block_n=16, base_k=128, shrinkers=8) if not ON_GPU else plans.SitePlan()
        triton_site.site_decode(x, weight.data, bias, out, pool, routing, plan, add)
    else:
        pair = plans.pair_plan(len(x), x.element_size())
        triton_kernel.run_pair(x, out, pool, routing, pair, shrink=True, expand=False)
        triton_augmented.augmented(x, weight, bias, out, pool, routing, add)


# K, slices, ranks of each adapter's slices, rows: one row and slice; K, widths and ranks that fill no tile; more rows than a tile.
SITES = [
    (33, (7,), ((5,), (1,)), 1),
    (70, (34, 98), ((5, 17), (16, 0), (0, 0)), 21),
    (1056, (48, 16, 16), ((16, 3, 33), (0, 8, 1)), 9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [plans.AUGMENTED, plans.DECODE])
@pytest.mark.parametrize(("k", "slices", "ranks", "tokens"), SITES, ids=["one", "odd", "split-k"])
def test_a_whole_site_matches_fp64(
    backend: str,
    dtype: torch.dtype,
    form: str,
    k: int,
    slices: tuple[int, ...],
    ranks: tuple[tuple[int, ...], ...],
    tokens: int,
) -> None:
    adapters = [random_factors(k, slices, r, dtype) for r in ranks]
    pool = make_pool(k, slices, adapters, dtype)
    mapping = [t % (len(ranks) + 1) - 1 if tokens > 1 else 0 for t in range(tokens)]
    x, w = torch.randn(tokens, k).to(dtype), (torch.randn(sum(slices), k) * k**-0.5).to(dtype)
    bias = torch.randn(sum(slices)).to(dtype) if tokens != 9 else None
    weight, routing = pack(w), routed(mapping, pool)
    routing.shrunk.fill_(float("nan"))
    update = true_update(x, slices, adapters, mapping, torch.float64)
    added = 0.0 if bias is None else bias.double()
    true = x.double() @ w.double().T + added + update
    torch_result = (x @ w.T + update.to(dtype) + (0 if bias is None else bias)).to(dtype)
    before = torch.randn(true.shape).to(dtype)
    for add in (False, True):  # the counters are back at 0 after the first
        with with_sentinels(true.shape, dtype) as out:
            out.copy_(before if add else torch.full_like(before, float("nan")))
            by_form(form, x, weight, bias, out, pool, routing, add)
            kept = before if add else torch.zeros_like(before)
            assert_reduction(out, torch_result + kept, true + kept.double(), dtype)


@pytest.mark.parametrize("form", [plans.AUGMENTED, plans.DECODE])
@pytest.mark.parametrize("storage", ["dense", "fp8", "int4"])
def test_how_many_slots_a_step_takes_changes_no_bit(
    backend: str, form: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine slots, of which some have no adapter in a slice, one none at all and one no row; ranks of one block, two and three."""
    from uma_kernels.lora import triton_augmented, triton_site

    k, slices, dtype = 48, (34, 30), torch.bfloat16
    ranks = [(16, 16), (0, 5), (33, 2), (7, 0), (0, 0), (20, 48), (1, 1), (16, 3), (8, 40)]
    adapters = [random_factors(k, slices, r, dtype) for r in ranks]
    pool = make_pool(k, slices, adapters, dtype, storage)
    mapping = [8, 0, BASE, 3, 5, 5, 1, 2, 4, 6, 8, BASE, 2, 0, 5]
    x, weight = torch.randn(15, k).to(dtype), pack((torch.randn(64, k) * k**-0.5).to(dtype))
    found = []
    for at_once in (1, 2, 4, 8):
        for module in (triton_augmented, triton_site):
            monkeypatch.setattr(module, "slots_at_once", lambda columns, capability=9, n=at_once: n)
        found.append(torch.full((15, 64), float("nan"), dtype=dtype))
        by_form(form, x, weight, None, found[-1], pool, routed(mapping, pool))
        assert_exact(found[-1], found[0])
    stored = (
        [stored_factors(pool, i, f) if any(f) else f for i, f in enumerate(adapters)]
        if storage != "dense"
        else adapters
    )
    update = true_update(x, slices, stored, mapping, torch.float64)
    base = linear(x, weight)
    assert_reduction(found[0], (base + update.to(dtype)).to(dtype), base.double() + update, dtype)


@pytest.mark.parametrize("storage", ["fp8", "int4"])
def test_a_site_takes_stored_factors_and_8_bit_weights(backend: str, storage: str) -> None:
    k, slices, dtype = 96, (64, 32), torch.bfloat16
    adapters = [random_factors(k, slices, (16, 20), dtype) for _ in range(2)]
    pool = make_pool(k, slices, adapters, dtype, storage)
    stored = [stored_factors(pool, slot, factors) for slot, factors in enumerate(adapters)]
    x, w = torch.randn(18, k).to(dtype), (torch.randn(96, k) * k**-0.5).to(dtype)
    mapping = [t % 3 - 1 for t in range(18)]
    update = true_update(x, slices, stored, mapping, torch.float64)
    for weight in (pack(w), pack(w, FP8)):
        base = linear(x, weight)
        with with_sentinels((18, 96), dtype) as out:
            lora_linear(x, weight, None, out, pool, routed(mapping, pool))
            true = base.double() + update
            assert_reduction(out, (base + update.to(dtype)).to(dtype), true, dtype)
            rows = [t for t in range(18) if mapping[t] < 0]
            assert_invariant(out[rows], base[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_site_gives_a_row_the_same_bits_in_every_batch(backend: str, dtype: torch.dtype) -> None:
    """In mode `audit`, beside any adapters; a row of the base has those of the plain product."""
    k, slices, counts = (96, (48, 32), (1, 5, 17)) if not ON_GPU else (2304, (512, 256), (1, 16, 65, 300, 1030))
    adapters = [random_factors(k, slices, r, dtype) for r in ((3, 16), (40, 5), (0, 17))]
    pool, most = make_pool(k, slices, adapters, dtype), 40 if not ON_GPU else 2100
    x, weight = torch.randn(most, k).to(dtype), pack((torch.randn(sum(slices), k) * k**-0.5).to(dtype))
    mapping = [t * 5 % 4 - 1 for t in range(most)]

    def run(rows: list[int]) -> torch.Tensor:
        out = torch.empty(len(rows), sum(slices), dtype=dtype)
        lora_linear(x[rows].clone(), weight, None, out, pool, routed([mapping[t] for t in rows], pool))
        return out

    together = run(list(range(most)))
    for count in counts:
        rows = torch.randperm(most, device="cpu")[:count].tolist()
        assert_invariant(run(rows), together[rows])
    base = [t for t in range(most) if mapping[t] == BASE]
    assert_invariant(together[base], linear(x[base], weight))


@pytest.mark.parametrize("form", [plans.AUGMENTED, plans.DECODE])
@pytest.mark.parametrize("storage", ["dense", "fp8"])
def test_factors_that_overflow_end_their_own_rows_alone(backend: str, form: str, storage: str) -> None:
    """The factors are finite, what is stored of them is not."""
    k, slices, dtype = 32, (32,), torch.float16
    good = random_factors(k, slices, (4,), dtype)
    pool = make_pool(k, slices, [good, good], dtype, storage)
    x, weight = torch.randn(6, k).to(dtype), pack(torch.randn(32, k).to(dtype))
    mapping, outs = [0, 1, BASE, 0, 1, BASE], []
    for lora_b in (torch.ones(32, 4), torch.full((32, 4), 1e30 if storage == "dense" else float("inf"))):
        pool.load(1, [(torch.ones(4, k), lora_b, 1.0)])
        outs.append(torch.empty(6, 32, dtype=dtype))
        by_form(form, x, weight, None, outs[-1], pool, routed(mapping, pool))
    others = [0, 2, 3, 5]
    assert_invariant(outs[1][others], outs[0][others])
    assert torch.isfinite(outs[0]).all()
    assert not torch.isfinite(outs[1][[1, 4]]).any()


def test_a_site_takes_the_form_of_its_mode(backend: str) -> None:
    """`fast` rounds where its form does; `audit` never changes it."""
    assert {plans.site_form(t, "audit", True) for t in (1, 16)} == {plans.DECODE if ON_GPU else plans.AUGMENTED}
    assert {plans.site_form(t, "audit", True) for t in (17, 10_000)} == {plans.AUGMENTED}
    assert plans.site_form(1, "audit", False) == plans.AUGMENTED
    fast = [plans.site_form(t, "fast", True) for t in (1, 5, 256, 257)]
    assert fast == [plans.DECODE, plans.BESIDE, plans.BESIDE, plans.PAIR]
    assert {plans.site_form(1, "fast", False), plans.site_form(1, "fast", True, 14336)} == {plans.BESIDE}
    k, slices, dtype = 64, (32, 32), torch.bfloat16
    adapters = [random_factors(k, slices, (4, 8), dtype)]
    pool, mapping = make_pool(k, slices, adapters, dtype), [t % 2 - 1 for t in range(70)]
    w, bias, x = (v.to(dtype) for v in (torch.randn(64, k) * k**-0.5, torch.randn(64), torch.randn(70, k)))
    for tokens in (3, 20, 70):
        update = true_update(x[:tokens], slices, adapters, mapping[:tokens], torch.float64)
        for before in (None, torch.randn(tokens, 64).to(dtype)):
            out = torch.empty(tokens, 64, dtype=dtype) if before is None else before.clone()
            lora_linear(
                x[:tokens], pack(w, mode="fast"), bias, out, pool, routed(mapping[:tokens], pool), before is not None
            )
            added = 0 if before is None else before
            true = x[:tokens].double() @ w.double().T + bias.double() + update + added
            assert_reduction(out, x[:tokens] @ w.T + bias + update.to(dtype) + added, true, dtype)
    with pytest.raises(ShapeError):
        lora_linear(
            x, pack(w[:, :32].contiguous()), bias, torch.empty(70, 64, dtype=dtype), pool, routed(mapping, pool)
        )


def test_an_augmented_weight_gives_base_and_update(backend: str) -> None:
    from uma_kernels.lora import triton_site

    k, slices, dtype = 96, (64, 32), torch.bfloat16
    adapters = [random_factors(k, slices, (16 + 4 * i, 8), dtype) for i in range(3)]
    pool = make_pool(k, slices, adapters, dtype)
    weight = (torch.randn(sum(slices), k) * k**-0.5).to(dtype)
    augmented = triton_site.AugmentedWeight(weight, pool)
    augmented.load()
    mapping = [t % 4 - 1 for t in range(20)]
    x_aug = torch.full((20, k + augmented.spare), float("nan"), dtype=dtype)
    x_aug[:, :k] = torch.randn(20, k).to(dtype)
    out = torch.full((20, sum(slices)), float("nan"), dtype=dtype)
    augmented.run(x_aug, out, routed(mapping, pool), plans.pair_plan(20, 2))
    x = x_aug[:, :k]
    update = true_update(x, slices, adapters, mapping, torch.float64)
    true = x.double() @ weight.double().T + update
    assert_reduction(out, (x @ weight.T + update.to(dtype)).to(dtype), true, dtype)


@gpu_only
@pytest.mark.parametrize("tokens", [7, 64, 2048])
def test_a_captured_graph_sees_changed_adapters_and_mappings(backend: str, tokens: int) -> None:
    k, slices, dtype = 1024, (512, 256, 256), torch.bfloat16
    adapters = [random_factors(k, slices, (16, 8, 16), dtype) for _ in range(4)]
    pool = make_pool(k, slices, adapters, dtype)
    routing = DeviceRouting(tokens, pool.num_slots, [pool])
    mapping = torch.zeros(tokens, dtype=torch.int32)
    x, out = torch.randn(tokens, k).to(dtype), torch.zeros(tokens, 1024, dtype=dtype)

    def step() -> None:
        out.zero_()
        routing.build(mapping)
        lora_merged(x, out, pool, routing)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for change in range(4):
        mapping.copy_(torch.randint(-1, 4, (tokens,), dtype=torch.int32))
        adapters[change] = random_factors(k, slices, (40, 0, 3), dtype)
        pool.load(change, adapters[change])
        if change == 2:
            adapters[0] = [None, None, None]
            pool.unload(0)
        graph.replay()
        replayed = out.clone()
        step()
        assert_invariant(replayed, out)
        rows = range(0, tokens, max(1, tokens // 50))
        chosen = [int(mapping[t]) for t in rows]
        some = x[list(rows)]
        true = true_update(some, slices, adapters, chosen, torch.float64)
        assert_reduction(replayed[list(rows)], true.to(dtype), true, dtype)


@gpu_only
def test_a_step_never_reads_the_device_back(backend: str) -> None:
    pool = make_pool(256, (64,), [random_factors(256, (64,), (8,))], torch.float32)
    routing = DeviceRouting(64, 1, [pool])
    mapping, x, out = torch.zeros(64, dtype=torch.int32), torch.randn(64, 256), torch.zeros(64, 64)
    routing.build(mapping)
    lora_merged(x, out, pool, routing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing.build(mapping)
        lora_merged(x, out, pool, routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_a_hundred_launches_give_the_same_bits(backend: str) -> None:
    """Programs of one launch wait for each other: what is lost now and then shows here."""
    from uma_kernels.lora import triton_site

    k, slices, dtype = 4096, (1024, 256, 256), torch.bfloat16
    adapters = [random_factors(k, slices, (16, 16, 16), dtype) for _ in range(8)]
    pool = make_pool(k, slices, adapters, dtype)
    x = torch.randn(32, k).to(dtype)
    weight = torch.randn(sum(slices), k).to(dtype)
    routing = routed([t % 9 - 1 for t in range(32)], pool)
    plan = plans.SitePlan(block_n=32, base_k=128)
    outs = [torch.zeros(32, sum(slices), dtype=dtype) for _ in range(4)]
    run_with(True, x, outs[0], pool, routing)
    triton_site.site_decode(x, weight, None, outs[1], pool, routing, plan)
    for _ in range(100):
        outs[2].zero_()
        run_with(True, x, outs[2], pool, routing)
        triton_site.site_decode(x, weight, None, outs[3], pool, routing, plan)
        assert_invariant(outs[2], outs[0])
        assert_invariant(outs[3], outs[1])


@gpu_only
def test_both_forms_of_a_decode_site_have_the_same_bits(backend: str) -> None:
    """`audit` takes the one launch for few rows, the augmented product for others (plans.site_form)."""
    k, slices, dtype = 4096, (1024, 256, 256), torch.bfloat16
    adapters = [random_factors(k, slices, (16, 8, 40), dtype) for _ in range(4)]
    pool = make_pool(k, slices, adapters, dtype)
    x, weight = torch.randn(64, k).to(dtype), pack((torch.randn(sum(slices), k) * k**-0.5).to(dtype))
    for tokens in (1, 16, 64):
        routing, outs = routed([t % 5 - 1 for t in range(tokens)], pool), []
        for form in (plans.AUGMENTED, plans.DECODE):
            outs.append(torch.empty(tokens, sum(slices), dtype=dtype))
            by_form(form, x[:tokens], weight, None, outs[-1], pool, routing)
        assert_invariant(outs[1], outs[0])
