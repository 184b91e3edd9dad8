"""`uma rank --surface`: the ledger on terminals of every width, in JSON and in records that replay."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SURFACE = """
name = "two adapters"
resolution = 0.05
[adapters]
skills = "adapters/skills"
tone = "adapters/tone"
[[facts]]
name = "job success"
field = "job_success"
curve = { worst = 0, best = 100 }
missing = 0.5
[[reads]]
name = "skill match"
probe = "Answer {labels}: do the skills match?"
adapter = "skills"
[[reads]]
name = "tone"
probe = "Answer {labels}: is the tone kind?"
adapter = "tone"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("surface") / "tiny"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "job.md").write_text("We need a Rust engineer.\n")
    people = [
        {"id": "rust", "headline": "Engineer", "summary": "Ten years of Rust.", "job_success": 97, "rate": 45},
        {"id": "new", "name": "Ada Example", "headline": "Ada Example, engineer", "job_success": None},
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(p) + "\n" for p in people))
    make_tiny_adapter(tmp_path / "adapters" / "skills", seed=1)
    make_tiny_adapter(tmp_path / "adapters" / "tone", seed=2)
    (tmp_path / "s.toml").write_text(SURFACE)
    return [str(tmp_path / "job.md"), str(tmp_path / "people.jsonl"), "--surface", str(tmp_path / "s.toml")]


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_ledger_is_readable_at_every_width(
    width: int, model: str, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["rank", *files, "--model", model]) == 0
    out = capsys.readouterr().out
    assert all(cell_len(line) <= width for line in out.splitlines())
    assert len(re.findall(r"│ +[12]=? │ (?:rust|new) .*[01]\.\d{4} │\n", out)) == 2
    assert len(re.findall(r"│ +│   (?:job|skill|tone).*\+0\.\d{4} │\n", out)) == 6
    assert ("weight" in out) == (width >= 60)
    assert ("job_success: not known" in out) == (width >= 100)
    assert "1 facts are not known and count as declared (neutral)" in " ".join(out.split())


def test_ties_are_marked(model: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text(SURFACE.replace("0.05", "1.0"))
    assert main(["rank", *files, "--model", model, "--top-n", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "│ 1= │" in out
    assert "= 2 of 2 are in a tie: scores less than 1 apart, placed by lot" in out
    assert "`top_n` 1 cuts a tie" in out


def test_a_record_with_several_adapters_replays_and_notices_an_edit(
    model: str, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "r.json"
    assert main(["rank", *files, "--model", model, "--json", "--record", str(record)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [a["name"] for a in answer["adapters"]] == ["skills", "tone"]
    assert "45" not in json.loads(record.read_text())["candidates"][0]["text"], "numbers are facts, not text"
    assert main(["replay", str(record)]) == 0
    assert "identical: 2 candidates" in capsys.readouterr().out
    edited = json.loads(record.read_text())
    edited["results"][1]["redactions"] = []
    edited["candidates"][0]["facts"]["job_success"] = 12
    record.write_text(json.dumps(edited))
    assert main(["replay", str(record)]) == 1
    out = capsys.readouterr().out
    assert "candidate `new`: redactions `[]` then" in out
    assert "candidate `rust`: ledger" in out
    assert main(["replay", str(record), "--adapter", str(tmp_path / "adapters" / "skills")]) == 2
    assert "its adapters\nhint: put the adapters where they were" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "adapters" / "tone")
    assert main(["replay", str(record)]) == 2
    del edited["adapters"]
    record.write_text(json.dumps(edited))
    assert main(["replay", str(record)]) == 2
    assert "the record has no `adapters`" in capsys.readouterr().err


def test_bad_surfaces_and_job_facts_are_refused_before_a_model_is_opened(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(["rank", *arguments, "--model", "no-such-model"]) == 2
        return capsys.readouterr().err

    assert "`--job-fact` is `budget`\nhint: write NAME=NUMBER" in error(*files, "--job-fact", "budget")
    assert "without `--surface`" in error(*files[:2], "--job-fact", "budget=1")
    (tmp_path / "s.toml").write_text(SURFACE.replace("missing = 0.5", "missing = 0"))
    assert "s.toml`: `facts[0]`: fact `job success`: `missing` is `0.0`" in error(*files)


def test_the_example_runs_and_its_script_finds_no_difference(model: str, tmp_path: Path) -> None:
    """As its first lines have it, each in a process of its own."""
    rank = [
        sys.executable,
        "-m",
        "uma_engine.cli.main",
        "rank",
        "job.md",
        "candidates.jsonl",
        "--surface",
        "surface.toml",
    ]
    options = ["--job-fact", "budget=60", "--json", "--model", model]
    answer = subprocess.run([*rank, *options], cwd=EXAMPLES, capture_output=True, text=True, check=True).stdout
    (tmp_path / "answer.json").write_text(answer)
    script = [sys.executable, "-I", str(EXAMPLES / "recompute.py"), "answer.json"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "48 scores recomputed, largest difference 0.0\n")
