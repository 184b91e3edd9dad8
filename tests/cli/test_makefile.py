"""The Makefile on a machine without ensurepip, and a source distribution whose patterns all match."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As Debian's python3 without python3-venv does: the directory and its links are there, then it fails.
HALF_A_VENV = '#!/bin/sh\nmkdir -p "$3/bin"\ntouch "$3/bin/python"\necho "ensurepip is not available"\nexit 1\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "python").write_text(HALF_A_VENV)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(tree: Path, venv: str) -> subprocess.CompletedProcess[str]:
    command = ["make", f"PYTHON={tree / 'python'}", f"VENV={venv}", f"{venv}/bin/python"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_half_a_virtual_environment_is_removed_and_the_package_named(tree: Path) -> None:
    ended = make(tree, "new")
    assert ended.returncode != 0
    assert "hint: install" in ended.stderr
    assert "python3-venv" in ended.stderr
    assert not (tree / "new").exists()


def test_a_directory_that_was_there_before_is_not_removed(tree: Path) -> None:
    (tree / "mine").mkdir()
    (tree / "mine" / "notes").write_text("dear")
    assert make(tree, "mine").returncode != 0
    assert (tree / "mine" / "notes").read_text() == "dear"
    assert not (tree / "mine" / "bin" / "python").exists()


def test_every_pattern_of_the_manifest_matches_a_file() -> None:
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *words = line.split()
        if command == "include":
            assert all(any(ROOT.glob(word)) for word in words), line
        elif command == "recursive-include":
            assert all(any((ROOT / words[0]).rglob(word)) for word in words[1:]), line
        elif command == "graft":
            assert any(path.is_file() for path in (ROOT / words[0]).rglob("*")), line
