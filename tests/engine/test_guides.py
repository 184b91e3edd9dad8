"""Every code block of the guides and every example runs, against a tiny model in place of the default one.

To add a page, put it into `docs/` as `guide-*.md`. Blocks of a page run in their order in one directory: those marked `python` in one
namespace, in those marked `console` every line that begins with `$ `. To add an example, put it into `examples/`: one that takes
arguments other than a model says so in `ARGUMENTS`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("guide-*.md"))
BUILDERS = {"build_candidates.py"}  # makes the files of `examples/`, and is tested as that
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in BUILDERS)
ARGUMENTS = {
    "calibrate.py": ["calibration.json", "{model}"],
    "decisions.py": ["decisions.uma", "{model}"],
    "recompute.py": ["answer.json"],
}
MODEL_COMMANDS = ("rank", "bench", "generate", "match")  # whose default model is one that must be fetched
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(Path(p)) for p in (ROOT, ROOT / "kernels", *sys.path) if str(p))
}


@pytest.fixture
def folder(tmp_path: Path, tiny_dir: Path) -> Path:
    """Where a reader would stand: the examples at hand."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def uma(line: str, model: Path) -> list[str]:
    program, *arguments = shlex.split(line)
    assert program == "uma", f"`{line}` is no command of ours"
    if arguments[0] in MODEL_COMMANDS and "--model" not in arguments:
        arguments += ["--model", str(model)]
    return [sys.executable, "-m", "uma_engine.cli.main", *arguments]


def test_there_is_a_guide_for_each_user() -> None:
    assert {path.stem for path in GUIDES} >= {"guide-backend", "guide-performance", "guide-operator"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_block_of_a_guide_runs(guide: Path, folder: Path, tiny_dir: Path) -> None:
    blocks = BLOCK.findall(guide.read_text(encoding="utf-8"))
    assert blocks
    assert {language for language, _ in blocks} <= {"python", "console", "toml"}, "a block that nothing runs"
    python = "\n".join(code for language, code in blocks if language == "python")
    python = python.replace('"smollm2-135m"', repr(str(tiny_dir)))
    if python:
        (folder / "guide.py").write_text(python)
        assert run([sys.executable, "guide.py"], folder)
    for language, code in blocks:
        if language == "console":
            for line in code.splitlines():
                assert line.startswith("$ "), f"`{line}`: output is not checked, so it is not shown"
                run(uma(line[2:], tiny_dir), folder)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_links_of_a_guide_lead_somewhere(guide: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", guide.read_text(encoding="utf-8")):
        assert (guide.parent / link).exists(), link


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_as_its_first_lines_say(name: str, folder: Path, tiny_dir: Path) -> None:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert text.startswith('"""')
    if name == "scale.py":
        pytest.importorskip("ray.serve")
    if name == "recompute.py":  # reads what `uma rank` writes
        line = "uma rank examples/job.md examples/candidates.jsonl --surface examples/surface.toml --job-fact budget=60 --json"
        (folder / "answer.json").write_text(run(uma(line, tiny_dir), folder))
    arguments = [a.format(model=tiny_dir) for a in ARGUMENTS.get(name, ["{model}"])]
    out = run([sys.executable, f"examples/{name}", *arguments], folder)
    assert out, "an example shows something"
