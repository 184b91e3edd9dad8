"""What every test gets: a fixed seed, poisoned `torch.empty`, and the list of CPU back ends of this machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from uma_kernels import dispatch
from uma_kernels.testing import poisoned_empty

# `cpp` appears once for each instruction set this machine runs, so that the portable path is tested everywhere.
BACKENDS = ["reference"] + ([f"cpp-{isa}" for isa in dispatch.C.available_isas()] if dispatch.C else [])


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    with poisoned_empty():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per back end and instruction set."""
    name, _, isa = request.param.partition("-")
    before = dispatch.C.isa() if dispatch.C else None
    if isa:
        assert dispatch.C is not None
        assert dispatch.C.set_isa(isa)
    with dispatch.use_backend(name):
        yield request.param
    if before:
        dispatch.extension().set_isa(before)
