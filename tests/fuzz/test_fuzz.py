"""A short part of the random cases on every instruction set, and proof that a wrong kernel is found and named."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fuzz.__main__ import CHECKS, main, op_of, run_cases
from uma_kernels import dispatch
from uma_kernels.linear import cpp as linear_cpp
from uma_kernels.norm import cpp as norm_cpp

pytestmark = pytest.mark.skipif(dispatch.C is None, reason="the extension is not built")
ISAS = dispatch.C.available_isas() if dispatch.C is not None else []
CASES = 250
SEED = 1  # another than the long run's default


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_random_cases_are_right(isa: str) -> None:
    assert {op_of(SEED, number) for number in range(CASES)} == set(CHECKS)
    failures = run_cases(SEED, range(CASES), isa, None)
    assert not failures, "\n".join(failures)


def scaled(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel, its results wrong by one in ten thousand."""

    def wrong(*args: Any) -> None:
        kernel(*args)
        args[-1].mul_(1.0001)

    return wrong


def one_too_many(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel, and the element behind its output written."""

    def wrong(*args: Any) -> None:
        kernel(*args)
        out = args[-1]
        last = out.storage_offset() + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
        if out.numel() and last + 1 < out.untyped_storage().size() // 4:
            torch.empty(0).set_(out.untyped_storage())[last + 1] = 1.0

    return wrong


@pytest.mark.parametrize("damage", [scaled, one_too_many])
@pytest.mark.parametrize(
    ("op", "module", "name"), [("linear", linear_cpp, "linear_fast"), ("rms_norm", norm_cpp, "rms_norm")]
)
def test_a_wrong_kernel_is_found_and_its_line_repeats_it(
    damage: Callable[..., Any], op: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(module, name, damage(getattr(module, name)))
    lines = run_cases(SEED, range(30), ISAS[-1], op)
    assert lines
    assert all("\n" not in line for line in lines)
    command, _, said = lines[0].partition("  # ")
    assert re.match(rf"{op} .*: AssertionError: ", said)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tests.fuzz"]
    assert main(words[3:]) == 1
    assert "AssertionError" in capfd.readouterr().err
    monkeypatch.undo()
    assert main(words[3:]) == 0


def test_a_case_that_kills_its_process_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(norm_cpp, "rms_norm", lambda *_: os.abort())
    assert main(["--cases", "3", "--isa", ISAS[-1], "--op", "rms_norm"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == [
        f"python -m tests.fuzz --seed 0 --case {n} --isa {ISAS[-1]} --op rms_norm  # rms_norm : the process ended with status -6"
        for n in range(3)
    ]
    assert lines[3].startswith("3 of 3 cases failed")
