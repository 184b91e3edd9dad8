"""What every test gets: a fixed seed, poisoned `torch.empty`, and the list of back ends of this machine."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined: GPU kernels run here, slowly

os.environ.setdefault("UMA_CHECK_VALUES", "1")  # on a GPU too, bad indices raise

from uma_kernels import dispatch
from uma_kernels.testing import poisoned_empty

# `cpp` appears once for each instruction set this machine runs, so that the portable path is tested everywhere.
BACKENDS = ["reference"] + ([f"cpp-{isa}" for isa in dispatch.C.available_isas()] if dispatch.C else [])
if dispatch.triton_error() is None:
    BACKENDS.append("triton")  # on the GPU where there is one, else in Triton's interpreter


if dispatch.triton_error() is None and dispatch.interpreted():
    from tests import interpreter

    interpreter.adapt()


GPU_MODULES = {"test_lora_gpu", "test_half_precision", "test_device_runner", "test_step_graphs", "test_aot"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of GPU kernels are marked where there is no GPU, and those that say nothing new in the interpreter are left out."""
    if not dispatch.interpreted():
        return
    left_out = []
    for item in items:
        call = getattr(item, "callspec", None)
        params = {} if call is None else call.params
        on_triton = "triton" in (str(value) for value in params.values())
        if on_triton and _says_nothing_new(item, params):
            left_out.append(item)
        elif on_triton or item.path.stem in GPU_MODULES:
            item.add_marker(pytest.mark.interpreted)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]


def _says_nothing_new(item: pytest.Item, params: dict[str, Any]) -> bool:
    """Triton dequantises when it packs: it has no `near` or `fast`, and one format stands for all. Of the architectures, Gemma 3,
    which has the most parts, runs every test; the others run one."""
    weight_format, architecture = params.get("weight_format"), params.get("tiny", "gemma3")
    return (
        item.path.stem in ("test_linear_near", "test_linear_fast")
        or (weight_format is not None and weight_format.id not in ("fp32", "q4-b32-min"))
        or (architecture != "gemma3" and not item.name.startswith("test_a_whole_prefill_matches"))
    )


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    with poisoned_empty():
        yield


def skip_in_interpreter(backend: str, elements: int, most: int = 20_000) -> None:
    """Skip a case whose kernels touch more than `most` elements where they are interpreted: a GPU runs all cases."""
    if backend == "triton" and dispatch.interpreted() and elements > most:
        pytest.skip(f"{elements} elements are too many for the interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per back end and instruction set; for `triton` new tensors lie on the GPU where there is one."""
    name, _, isa = request.param.partition("-")
    on_gpu = name == "triton" and not dispatch.interpreted()
    before = dispatch.C.isa() if dispatch.C else None
    if isa:
        assert dispatch.C is not None
        assert dispatch.C.set_isa(isa)
    with dispatch.use_backend(name), torch.device("cuda" if on_gpu else "cpu"):
        yield request.param
    if before:
        dispatch.extension().set_isa(before)
