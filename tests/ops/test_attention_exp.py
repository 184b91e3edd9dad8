"""The exponential of attention's weights: its error in units in the last place over the whole range it is used on."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import BACKENDS
from uma_kernels import dispatch

MOST_ULP = 1.02  # what csrc/cpu/attention_lanes.h states
LOWEST = np.float32(-87.3)  # below it a weight is zero

each_instruction_set = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp")], indirect=True)


def exp(x: np.ndarray) -> np.ndarray:
    out = np.full(-(-len(x) // 16) * 16, np.nan, np.float32)
    padded = np.zeros_like(out)
    padded[: len(x)] = x
    dispatch.extension().attention_exp(padded.ctypes.data, out.ctypes.data, len(out))
    return out[: len(x)]


@each_instruction_set
def test_the_error_is_within_the_stated_bound(backend: str) -> None:
    # Every 97th float from -2^-26, which gives 1, to the lowest, and the floats around the one with the largest error.
    first, last, worst = (int(np.float32(x).view(np.uint32)) for x in (-(2.0**-26), LOWEST, -5.87788439))
    bits = np.concatenate([np.arange(first, last + 1, 97), np.arange(worst - 5000, worst + 5000)]).astype(np.uint32)
    x = bits.view(np.float32)
    true = np.exp(x.astype(np.float64))
    _, exponent = np.frexp(true)
    error = np.abs(exp(x) - true) / np.ldexp(1.0, exponent - 24)
    assert error.max() <= MOST_ULP, f"{error.max()} ulp at {x[error.argmax()]!r}"


@each_instruction_set
def test_zero_gives_one_and_what_is_too_small_zero(backend: str) -> None:
    ones = exp(np.array([0.0, -0.0, -1e-45], np.float32))
    assert (ones == 1).all()
    below = np.array([np.nextafter(LOWEST, np.float32(-100)), -88, -104, -1e30, -np.inf], np.float32)
    assert (exp(below) == 0).all()
    assert exp(np.array([LOWEST], np.float32))[0] > 0
    assert np.isnan(exp(np.array([np.nan], np.float32))).all()
