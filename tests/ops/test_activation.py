"""Gated activations: every back end against fp64, in poisoned memory, and row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import skip_in_interpreter
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.activation.cases import CASES, ActivationCase
from uma_kernels.check import ShapeError
from uma_kernels.testing import assert_invariant, assert_reduction, with_sentinels

OPS = {
    "swiglu": (swiglu, F.silu),
    "geglu_tanh": (geglu_tanh, lambda x: F.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gated_activation_matches_fp64(op: str, case: ActivationCase, backend: str) -> None:
    skip_in_interpreter(backend, case.tokens * case.width, 30_000)
    ours, torch_activation = OPS[op]
    gate, up = torch.randn(2, case.tokens, case.width) * 4
    gate_up = torch.cat((gate, up), dim=1)
    true = torch_activation(gate.double()) * up.double()
    with with_sentinels(gate.shape) as out:
        ours(gate_up, out)
        assert_reduction(out, torch_activation(gate) * up, true)
    row = case.tokens // 2
    if case.tokens:
        assert_invariant(ours(gate_up[row : row + 1].clone()), out[row : row + 1])


def test_extreme_inputs_stay_finite(backend: str) -> None:
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]])
    for ours, torch_activation in OPS.values():
        gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
        assert_reduction(ours(gate_up), torch_activation(gate), torch_activation(gate.double()))


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    x = torch.zeros(2, 6)
    for gate_up, out in (
        (torch.zeros(2, 5), None),
        (x, torch.zeros(2, 6)),
        (x.double(), None),
        (torch.zeros(6, 2).t(), None),
    ):
        with pytest.raises(ShapeError):
            swiglu(gate_up, out)
