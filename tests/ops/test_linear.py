"""Matrix products with packed weights: every format and back end against fp64, exact packing, and batch invariance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BACKENDS, skip_in_interpreter
from uma_kernels import dispatch
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.check import ShapeError
from uma_kernels.linear import BlockQuantized, gated_linear, gather_rows, linear, pack
from uma_kernels.linear.cases import CASES, FORMATS, LinearCase, WeightFormat
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction, with_sentinels

# Bitwise promises hold for our own kernels: torch's own products depend on the batch.
invariant = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"], indirect=True)
cpp_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp")], indirect=True)

by_id = {"ids": lambda c: c.id}


def dense(weight: torch.Tensor | BlockQuantized) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, BlockQuantized) else weight


def fits(case: LinearCase, weight_format: WeightFormat) -> bool:
    return weight_format.bits == 32 or case.width % 32 == 0


PAIRS = [(case, f) for case in CASES for f in FORMATS if fits(case, f)]


@pytest.mark.parametrize(("case", "weight_format"), PAIRS, ids=[f"{c.id}-{f.id}" for c, f in PAIRS])
def test_linear_matches_fp64(case: LinearCase, weight_format: WeightFormat, backend: str) -> None:
    if weight_format.bits != 32:  # dequantised when packed: one format says it all
        skip_in_interpreter(backend, case.rows * case.width, 3000)
    skip_in_interpreter(backend, case.rows * case.width + case.tokens * (case.rows + case.width), 100_000)
    weight = weight_format.random(case.rows, case.width)
    x = torch.randn(case.tokens, case.width)
    bias = torch.randn(case.rows) if case.bias else None
    true = F.linear(x.double(), dense(weight).double(), None if bias is None else bias.double())
    with with_sentinels((case.tokens, case.rows)) as out:
        linear(x, pack(weight), bias, out)
        assert_reduction(out, F.linear(x, dense(weight), bias), true)


@pytest.mark.parametrize("weight_format", FORMATS, **by_id)
def test_packing_keeps_every_value(weight_format: WeightFormat, backend: str) -> None:
    for rows, width in ((1, 32), (32, 64), (33, 96), (70, 608)):
        weight = weight_format.random(rows, width)
        ids = torch.cat((torch.arange(rows), torch.tensor([rows - 1, 0, 0])))
        with with_sentinels((len(ids), width)) as out:
            gather_rows(pack(weight), ids, out)
            assert_exact(out, dense(weight)[ids])


@pytest.mark.parametrize("weight_format", FORMATS, **by_id)
@pytest.mark.parametrize("width", [32, 96])
def test_the_identity_gives_back_the_weight(weight_format: WeightFormat, width: int, backend: str) -> None:
    """Few rows and many take different paths through the kernel: both must dequantise to the same bits."""
    weight = weight_format.random(45, width)
    packed = pack(weight)
    identity = torch.eye(width)
    assert_exact(linear(identity, packed).T.contiguous(), dense(weight))
    for row in (0, width - 1):
        assert_exact(linear(identity[row : row + 1], packed)[0], dense(weight)[:, row])


@invariant
@pytest.mark.parametrize("weight_format", FORMATS, **by_id)
def test_a_row_has_the_same_bits_in_every_batch(weight_format: WeightFormat, backend: str) -> None:
    skip_in_interpreter(backend, 70 * 1216)  # test_half_precision has smaller ones
    rows, width = 70, 1216  # a narrow last panel, and more than one slice of K
    packed = pack(weight_format.random(rows, width))
    x, bias = torch.randn(70, width), torch.randn(rows)
    alone = torch.cat([linear(x[t : t + 1], packed, bias) for t in range(len(x))])
    assert_invariant(linear(x, packed, bias), alone)
    for tokens in range(2, 28):
        assert_invariant(linear(x[5 : 5 + tokens], packed, bias), alone[5 : 5 + tokens])
    order = torch.randperm(len(x))
    assert_invariant(linear(x[order], packed, bias), alone[order])


@pytest.mark.parametrize("weight_format", FORMATS, **by_id)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_rows_of_out_may_lie_apart(weight_format: WeightFormat, tokens: int, backend: str) -> None:
    """Columns beside `out` keep what they hold, and `out` has the same bits as when its rows touch."""
    packed, x, bias = pack(weight_format.random(45, 96)), torch.randn(tokens, 96), torch.randn(45)
    for precision in ("exact", "near"):
        wide = torch.full((tokens, 64), 7.0)
        linear(x, packed, bias, wide[:, 10:55], precision)
        assert_exact(wide[:, 10:55].contiguous(), linear(x, packed, bias, precision=precision))
        assert (wide[:, :10] == 7).all()
        assert (wide[:, 55:] == 7).all()


@invariant
def test_neighbours_that_overflow_do_not_touch_a_row(backend: str) -> None:
    packed = pack(torch.randn(33, 96))
    x = torch.randn(20, 96)
    expected = linear(x, packed)[7].clone()
    x[:7], x[8:] = float("inf"), float("nan")
    assert_invariant(linear(x, packed)[7], expected)


@pytest.mark.parametrize("mode", ["audit", "fast"])
@pytest.mark.parametrize("weight_format", FORMATS, **by_id)
def test_a_gated_product_is_a_product_and_its_activation(weight_format: WeightFormat, mode: str, backend: str) -> None:
    packed, x, bias = pack(weight_format.random(66, 64), mode=mode), torch.randn(5, 64), torch.randn(66)
    for activation in (swiglu, geglu_tanh):
        for precision in ("exact", "near"):
            expected = activation(linear(x, packed, bias, precision=precision))
            with with_sentinels((5, 33)) as out:
                gated_linear(x, packed, activation, bias, out, precision)
                assert_exact(out, expected)


def test_a_gated_product_refuses_what_does_not_fit(backend: str) -> None:
    packed, x = pack(torch.randn(6, 7)), torch.zeros(2, 7)
    for bad_x, weight, bias, out in (
        (torch.zeros(2, 6), packed, None, None),
        (x.double(), packed, None, None),
        (x, pack(torch.randn(5, 7)), None, None),
        (x, packed, torch.zeros(3), None),
        (x, packed, None, torch.zeros(2, 6)),
        (x, packed, None, torch.zeros(2, 5)[:, :3]),
    ):
        with pytest.raises(ShapeError):
            gated_linear(bad_x, weight, swiglu, bias, out)
    with pytest.raises(ValueError):
        gated_linear(x, packed, F.silu)
    with pytest.raises(ValueError):
        gated_linear(x, packed, swiglu, precision="other")


@cpp_only
@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
def test_the_number_of_threads_changes_no_bit(tokens: int, backend: str) -> None:
    extension = dispatch.extension()
    before = extension.get_num_threads()
    x = torch.randn(tokens, 608)
    try:
        for weight_format in FORMATS:
            packed = pack(weight_format.random(161, 608))
            results = []
            for threads in (1, 2, 5):
                extension.set_num_threads(threads)
                results.append(linear(x, packed))
            assert_invariant(results[1], results[0])
            assert_invariant(results[2], results[0])
    finally:
        extension.set_num_threads(before)


@cpp_only
def test_a_packed_quantised_weight_stays_small(backend: str) -> None:
    weight = WeightFormat(4, 32, True).random(576, 576)
    assert isinstance(weight, BlockQuantized)
    assert pack(weight).nbytes == weight.quants.nbytes + weight.scales.nbytes * 2
    assert pack(weight).shape == (576, 576)


def test_a_packed_weight_does_not_follow_its_source(backend: str) -> None:
    weight = torch.randn(5, 7)
    packed, x = pack(weight), torch.randn(3, 7)
    before = linear(x, packed)
    weight.zero_()
    assert_exact(linear(x, packed), before)


def test_a_packed_weight_belongs_to_the_back_end_it_was_packed_for() -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    with dispatch.use_backend("reference"):
        packed = pack(weight)
    assert packed.backend == "reference"
    assert_exact(linear(x, packed), F.linear(x, weight))


def test_wrong_shapes_and_dtypes_are_refused(backend: str) -> None:
    packed = pack(torch.randn(5, 7))
    x = torch.zeros(2, 7)
    for bad_x, bias, out in (
        (torch.zeros(2, 6), None, None),
        (x.double(), None, None),
        (torch.zeros(7, 2).T, None, None),
        (x, torch.zeros(4), None),
        (x, None, torch.zeros(2, 4)),
        (x, None, torch.zeros(5, 2).T),
        (x, None, torch.zeros(5).expand(2, 5)),
    ):
        with pytest.raises(ShapeError):
            linear(bad_x, packed, bias, out)
    for bad_weight in (torch.zeros(0, 7), torch.zeros(5, 0), torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5)):
        with pytest.raises(ShapeError):
            pack(bad_weight)


@pytest.mark.parametrize("bad", [-1, 5])
def test_rows_out_of_range_are_refused(bad: int, backend: str) -> None:
    packed = pack(torch.randn(5, 7))
    with pytest.raises(IndexError):
        gather_rows(packed, torch.tensor([0, bad]))
    with pytest.raises(ShapeError):
        gather_rows(packed, torch.tensor([0], dtype=torch.int32))
    assert gather_rows(packed, torch.zeros(0, dtype=torch.int64)).shape == (0, 7)
