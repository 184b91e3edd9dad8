"""`uma rank --explain words --deliberate N`: assessments and notes on a terminal, in JSON, and in records that replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_surface import files, model  # noqa: F401
from uma_engine.cli.main import main
from uma_engine.tasks import grammar

WORDS = ["--explain", "words", "--explain-top", "2", "--deliberate", "8"]


@pytest.mark.parametrize("width", [40, 80, 160])
def test_assessments_are_shown_under_the_table(
    width: int,
    model: str,  # noqa: F811
    files: list[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["rank", *files, "--model", model, *WORDS]) == 0
    out = capsys.readouterr().out
    assert all(cell_len(line) <= width for line in out.splitlines())
    flat = " ".join(out.split())
    assert "notes, which nobody checked, were read before the probes: Kendall's tau" in flat
    assert "[job success] *" in flat
    assert "sentences of the model are grounded" in flat
    assert "reading again" in flat
    assert "\x1b" not in out


def test_json_and_record_have_the_words_and_replay(
    model: str,  # noqa: F811
    files: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = tmp_path / "record.json"
    assert main(["rank", *files, "--model", model, *WORDS, "--json", "--record", str(record)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [a["id"] for a in answer["assessments"]] == [r["id"] for r in answer["results"]]
    assert len(answer["deliberation"]["notes"]) == 2
    names = [s["name"] for s in answer["usage"]["stages"] if s["computed_tokens"]]
    assert names == ["score", "notes", "reading again", "words"]
    assert main(["replay", str(record)]) == 0
    assert "identical: 2 candidates" in capsys.readouterr().out
    data = json.loads(record.read_text())
    entry = next(r for r in data["results"] if "assessment" in r)
    entry["assessment"]["written"] += " "
    record.write_text(json.dumps(data))
    assert main(["replay", str(record)]) == 1
    assert "assessment" in capsys.readouterr().out


def test_notes_without_a_surface(model: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["rank", *files[:2], "--model", model, "--deliberate", "8"]) == 0
    assert "2 moved" in (out := " ".join(capsys.readouterr().out.split())) or "0 of 2 moved" in out
    assert main(["rank", *files[:2], "--model", model, "--explain", "words"]) == 2
    assert "`explain` is `words` without a surface" in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_scored(
    model: str,  # noqa: F811
    files: list[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main(["rank", *files, "--model", model, "--explain", "words"]) == 1
    assert "pip install 'uma-engine[words]'" in capsys.readouterr().err
    assert grammar.MissingPackage.status == 503
