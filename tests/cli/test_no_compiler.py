"""A machine without a compiler: the build says so and goes on, and the reference back end ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without any compiled extension."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("uma_engine", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    # An editable install of this project in the same environment would lend the tree its extension.
    (tree / "kernels/uma_kernels/_C.py").write_text('raise ImportError("not compiled in this tree")\n')
    return tree


def run(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "UMA_REQUIRE_EXTENSION"}
    environment |= {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"} | env
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


def test_the_build_says_plainly_that_the_kernels_are_missing(tree: Path) -> None:
    built = run(tree, "setup.py", "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false")
    assert built.returncode == 0
    assert "compiled kernels were NOT built" in built.stderr
    assert "hint: install" in built.stderr
    assert not list(tree.glob("kernels/**/*.so"))
    strict = run(
        tree, "setup.py", "build_ext", "--inplace", CC="/bin/false", CXX="/bin/false", UMA_REQUIRE_EXTENSION="1"
    )
    assert strict.returncode != 0


def test_the_reference_back_end_ranks_and_doctor_says_why(tree: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    (tmp_path / "job.md").write_text("We need a Rust engineer")
    (tmp_path / "people.jsonl").write_text('{"text": "Ten years of Rust"}\n{"text": "A nurse"}\n')
    arguments = [str(tmp_path / "job.md"), str(tmp_path / "people.jsonl"), "--model", str(model), "--json"]
    ranked = run(tree, "-m", "uma_engine.cli.main", "rank", *arguments)
    assert ranked.returncode == 0, ranked.stderr
    assert json.loads(ranked.stdout)["stack"]["backend"] == "reference"
    assert "the compiled kernels are not installed" in ranked.stderr
    doctor = json.loads(run(tree, "-m", "uma_engine.cli.main", "doctor", "--json").stdout)
    fallbacks = {"topk", "topk.maxsim"}  # numba, where it is installed, needs no compiler
    for op in doctor["ops"]:
        assert op["backend"] in ({"reference", "numba"} if op["op"] in fallbacks else {"reference"}), op
        assert "extension not available" in op["reason"], op
