"""Decision records in files: hand-edited ones are refused in words, places are checked early, replays go anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("records") / "tiny")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "job.md").write_text("We need a Rust engineer.\n")
    people = [{"id": "rust", "text": "Ten years of Rust."}, {"id": "nurse", "text": "Ten years of nursing. " * 30}]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(p) + "\n" for p in people))
    return str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a good record, made once."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "job.md").write_text("We need a Rust engineer.\n")
    (folder / "people.jsonl").write_text('{"id": "a", "text": "Rust"}\n{"id": "b", "text": "Nursing"}\n')
    names = [str(folder / "job.md"), str(folder / "people.jsonl")]
    assert main(["rank", *names, "--model", str(model), "--record", str(folder / "r.json")]) == 0
    return (folder / "r.json").read_text()


def removed(*path: Any) -> Callable[[Any], None]:
    def edit(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return edit


def changed(*path: Any, to: Any) -> Callable[[Any], None]:
    def edit(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = to

    return edit


BAD_EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no labels": (removed("options", "labels"), "the record has no `options.labels`"),
    "no text": (removed("candidates", 1, "text"), "the record has no `candidates[1].text`"),
    "no query": (removed("query"), "the record has no `query`"),
    "no precision": (removed("options", "engine", "precision"), "the record has no `options.engine.precision`"),
    "no digest": (removed("stack", "base_digest"), "the record has no `stack.base_digest`"),
    "no warnings": (removed("warnings"), "the record has no `warnings`"),
    "no ledger": (removed("results", 0, "ledger"), "the record has no `results[0].ledger`"),
    "results a number": (changed("results", to=5), "`results` is `5` but must be an array"),
    "candidate a string": (changed("candidates", 0, to="x"), '`candidates[0]` is `"x"` but must be an object'),
    "options null": (changed("options", to=None), "`options` is `null` but must be an object"),
    "text a number": (changed("candidates", 0, "text", to=7), "`candidates[0].text` is `7` but must be a string"),
    "facts a list": (changed("candidates", 0, "facts", to=[]), "`candidates[0].facts` is `[]` but must be an object"),
    "a label a number": (changed("options", "labels", 1, to=7), "`options.labels[1]` is `7`"),
    "length true": (changed("options", "engine", "max_model_len", to=True), "is `true` but must be an integer"),
    "adapter a number": (changed("options", "adapter", to=1), "`options.adapter` is `1` but must be a string or null"),
    "precision unknown": (changed("options", "engine", "precision", to="vague"), "`precision` is `vague`"),
    "score a number": (changed("results", 0, "score", to=0.5), "`results[0].score` is `0.5` but must be a string"),
}


@pytest.mark.parametrize("name", BAD_EDITS)
def test_a_record_of_a_wrong_shape_is_refused_with_the_place(
    name: str, recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, says = BAD_EDITS[name]
    record = json.loads(recorded)
    edit(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "r.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (changed("results", 0, "ledger", 0, "weight", to=0.5), "candidate `a`: ledger"),
        (changed("warnings", to=[]), "warnings: "),
        (changed("results", 1, "truncated_tokens", to=3), "candidate `b`: truncated_tokens `3` then, `0` now"),
    ],
)
def test_a_changed_ledger_or_warning_is_a_difference(
    edit: Callable[[Any], None], says: str, recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(recorded)
    edit(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "r.json")]) == 1
    out = capsys.readouterr().out
    assert says in out
    assert "1 differences" in out


def test_the_same_model_in_another_place_is_no_difference(
    recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = make_tiny_model(tmp_path / "moved")
    (tmp_path / "r.json").write_text(recorded)
    assert main(["replay", str(tmp_path / "r.json"), "--model", str(elsewhere)]) == 0
    assert "identical: 2 candidates" in capsys.readouterr().out


def test_a_record_made_with_relative_paths_replays_from_another_directory(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    make_tiny_model(here / "tiny")
    make_tiny_adapter(here / "talent")
    monkeypatch.chdir(here)
    for name, options in (("bare", []), ("adapted", ["--adapter", "talent"])):
        record = str(there / f"{name}.json")
        monkeypatch.chdir(here)
        assert main(["rank", *files, "--model", "tiny", *options, "--record", record]) == 0
        monkeypatch.chdir(there)
        assert main(["replay", f"{name}.json"]) == 0, name
        assert "identical: 2 candidates" in capsys.readouterr().out


# ---- where records go ----


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_opened(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist either: what is said first was checked first."""
    before = sorted(tmp_path.iterdir())
    for place in (
        tmp_path / "none" / "x.json",
        "/proc/nowhere/x.json",
        tmp_path,
        Path(files[0]) / "x.json",
        "/dev/null",
    ):
        assert main(["rank", *files, "--model", "no-such-model", "--record", str(place)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: `{place}` cannot be written: ")
        assert "\nhint: " in captured.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_check_leaves_an_older_record_alone_when_ranking_fails(files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("older")
    assert main(["rank", *files, "--model", "no-such-model", "--record", str(tmp_path / "r.json")]) == 2
    assert (tmp_path / "r.json").read_text() == "older"


def test_the_answer_is_printed_although_the_record_can_no_longer_be_written(
    model: Path,
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "vanishes"
    folder.mkdir()
    from uma_engine.tasks.api import Engine

    close = Engine.close

    def close_and_remove(engine: Engine) -> None:
        close(engine)
        folder.rmdir()

    monkeypatch.setattr(Engine, "close", close_and_remove)
    assert main(["rank", *files, "--model", str(model), "--record", str(folder / "r.json")]) == 2
    captured = capsys.readouterr()
    assert "candidates/s" in captured.out
    assert "cannot be written" in captured.err


def test_the_record_is_written_although_the_reader_of_the_answer_left(
    model: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "uma_engine.cli.main", "rank", *files, "--model", str(model), "--record", "r.json"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
    assert main(["replay", str(tmp_path / "r.json")]) == 0


def test_a_link_to_a_record_stays_a_link(model: Path, files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert main(["rank", *files, "--model", str(model), "--record", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["query"].startswith("We need")
