"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU: no spills, and wgmma where a matrix product is the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from uma_kernels import aot, dispatch

pytestmark = pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def results() -> list[aot.AotResult]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "uma_kernels.aot", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return [aot.AotResult(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_every_kernel_compiles_without_spills_and_with_wgmma(results: list[aot.AotResult]) -> None:
    problems = [f"{r.op}/{r.case} sm_{r.arch}: {r.problem}" for r in results if r.problem]
    assert not problems, "\n".join(problems)


def test_every_op_with_a_triton_back_end_is_compiled_for_every_architecture(results: list[aot.AotResult]) -> None:
    folders = {op.split(".")[0] for op, backends in dispatch.OPS.items() if "triton" in backends}
    for arch in aot.ARCHITECTURES:
        assert folders <= {r.op for r in results if r.arch == arch}


def test_a_spilling_or_slow_kernel_is_reported() -> None:
    good = aot.AotResult("op", "kernel", 90, True, registers=128, wgmma=4)
    assert not good.problem
    assert "spills" in aot.AotResult("op", "kernel", 80, False, spills=8).problem
    assert "wgmma" in aot.AotResult("op", "kernel", 90, True).problem
    assert not aot.AotResult("op", "kernel", 80, True).problem
    assert aot.AotResult("op", "kernel", 90, False, error="CompilationError: x").problem in aot.table(
        [aot.AotResult("op", "kernel", 90, False, error="CompilationError: x")]
    )
