"""`bench/gpu.sh` where no GPU is: it parses, its parts exist, and each module that it runs imports and says what it lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from uma_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
PARTS = re.findall(r"\[(\w+)\]=\d+", SCRIPT.read_text())
# The modules that the script names, and those of the parts that go by their own name.
NAMED = set(re.findall(r"-m bench\.gpu\.(\w+)", SCRIPT.read_text()))
MODULES = sorted(NAMED | {part for part in PARTS if (ROOT / "bench" / "gpu" / f"{part}.py").exists()})

pytestmark = pytest.mark.skipif(dispatch.triton_error() is not None, reason="Triton is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def script(*parts: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "BUDGET": "60"}
    return subprocess.run([SCRIPT, *parts], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["gpu.sh", "gpu/fetch_anchors.sh"])
def test_the_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "bench" / name], check=True)


def test_every_part_has_something_to_run() -> None:
    text = SCRIPT.read_text()
    assert len(PARTS) == 9
    for part in PARTS:
        assert part in MODULES or f"\n    {part}) " in text or f"\n    {part})\n" in text, part
    for file in re.findall(r"tests/\w+/test_\w+\.py", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", MODULES)
def test_a_module_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"bench.gpu.{name}").main
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


@no_gpu
@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_that_there_is_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="torch sees none"):
        import_module(f"bench.gpu.{name}").main()


def test_the_baselines_of_low_rank_updates_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's, and the anchors' where they were fetched."""
    monkeypatch.setattr(sys, "argv", ["anchors"])
    assert import_module("bench.gpu.anchors").main() == 0


def test_an_unknown_part_is_refused() -> None:
    ended = script("gemm", "nonsense")
    assert ended.returncode == 2
    assert all(word in ended.stderr for word in ("nonsense", *PARTS))


@no_gpu
def test_a_part_that_fails_is_in_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    ended = script("ceilings")
    assert ended.returncode == 1
    assert "torch sees none" in ended.stdout
    assert re.search(r"^ceilings +\d+ s +FAILED \(1\)$", ended.stdout, re.MULTILINE), ended.stdout
    assert (tmp_path / "gpu.log").exists()
