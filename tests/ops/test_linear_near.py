"""Matrix products with activations in 16 bits: their arithmetic against fp64, its edges, and batch invariance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.linear import BlockQuantized, PackedLinear, linear, pack
from uma_kernels.linear.cases import CASES, FORMATS, LinearCase, WeightFormat
from uma_kernels.linear.reference import linear_near, quantize_rows
from uma_kernels.testing import assert_exact, assert_invariant, assert_near, assert_reduction, with_sentinels

cpp_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp")], indirect=True)
QUANTIZED = [f for f in FORMATS if f.bits != 32]
by_format = pytest.mark.parametrize("weight_format", QUANTIZED, ids=lambda f: f.id)
PAIRS = [(case, f) for case in CASES if case.width % 32 == 0 for f in QUANTIZED]
by_pair = pytest.mark.parametrize(("case", "weight_format"), PAIRS, ids=[f"{c.id}-{f.id}" for c, f in PAIRS])


@pytest.fixture(autouse=True)
def _has_near(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.skip("triton dequantises when it packs: it has no `near`")


def near(x: torch.Tensor, weight: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear(x, weight, bias, precision="near")


def quantized(weight_format: WeightFormat, rows: int, width: int) -> BlockQuantized:
    weight = weight_format.random(rows, width)
    assert isinstance(weight, BlockQuantized)
    return weight


def dense(weight: BlockQuantized) -> torch.Tensor:
    """The weight in fp64, rounded nowhere."""
    rows, width = weight.shape
    values = weight.unpacked().reshape(rows, -1, weight.block_size).double() * weight.scales.double()[:, :, None]
    if weight.mins is not None:
        values = values + weight.mins.double()[:, :, None]
    return values.reshape(rows, width)


def rounded(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x as its 16-bit integers say, in fp64."""
    quants, scales, _ = quantize_rows(x, block_size)
    return (quants * scales.double()[:, :, None]).reshape(x.shape)


@by_pair
def test_near_matches_the_fp64_product_of_the_rounded_rows(
    case: LinearCase, weight_format: WeightFormat, backend: str
) -> None:
    weight = quantized(weight_format, case.rows, case.width)
    x = torch.randn(case.tokens, case.width) * torch.rand(case.tokens, 1).mul(20).exp2()
    bias = torch.randn(case.rows) if case.bias else None
    true = F.linear(rounded(x, weight.block_size), dense(weight), None if bias is None else bias.double())
    plain = torch.empty(case.tokens, case.rows)
    linear_near(x, weight, bias, plain)
    with with_sentinels((case.tokens, case.rows)) as out:
        linear(x, pack(weight), bias, out, "near")
        assert_reduction(out, plain, true)


@by_pair
def test_near_is_near_the_true_product(case: LinearCase, weight_format: WeightFormat, backend: str) -> None:
    weight = quantized(weight_format, case.rows, case.width)
    x = torch.randn(case.tokens, case.width)
    assert_near(near(x, pack(weight)), F.linear(x.double(), dense(weight)))


@by_format
def test_both_precisions_take_the_same_packed_weight(weight_format: WeightFormat, backend: str) -> None:
    packed, x = pack(weight_format.random(33, 96)), torch.randn(9, 96)
    before = linear(x, packed)
    assert not torch.equal(near(x, packed), before)
    assert_exact(linear(x, packed, precision="exact"), before)


def test_a_dense_weight_has_one_precision(backend: str) -> None:
    packed, x = pack(torch.randn(33, 70)), torch.randn(9, 70)
    assert_exact(near(x, packed), linear(x, packed))


@pytest.mark.parametrize("precision", ["guess", "", "EXACT", None])
def test_another_precision_is_refused(precision: str, backend: str) -> None:
    with pytest.raises(ValueError, match="`precision`"):
        linear(torch.zeros(1, 32), pack(torch.zeros(1, 32)), precision=precision)


def test_rows_round_to_the_nearest_integer_and_ties_to_even(backend: str) -> None:
    weight = BlockQuantized(8, 32, torch.eye(32, dtype=torch.int8), torch.ones(32, 1), None)
    x = torch.zeros(2, 32)
    x[0, :9] = torch.tensor([32767.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.50001, -7.49999, -32766.5])
    x[1, :4] = torch.tensor([2.0, 1.0, -2.0, 3.0e-5])
    expected = torch.zeros(2, 32)
    expected[0, :9] = torch.tensor([32767.0, 0.0, 2.0, 2.0, 0.0, -2.0, 1.0, -7.0, -32766.0])
    expected[1, :4] = torch.tensor([32767.0, 16384.0, -32767.0, 0.0]) * (torch.tensor(2.0) / 32767)
    for tokens in (2, 20):
        many = x.repeat(tokens // 2, 1)
        assert_exact(near(many, pack(weight)), expected.repeat(tokens // 2, 1))


@by_format
def test_the_largest_sums_do_not_overflow(weight_format: WeightFormat, backend: str) -> None:
    weight = quantized(weight_format, 33, 96)
    for quant in (0xFF,) if weight.bits == 4 else (127, -128):
        extreme = weight.quants.fill_(quant)
        assert extreme is weight.quants
        for sign in (1.0, -1.0):
            x = torch.full((7, 96), sign)
            assert_near(near(x, pack(weight)), F.linear(x.double(), dense(weight)))


@by_format
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_zeros_give_the_bias(weight_format: WeightFormat, tokens: int, backend: str) -> None:
    packed, bias = pack(weight_format.random(33, 96)), torch.randn(33)
    x = torch.zeros(tokens, 96)
    assert_exact(near(x, packed, bias), bias.expand(tokens, 33))
    x[:, :32], x[:, 32:64] = 2.0**-91, -1e-40  # below what counts
    assert_exact(near(x, packed, bias), bias.expand(tokens, 33))


@by_format
@pytest.mark.parametrize("power", [-60, 110])
def test_tiny_and_huge_rows_keep_their_precision(weight_format: WeightFormat, power: int, backend: str) -> None:
    """A power of two moves every exponent and no digit."""
    packed, x = pack(weight_format.random(33, 96)), torch.randn(9, 96)
    assert_invariant(near(x * 2.0**power, packed), near(x, packed) * 2.0**power)


@by_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not(
    weight_format: WeightFormat, bad: float, backend: str
) -> None:
    packed, x, bias = pack(weight_format.random(33, 96)), torch.randn(20, 96), torch.randn(33)
    expected = near(x, packed, bias)
    for t, k in ((0, 0), (7, 50), (19, 95)):
        x[t, k] = bad
    out = near(x, packed, bias)
    whole = [t for t in range(20) if t not in (0, 7, 19)]
    assert torch.isnan(out[[0, 7, 19]]).all()
    assert_invariant(out[whole], expected[whole])
    assert torch.isnan(near(x[7:8], packed, bias)).all()


@cpp_only
@by_format
def test_a_row_has_the_same_bits_in_every_batch(weight_format: WeightFormat, backend: str) -> None:
    rows, width = 70, 1216  # a narrow last panel, and more than one slice of K
    packed = pack(weight_format.random(rows, width))
    x, bias = torch.randn(70, width), torch.randn(rows)
    alone = torch.cat([near(x[t : t + 1], packed, bias) for t in range(len(x))])
    assert_invariant(near(x, packed, bias), alone)
    for tokens in range(2, 28):
        assert_invariant(near(x[5 : 5 + tokens], packed, bias), alone[5 : 5 + tokens])
    order = torch.randperm(len(x))
    assert_invariant(near(x[order], packed, bias), alone[order])
    many = torch.randint(0, len(x), (600,))  # more rows than are prepared at a time
    assert_invariant(near(x[many], packed, bias), alone[many])


def variants(set_variant: Callable[[int], None], values: tuple[int, ...], tokens: int) -> None:
    """The same products under each value of a setting have the same bits."""
    x = torch.randn(tokens, 608)
    for weight_format in QUANTIZED:
        packed = pack(weight_format.random(161, 608))
        results = []
        for value in values:
            set_variant(value)
            results.append(near(x, packed))
        for result in results[1:]:
            assert_invariant(result, results[0])


@cpp_only
@pytest.mark.parametrize("tokens", [1, 5, 40, 600])
def test_the_number_of_threads_changes_no_bit(tokens: int, backend: str) -> None:
    extension = dispatch.extension()
    before = extension.get_num_threads()
    try:
        variants(extension.set_num_threads, (1, 2, 5), tokens)
    finally:
        extension.set_num_threads(before)


@cpp_only
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 40])
def test_vnni_instructions_change_no_bit(tokens: int, backend: str) -> None:
    """Where the CPU has them; where not, both calls take the same path."""
    extension = dispatch.extension()
    try:
        variants(lambda enabled: extension.set_vnni(bool(enabled)), (1, 0), tokens)
        assert not extension.vnni_enabled()
    finally:
        extension.set_vnni(True)
    assert extension.vnni_enabled() == extension.vnni_available()
