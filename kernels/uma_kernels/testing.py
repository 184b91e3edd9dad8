"""How right an op must be: six tolerance classes, poisoned memory, sentinels, and the form of a case table.

Knows how results are compared; does not know any op. No test file holds a literal tolerance.

EXACT       equality: moves, indices, scheduling.
REDUCTION   max error against fp64 at most twice torch's own error in that dtype, with a floor per dtype.
RANKING     scores within REDUCTION, order equal wherever two scores differ by more than the floor.
INVARIANT   bitwise equality between two ways to compute the same row.
NEAR        max error against fp64 at most 1e-4 of the true result's largest magnitude: arithmetic that rounds its inputs
            to 16 bits on purpose.
FAST        error of a product against fp64 at most six times what rounding its rows to 8 bits, outliers apart, is expected to do.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils._device import _device_constructors

__all__ = [
    "assert_best",
    "assert_exact",
    "assert_fast",
    "assert_invariant",
    "assert_near",
    "assert_ranking",
    "assert_reduction",
    "poisoned_empty",
    "with_sentinels",
]

# Smallest error that counts, relative to the largest magnitude of the true result: a few units of the dtype's precision,
# for cases where torch's own error happens to be zero.
FLOOR = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# Largest error of NEAR relative to the largest magnitude of the true result. Rounding to 16 bits moves each input by at most
# 2^-16 of the largest of its block; over a row these errors add up like noise, not in a line.
NEAR = 1e-4
# FAST: in 8 bits a value moves by at most half a step of max |x| / 127 of its block, by step / sqrt(12) in the mean. The errors
# of a row's values do not know of each other, so that of a product has the deviation that assert_fast computes; six of them
# are met by chance once in 10^9 elements, and what a wrong scale or a wrong sum does exceeds them by far.
FAST_LEVELS, FAST_DEVIATIONS = 127, 6.0
SENTINEL = -7.25e8


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} is not {list(expected.shape)}"
    assert torch.equal(actual, expected), f"{(actual != expected).sum().item()} of {actual.numel()} elements differ"


def assert_invariant(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise equality, NaN refused."""
    assert not torch.isnan(actual).any(), "NaN in a result"
    assert_exact(actual, expected)


def reduction_bound(
    torch_result: torch.Tensor,
    true: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    terms: torch.Tensor | None = None,
) -> float:
    """The largest absolute error REDUCTION allows: twice torch's own, or the floor of the dtype times the magnitude.

    Of few results, all may be small because what they add up cancels, and torch's own error small by chance: `terms`, the sums
    of the magnitudes of what was added, is then what rounding errors are measured by.
    """
    if true.numel() == 0:
        return 0.0
    own = (torch_result.double() - true.double()).abs().max().item()
    return max(2.0 * own, FLOOR[dtype] * (true if terms is None else terms).double().abs().max().item())


def assert_reduction(
    actual: torch.Tensor,
    torch_result: torch.Tensor,
    true: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    terms: torch.Tensor | None = None,
) -> None:
    """`actual` is as near to the fp64 result `true` as REDUCTION asks, given torch's own result in `dtype`; `terms`: see
    `reduction_bound`."""
    assert actual.shape == true.shape, f"shape {list(actual.shape)} is not {list(true.shape)}"
    if true.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "a result is not finite"
    error = (actual.double() - true.double()).abs().max().item()
    bound = reduction_bound(torch_result, true, dtype, terms)
    assert error <= bound, f"max error {error:.3e} exceeds {bound:.3e}"


def assert_near(actual: torch.Tensor, true: torch.Tensor, products: int = 1) -> None:
    """`actual` is as near to the fp64 result `true` as NEAR asks; of `products` in a row, each may add its error."""
    assert actual.shape == true.shape, f"shape {list(actual.shape)} is not {list(true.shape)}"
    if true.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "a result is not finite"
    error = (actual.double() - true.double()).abs().max().item()
    bound = products * NEAR * true.double().abs().max().item()
    assert error <= bound, f"max error {error:.3e} exceeds {bound:.3e}"


def assert_fast(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, block: int) -> None:
    """`actual` is as near to the fp64 product of `x` [T, K] and `weight` [N, K], quantised in blocks of `block`, as FAST asks
    of every element."""
    true = x.double() @ weight.double().T
    assert actual.shape == true.shape, f"shape {list(actual.shape)} is not {list(true.shape)}"
    if true.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "a result is not finite"
    top = x.double().reshape(len(x), -1, block).abs().topk(2, dim=-1).values
    outlier = top[:, :, 0] >= 2 * top[:, :, 1]
    steps = torch.where(outlier, top[:, :, 1], top[:, :, 0]) / FAST_LEVELS
    energy = weight.double().square().reshape(len(weight), -1, block).sum(dim=-1)
    bound = FAST_DEVIATIONS * (steps.square() @ energy.T / 12).sqrt() + FLOOR[torch.float32] * true.abs().max()
    error = (actual.double() - true).abs()
    # Not the quotient: where all weights are 0 nothing is allowed, and nothing is wrong.
    assert bool((error <= bound).all()), (
        f"an error is {(error / bound).nan_to_num().max().item():.2f} times what FAST allows"
    )


def assert_ranking(scores: Sequence[float], true: Sequence[float], floor: float) -> None:
    """Scores differ by at most `floor`, and two candidates whose true scores differ by more keep their order."""
    assert len(scores) == len(true)
    worst = max((abs(a - b) for a, b in zip(scores, true, strict=True)), default=0.0)
    assert worst <= floor, f"a score differs by {worst:.3e}, more than {floor:.3e}"
    order = sorted(range(len(true)), key=lambda i: -scores[i])
    for left, right in itertools.pairwise(order):
        assert true[left] >= true[right] - floor, f"candidates {left} and {right} changed places"


def assert_best(
    scores: torch.Tensor, indices: torch.Tensor, true: torch.Tensor, allowed: torch.Tensor, k: int, error: float
) -> None:
    """RANKING for a part of the order: the k best of true scores [Q, N] among the rows `allowed` [N]: scores within `error`,
    in order, equal ones by index, and no row left out that is better by more; -1 and -inf where there are fewer."""
    assert scores.shape == indices.shape == (true.shape[0], k)
    assert scores.dtype is torch.float32
    assert indices.dtype is torch.int64
    kept = min(k, int(allowed.sum()))
    assert bool((indices[:, kept:] == -1).all())
    assert bool(scores[:, kept:].isneginf().all())
    for q in range(true.shape[0]):
        found, values = indices[q, :kept], scores[q, :kept]
        assert bool((found >= 0).all()), "a row is missing"
        assert bool(allowed[found].all()), "a row that the filter excludes"
        assert found.unique().numel() == kept, "a row appears twice"
        assert bool((values.diff() <= 0).all())
        equal = values.diff() == 0
        assert bool((found.diff()[equal] > 0).all()), "equal scores, indices out of order"
        if kept:
            assert float((true[q, found] - values).abs().max()) <= error
            rest = allowed.clone()
            rest[found] = False
            if rest.any():
                assert float(true[q, rest].max()) <= float(values[-1]) + 2 * error


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, `torch.empty`, `empty_like` and `Tensor.new_empty` give NaN (or the largest integer): reads of unwritten memory show."""
    originals = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
    # `with torch.device(...)` looks up the constructors it serves once: before they are replaced, or it would not know them.
    _device_constructors()

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.float32 and tensor.device.type == "cpu":
            tensor.numpy().fill(float("nan"))  # not an op of torch's, which a tape that records would refuse
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype is torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    torch.empty = lambda *a, **k: poison(originals[0](*a, **k))
    torch.empty_like = lambda *a, **k: poison(originals[1](*a, **k))
    torch.Tensor.new_empty = lambda *a, **k: poison(originals[2](*a, **k))  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals[0], originals[1]
        torch.Tensor.new_empty = originals[2]  # type: ignore[method-assign]


@contextlib.contextmanager
def with_sentinels(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, margin: int = 64
) -> Iterator[torch.Tensor]:
    """An output tensor, NaN-filled, between two margins; leaving checks that nobody wrote outside it."""
    numel = 1
    for size in shape:
        numel *= size
    memory = torch.full((numel + 2 * margin,), SENTINEL, dtype=torch.float32).to(dtype)
    guard = memory[:margin].clone()
    inner = memory[margin : margin + numel]
    inner.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
    yield inner.view(*shape)
    assert torch.equal(memory[:margin], guard), "memory before the output was written"
    assert torch.equal(memory[margin + numel :], guard), "memory after the output was written"
