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


def _round_as_a_gpu_does() -> None:
    """Triton's interpreter cuts fp32 off where a GPU rounds to the nearest bf16 or e4m3: torch's conversions in its place."""
    from triton.runtime import interpreter

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name not in types or target.name not in types:
            return original(values, source, target, rounding)
        raw = torch.frombuffer(bytearray(values.tobytes()), dtype=types[source.name])
        result = raw.to(types[target.name])
        return result.view(unsigned[result.element_size()]).numpy().reshape(values.shape)

    interpreter._convert_float = convert


if dispatch.triton_error() is None and dispatch.interpreted():
    _round_as_a_gpu_does()


GPU_MODULES = {"test_lora_gpu", "test_half_precision", "test_device_runner", "test_aot"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of GPU kernels are marked where there is no GPU: interpreted, they take many minutes."""
    for item in items:
        call = getattr(item, "callspec", None)
        on_triton = call is not None and "triton" in (str(value) for value in call.params.values())
        in_module = item.path.stem in GPU_MODULES
        if dispatch.interpreted() and (on_triton or in_module):
            item.add_marker(pytest.mark.interpreted)


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
