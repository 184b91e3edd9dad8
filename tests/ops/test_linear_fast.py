"""Matrix products with activations in 8 bits: their arithmetic against fp64, its edges, and batch invariance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BACKENDS
from uma_kernels import dispatch
from uma_kernels.linear import BlockQuantized, PackedLinear, linear, pack
from uma_kernels.linear.cases import CASES, FORMATS, LinearCase, WeightFormat
from uma_kernels.linear.reference import linear_fast, quantize_rows, split_outliers
from uma_kernels.testing import assert_exact, assert_fast, assert_invariant, assert_reduction, with_sentinels

# triton keeps every weight dense, and has no precisions.
with_blocks = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"], indirect=True)
cpp_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp")], indirect=True)
QUANTIZED = [f for f in FORMATS if f.bits != 32]
by_format = pytest.mark.parametrize("weight_format", QUANTIZED, ids=lambda f: f.id)
# Every case in some formats, every format in some cases; test_random_shapes draws others.
PAIRS = [
    (case, f)
    for i, case in enumerate(case for case in CASES if case.width % 32 == 0)
    for j, f in enumerate(QUANTIZED)
    if (i + j) % 4 == 0
]
by_pair = pytest.mark.parametrize(("case", "weight_format"), PAIRS, ids=[f"{c.id}-{f.id}" for c, f in PAIRS])
ROWS = (1, 2, 3, 5, 8, 64, 257)


def fast(x: torch.Tensor, weight: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear(x, weight, bias, precision="fast")


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
    """x as its 8-bit integers and its outliers say, in fp64."""
    rest, outliers = split_outliers(x, block_size)
    quants, scales, _ = quantize_rows(rest, block_size, 127.0)
    return (quants * scales.double()[:, :, None]).reshape(x.shape) + outliers


def spiky(tokens: int, width: int) -> torch.Tensor:
    """Rows like a model's: every fourth value in the mean is several times, sometimes many times, as large as the others."""
    x = torch.randn(tokens, width)
    return torch.where(torch.rand(tokens, width) < 0.03, x * torch.randn(tokens, width).mul(3).exp2() * 4, x)


def expect(x: torch.Tensor, weight: BlockQuantized, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """`out` is the fp64 product of the rounded rows, as near as fp32 sums in the specified order are."""
    plain = torch.empty(out.shape)
    linear_fast(x, weight, bias, plain)
    wide_bias = None if bias is None else bias.double()
    assert_reduction(out, plain, F.linear(rounded(x, weight.block_size), dense(weight), wide_bias))


@with_blocks
@by_pair
def test_fast_matches_the_fp64_product_of_the_rounded_rows(
    case: LinearCase, weight_format: WeightFormat, backend: str
) -> None:
    weight = quantized(weight_format, case.rows, case.width)
    x = spiky(case.tokens, case.width) * torch.rand(case.tokens, 1).mul(20).exp2()
    bias = torch.randn(case.rows) if case.bias else None
    with with_sentinels((case.tokens, case.rows)) as out:
        linear(x, pack(weight), bias, out, "fast")
        expect(x, weight, bias, out)


@with_blocks
@by_format
@pytest.mark.parametrize("tokens", [1, 13, 129])
def test_fast_is_near_the_true_product(tokens: int, weight_format: WeightFormat, backend: str) -> None:
    weight = quantized(weight_format, 70, 608)
    for x in (torch.randn(tokens, 608), spiky(tokens, 608)):
        assert_fast(fast(x, pack(weight)), x, dense(weight), weight.block_size)


@with_blocks
@by_format
def test_an_outlier_is_multiplied_exactly(weight_format: WeightFormat, backend: str) -> None:
    """One value alone in its block, at every place: nothing is rounded but the product."""
    weight = quantized(weight_format, 45, 96)
    x = torch.diag(torch.randn(96)) * 1e4
    true = F.linear(x.double(), dense(weight))
    for tokens in (1, 2, 96):
        assert_reduction(fast(x[:tokens], pack(weight)), F.linear(x[:tokens], dense(weight).float()), true[:tokens])


@with_blocks
def test_what_counts_as_an_outlier(backend: str) -> None:
    """Twice the next is one, less is not, nor are two equal values; of a block of zeros no scale is left."""
    weight = BlockQuantized(8, 16, torch.eye(32, dtype=torch.int8), torch.ones(32, 2), None)
    x = torch.zeros(3, 32)
    x[0, [3, 4, 20, 21]] = torch.tensor([-2.0, 1.0, 1.999, 1.0])
    x[1, [3, 4, 20, 21]] = torch.tensor([5.0, -5.0, 1e30, 1e-30])
    x[2, [0, 31]] = torch.tensor([1.2345, 3e-40])
    unit = torch.tensor(1.999) / 127
    expected = torch.zeros(3, 32)
    expected[0, [3, 4, 20, 21]] = torch.tensor([-2.0, 127 * (torch.tensor(1.0) / 127), 127 * unit, 64 * unit])
    expected[1, [3, 4, 20]] = torch.tensor([5.0, -5.0, 1e30])
    expected[2, 0] = 1.2345
    out = fast(x, pack(weight))
    keep = torch.ones(3, 32, dtype=torch.bool)
    keep[1, [3, 4, 21]] = False  # 127 * (5 / 127) and (1e-30) are met but for the last bit
    assert_exact(out[keep], expected[keep])
    assert_reduction(out, expected, expected.double())


@cpp_only
def test_random_shapes(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(30):
        weight_format = QUANTIZED[draw(0, len(QUANTIZED) - 1)]
        tokens, rows = draw(1, 40), draw(1, 100)
        width = weight_format.block_size * draw(1, 44)
        weight, x = quantized(weight_format, rows, width), spiky(tokens, width)
        bias = torch.randn(rows) if draw(0, 1) else None
        wide = torch.full((tokens + 1, rows + draw(0, 40)), -7.0)
        column = draw(0, wide.shape[1] - rows)
        before = wide.clone()
        linear(x, pack(weight), bias, wide[:tokens, column : column + rows], "fast")
        expect(x, weight, bias, wide[:tokens, column : column + rows])
        before[:tokens, column : column + rows] = wide[:tokens, column : column + rows]
        assert_exact(wide, before)


@with_blocks
@by_format
def test_all_precisions_take_the_same_packed_weight(weight_format: WeightFormat, backend: str) -> None:
    packed, x = pack(weight_format.random(33, 96)), torch.randn(9, 96)
    exact, near = linear(x, packed), linear(x, packed, precision="near")
    assert not torch.equal(fast(x, packed), exact)
    assert not torch.equal(fast(x, packed), near)
    assert_exact(linear(x, packed, precision="exact"), exact)


def test_a_dense_weight_has_one_precision(backend: str) -> None:
    packed, x = pack(torch.randn(33, 70)), torch.randn(9, 70)
    assert_exact(fast(x, packed), linear(x, packed))


@with_blocks
def test_rows_round_to_the_nearest_integer_and_ties_to_even(backend: str) -> None:
    weight = BlockQuantized(8, 32, torch.eye(32, dtype=torch.int8), torch.ones(32, 1), None)
    x = torch.zeros(2, 32)
    x[0, :9] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.50001, -7.49999, -126.5])
    x[1, :4] = torch.tensor([2.0, 1.0, -2.0, 0.0078])
    expected = torch.zeros(2, 32)
    expected[0, :9] = torch.tensor([127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 1.0, -7.0, -126.0])
    expected[1, :4] = torch.tensor([127.0, 64.0, -127.0, 0.0]) * (torch.tensor(2.0) / 127)
    for tokens in (2, 20):
        many = x.repeat(tokens // 2, 1)
        assert_exact(fast(many, pack(weight)), expected.repeat(tokens // 2, 1))


@with_blocks
@by_format
def test_the_largest_sums_do_not_overflow(weight_format: WeightFormat, backend: str) -> None:
    """Every integer is a power of two times a small one: the result has no rounding, and must be met exactly."""
    weight = quantized(weight_format, 33, 96)
    weight.scales.fill_(2.0)
    if weight.mins is not None:
        weight.mins.fill_(-0.5)
    sign = torch.ones(96)
    sign[1::2] = -1.0
    for quant in (0xFF, 0x00, 0xF0) if weight.bits == 4 else (127, -128):
        weight.quants.fill_(quant)
        for x in (torch.full((96,), 127.0), torch.full((96,), -127.0), 127.0 * sign, -127.0 * sign):
            true = F.linear(x[None].double(), dense(weight)).float()
            for tokens in (1, 2, 7, 20):
                assert_exact(fast(x.expand(tokens, 96).contiguous(), pack(weight)), true.expand(tokens, 33))


@with_blocks
@by_format
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_zeros_give_the_bias(weight_format: WeightFormat, tokens: int, backend: str) -> None:
    packed, bias = pack(weight_format.random(33, 96)), torch.randn(33)
    x = torch.zeros(tokens, 96)
    assert_exact(fast(x, packed, bias), bias.expand(tokens, 33))
    x[:, :32], x[:, 32:64] = 2.0**-91, -1e-40  # below what counts
    assert_exact(fast(x, packed, bias), bias.expand(tokens, 33))


@with_blocks
@by_format
@pytest.mark.parametrize("power", [-60, 110])
def test_tiny_and_huge_rows_keep_their_precision(weight_format: WeightFormat, power: int, backend: str) -> None:
    """A power of two moves every exponent and no digit."""
    packed, x = pack(weight_format.random(33, 96)), torch.randn(9, 96)
    assert_invariant(fast(x * 2.0**power, packed), fast(x, packed) * 2.0**power)


@with_blocks
@by_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not(
    weight_format: WeightFormat, bad: float, backend: str
) -> None:
    packed, x, bias = pack(weight_format.random(33, 96)), torch.randn(20, 96), torch.randn(33)
    expected = fast(x, packed, bias)
    for t, k in ((0, 0), (7, 50), (19, 95)):
        x[t, k] = bad
    out = fast(x, packed, bias)
    whole = [t for t in range(20) if t not in (0, 7, 19)]
    assert torch.isnan(out[[0, 7, 19]]).all()
    assert_invariant(out[whole], expected[whole])
    assert torch.isnan(fast(x[7:8], packed, bias)).all()


@cpp_only
@by_format
def test_a_row_has_the_same_bits_in_every_batch(weight_format: WeightFormat, backend: str) -> None:
    rows, width = 70, 1312  # a narrow last panel, and more than one slice of K
    packed = pack(weight_format.random(rows, width))
    x, bias = spiky(max(ROWS), width), torch.randn(rows)
    alone = torch.cat([fast(x[t : t + 1], packed, bias) for t in range(len(x))])
    for tokens in (*ROWS, *range(9, 20)):
        assert_invariant(fast(x[:tokens], packed, bias), alone[:tokens])
    order = torch.randperm(len(x))
    assert_invariant(fast(x[order], packed, bias), alone[order])
    many = torch.randint(0, len(x), (600,))  # more rows than are prepared at a time
    assert_invariant(fast(x[many], packed, bias), alone[many])


@cpp_only
@by_format
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_a_slice_of_a_wider_matrix_gets_the_same_bits(weight_format: WeightFormat, tokens: int, backend: str) -> None:
    packed, x, bias = pack(weight_format.random(45, 1312)), spiky(tokens, 1312), torch.randn(45)
    wide = torch.full((tokens, 128), -7.0)
    linear(x, packed, bias, wide[:, 64:109], "fast")
    assert_invariant(wide[:, 64:109], fast(x, packed, bias))
    assert (wide[:, :64] == -7.0).all()
    assert (wide[:, 109:] == -7.0).all()


def variants(set_variant: Callable[[int], None], values: tuple[int, ...], tokens: int) -> None:
    """The same products under each value of a setting have the same bits."""
    x = spiky(tokens, 608)
    for weight_format in QUANTIZED:
        packed = pack(weight_format.random(161, 608))
        results = []
        for value in values:
            set_variant(value)
            results.append(fast(x, packed))
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
    finally:
        extension.set_vnni(True)
