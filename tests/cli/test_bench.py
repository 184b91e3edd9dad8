"""`uma bench`: speed in numbers, shares of ops that add up, and bad sizes in words."""

from __future__ import annotations

import json

import pytest

from tests.tiny import make_tiny_model
from uma_engine.cli.main import main
from uma_kernels import dispatch

SIZES = ["--candidates", "5", "--job-tokens", "20", "--candidate-tokens", "9", "--repeats", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("bench") / "tiny"))


def test_bench_counts_what_it_did(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", model, "--json", *SIZES]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["workload"] == "20+5x9 tokens"
    assert len(answer["seconds"]) == 2
    median = sum(answer["seconds"]) / 2
    assert answer["candidates_per_s"] == pytest.approx(5 / median)
    assert answer["tokens_per_s"] == pytest.approx(65 / median)


@pytest.mark.skipif(dispatch.C is None, reason="the profile is of compiled kernels")
def test_the_profile_adds_up_and_leaves_no_clock_behind(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    extension = dispatch.C
    assert main(["bench", "--model", model, "--json", "--profile", *SIZES]) == 0
    assert dispatch.C is extension
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert {"tree_attention", "rope", "label_head"} <= profile["ops"].keys()
    assert 0 < sum(op["share"] for op in profile["ops"].values()) <= 1
    assert 0 < profile["linear_and_attention"] < 1
    assert main(["bench", "--model", model, "--profile", *SIZES]) == 0
    assert "linear layers and attention:" in capsys.readouterr().out


def test_bad_sizes_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", model, "--candidates", "0"]) == 2
    assert "`--candidates` is 0" in capsys.readouterr().err
