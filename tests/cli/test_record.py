"""`uma record` and `uma replay` over a decision log."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model
from uma_engine.cli.main import main

TEXTS = {"rust": "Ten years of unmistakable Rust in Łódź.", "nurse": "Ten years of distinctive nursing."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("record") / "tiny")


@pytest.fixture
def log(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A log of three rankings."""
    (tmp_path / "people.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in TEXTS.items()))
    for n in range(3):
        (tmp_path / "job.md").write_text(f"We need {n + 2} Rust engineers.\n")
        files = [str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")]
        assert main(["rank", *files, "--model", str(model), "--log", str(tmp_path / "log")]) == 0
    return str(tmp_path / "log")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_verify_list_and_receipts(log, capsys):
    receipts = [line.removeprefix("logged as ") for line in lines(capsys) if line.startswith("logged as ")]
    assert len(receipts) == 3
    assert main(["record", "verify", log, *(arg for r in receipts for arg in ("--receipt", r))]) == 0
    assert lines(capsys)[0].startswith("whole: 3 entries")
    assert main(["record", "list", log]) == 0
    assert [line.split()[1] for line in lines(capsys)] == [r.split(":")[1] for r in receipts]
    forged = receipts[0][:-1] + ("0" if receipts[0][-1] != "0" else "1")
    assert main(["record", "verify", log, "--receipt", forged]) == 1
    assert main(["record", "verify", log, "--receipt", "nonsense"]) == 2


def test_tampering_is_a_failure(log, capsys):
    lines(capsys)
    db = sqlite3.connect(log)
    db.execute("DROP TRIGGER contents_stay")
    db.execute("UPDATE contents SET body = replace(body, 'distinctive', 'mediocre')")
    db.commit()
    db.close()
    assert main(["record", "verify", log]) == 1
    assert "3 problems" in lines(capsys)[-1]


def test_export_and_forget(log, capsys):
    lines(capsys)
    assert main(["record", "export", log, "--candidate", "rust"]) == 0
    (text,) = lines(capsys)
    assert len(json.loads(text)["decisions"]) == 3
    assert TEXTS["rust"] in text
    assert "nurs" not in text
    assert main(["record", "forget", log, "--candidate", "rust"]) == 0
    assert "removed from 3 decisions" in lines(capsys)[0]
    assert main(["record", "export", log, "--candidate", "rust"]) == 0
    assert json.loads(lines(capsys)[0])["decisions"] == []
    assert main(["record", "verify", log]) == 0


def test_replay_one_and_all(log, capsys):
    lines(capsys)
    main(["record", "list", log])
    first = lines(capsys)[0].split()[1]
    assert main(["replay", log, "--entry", first]) == 0
    assert "identical: 2 candidates" in lines(capsys)[-1]
    main(["record", "forget", log, "--candidate", "nurse"])
    assert main(["replay", log, "--all"]) == 0
    assert lines(capsys)[-1] == "3 of 3 decisions are identical"
    assert main(["record", "show", log, "--entry", first]) == 0
    assert json.loads(lines(capsys)[-1])["forgotten"] == 1


def test_bad_arguments(log, tmp_path, capsys):
    assert main(["replay", log]) == 2
    assert main(["replay", log, "--all", "--entry", "x"]) == 2
    assert main(["replay", log, "--entry", "x"]) == 2
    assert main(["record", "list", str(tmp_path / "absent")]) == 2
    assert main(["record", "list", str(tmp_path / "people.jsonl")]) == 2
    assert "cannot be used as a decision log" in capsys.readouterr().err
