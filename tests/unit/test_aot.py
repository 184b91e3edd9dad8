"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU: no spills, and wgmma where a matrix product is the work.

Each kernel at the sizes that matter most, so that it takes minutes; `python -m uma_kernels.aot` compiles every size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from uma_kernels import aot, dispatch

QUICK = (
    "activation/swiglu",
    "attention/tree-bf16-D64-",
    "attention/tree-bf16-D128-",
    "attention/tree-fp32-D64-",
    "attention/decode-bf16-D128",
    "attention/join-bf16-D128",
    "kv_cache/",
    "label_head/dots",
    "label_head/logsumexp-64x128-bf16",
    "label_head/logprobs",
    "linear/gated-128x256-",
    "linear/gated-narrow-64x32-bf16-tma",
    "linear/gated-128x128-bf16",
    "linear/matmul-128x256-bf16-tma",
    "linear/matmul-128x256-fp8e4nv-tma",
    "linear/matmul-narrow-64x32-bf16-tma",
    "linear/matmul-128x128-bf16-add",
    "linear/matmul-32x128-fp32",
    "linear/quantize_rows",
    "linear/gather_rows",
    "lora/augmented-128x256-",
    "lora/augmented-128x128-bf16-dense-tma-add",
    "lora/augmented-narrow-64x32-bf16-dense-tma",
    "lora/augmented-128x128-bf16-dense-add",
    "lora/lora_pair-bf16-dense-T16-slices3",
    "lora/lora_pair-bf16-int4",
    "lora/lora_shrink-bf16-dense-T64-slices3",
    "lora/lora_expand-bf16-dense-T64-slices3",
    "lora/lora_histogram",
    "lora/lora_place",
    "lora/lora_site-bf16-T16-slices3",
    "lora/lora_site-bf16-T64-slices3",
    "norm/add_rms_norm-4096",
    "rope/norm_rope_write-",
    "rope/rope-32-8-128",
    "sampling/penalise",
    "sampling/sample-masked",
    "topk/maxima-fp32-few",
    "topk/maxima-bf16-few",
    "topk/maxima-bf16-many",
    "topk/maxima-int8-many",
    "topk/maxima-fp8-few",
    "topk/rescan-bf16",
    "topk/fold",
    "topk/descend-800",
    "topk/order",
    "topk/maxsim-bf16-128",
    "topk/prepare-int8",
)

pytestmark = [
    pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def results() -> list[aot.AotResult]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "uma_kernels.aot", "--json", "--only", *QUICK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return [aot.AotResult(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_every_kernel_compiles_without_spills_and_with_wgmma(results: list[aot.AotResult]) -> None:
    problems = [f"{r.op}/{r.case} sm_{r.arch}: {r.problem}" for r in results if r.problem]
    assert not problems, "\n".join(problems)


def test_every_kernel_is_among_them() -> None:
    listed = [(f"{module.split('.')[1]}/{case.name}", case) for module in aot.modules() for case in aot.cases(module)]
    quick = [case for name, case in listed if any(word in name for word in QUICK)]
    for arch in aot.ARCHITECTURES:
        every = {case.fn.__name__ for _, case in listed if case.only in (None, arch)}
        assert {case.fn.__name__ for case in quick if case.only in (None, arch)} == every
    assert all(any(word in name for name, _ in listed) for word in QUICK)


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
