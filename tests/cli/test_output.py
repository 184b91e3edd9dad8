"""What the commands write and where: tables of every width, closed and full outputs, and choices that do not exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model
from uma_engine.cli.main import _parser, main

ROOT = Path(__file__).resolve().parents[2]
JOB = "# Senior Rust engineer\n\nWe need a senior Rust engineer who knows databases, Linux and networks.\n"
PEOPLE = [
    {"id": "rust", "name": "Ada Example", "headline": "Engineer", "summary": "Ten years of Rust and Linux."},
    {"id": "nurse", "text": "Ten years of nursing in a hospital, careful and kind. " * 30},
    {"id": "tax", "text": "安全なシステムを作る開発者です " * 5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("output") / "tiny")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "job.md").write_text(JOB)
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PEOPLE))
    return str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")


def uma(*arguments: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, through a shell that redirects its standard streams."""
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, "-m", "uma_engine.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, stdin=subprocess.DEVNULL)


# ---- tables ----


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_the_table_shows_place_score_and_cut_at_every_width(
    width: int, model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["rank", *files, "--model", str(model), "--max-tokens-per-candidate", "60"]) == 0
    out = capsys.readouterr().out
    assert all(cell_len(line) <= width for line in out.splitlines())
    assert all(word in out.split("candidate ")[0] for word in ("#", "score"))
    rows = [line for line in out.splitlines() if re.match(r"│ [123] │ [01]\.\d{4} │ ", line)]
    assert len(rows) == 3
    for row in rows:
        for name in ("rust", "nurse", "tax"):
            if f" {name}" in row:
                assert row.endswith(" tok │") == (name != "rust")
    if width < 90:
        assert "why, in numbers" not in out
    reasons = re.findall(r"yes [+-]\d+\.\d\d  no [+-]\d+\.\d\d  mean [+-]\d\.\d{4}", out)
    assert len(reasons) == (3 if width >= 60 else 0)
    assert ("wider terminal" in out) == (width < 60)


def test_the_cut_column_is_left_out_when_nothing_was_cut(
    model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", *files, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "cut" not in out
    assert "tok │" not in out


def test_json_has_the_score_of_everyone_in_input_order_beside_the_best(
    model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", *files, "--model", str(model), "--json", "--top-n", "1", "--max-tokens-per-candidate", "60"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    everyone = answer["all_results"]
    assert [(r["index"], r["id"]) for r in everyone] == [(0, "rust"), (1, "nurse"), (2, "tax")]
    assert all(set(r) == {"index", "id", "score", "truncated_tokens"} for r in everyone)
    assert [r["truncated_tokens"] > 0 for r in everyone] == [False, True, True]
    (best,) = answer["results"]
    assert best["score"] == max(r["score"] for r in everyone) == everyone[best["index"]]["score"]


# ---- streams that are closed, full, left or not Unicode ----


def test_a_closed_standard_input_is_a_typed_error(files: tuple[str, str]) -> None:
    for arguments in (["rank", files[0], "-"], ["rank", "-", files[1]], ["generate", "-"]):
        ended = uma(*arguments, redirect="<&-")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: standard input is closed\nhint: ")


def test_a_closed_standard_output_is_told_on_standard_error(files: tuple[str, str]) -> None:
    for arguments in (["models"], ["models", "--json"], ["rank", *files]):
        ended = uma(*arguments, redirect=">&-")
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: standard output is closed\nhint: ")
    assert uma("models", redirect=">&- 2>&-").returncode == 1


@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"], ["doctor"]])
def test_a_full_standard_output_is_an_error_with_a_hint(arguments: list[str]) -> None:
    ended = uma(*arguments, redirect="> /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: standard output cannot be written: No space left on device\nhint: ")
    assert "Exception ignored" not in ended.stderr


def test_a_reader_that_left_ends_table_json_and_text_alike(model: Path, files: tuple[str, str]) -> None:
    rank = ["rank", *files, "--model", str(model)]
    for arguments in (rank, [*rank, "--json"], ["models"], ["generate", "yes", "--raw", "--model", str(model)]):
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(
            [sys.executable, "-m", "uma_engine.cli.main", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (141, ""), arguments


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_unicode_costs_characters_but_never_the_answer(
    env: Mapping[str, str], model: Path, files: tuple[str, str]
) -> None:
    ended = uma("rank", *files, "--model", str(model), "--max-tokens-per-candidate", "60", **env)
    assert ended.returncode == 0, ended.stderr
    assert "rust" in ended.stdout
    Path(files[1]).write_text(json.dumps({"id": "Zoë", "text": "Rust"}) + "\n")
    ended = uma("rank", *files, "--model", str(model), "--json", **env)
    assert json.loads(ended.stdout)["results"][0]["id"] == "Zoë"


# ---- choices that do not exist ----


@pytest.mark.parametrize("variable", ["UMA_BACKEND", "UMA_ISA"])
def test_an_unknown_back_end_or_instruction_set_is_said_plainly(
    variable: str, model: Path, files: tuple[str, str]
) -> None:
    for arguments in (["rank", *files, "--model", str(model)], ["doctor"]):
        ended = uma(*arguments, **{variable: "foo"})
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: ")
        assert "`foo`" in ended.stderr
        assert f"hint: `{variable}=foo` in the environment" in ended.stderr


@pytest.mark.parametrize("threads", ["0", "-1", "1000000000000"])
def test_a_number_of_threads_that_no_machine_runs_is_refused(
    threads: str, model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", *files, "--model", str(model), "--threads", threads]) == 2
    assert f"`--threads` is `{threads}` but must be an integer from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["abc", "0", "4abc", "2.5", "9" * 5000])
def test_a_number_of_threads_in_the_environment_that_is_none_is_refused_and_told_by_doctor(
    threads: str,
    model: Path,
    files: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UMA_NUM_THREADS", threads)
    assert main(["rank", *files, "--model", str(model)]) == 2
    assert f"`UMA_NUM_THREADS` is `{threads[:80]}` but must be an integer from 1 to" in capsys.readouterr().err
    assert main(["rank", *files, "--model", str(model), "--threads", "1"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["machine"]["UMA_NUM_THREADS"]
    assert found.startswith(f"{threads} (not a number of threads")


# ---- labels ----


def test_doctor_tells_whether_a_word_can_be_a_label(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from uma_engine.catalog import open_model

    tokenizer = open_model(model).tokenizer
    assert main(["doctor", "--label", "yes", "--model", str(model)]) == 0
    assert f"single token of `{model}`, id {tokenizer.single_token('yes')}" in capsys.readouterr().out
    assert main(["doctor", "--label", "absolutely", "--model", str(model)]) == 1
    assert f"is {len(tokenizer.encode('absolutely'))} tokens" in capsys.readouterr().out
    assert main(["doctor", "--label", "no", "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "label": "no",
        "model": str(model),
        "fits": True,
        "token_ids": tokenizer.encode("no"),
    }
    assert main(["doctor", "--model", str(model)]) == 2
    assert "without `--label`" in capsys.readouterr().err


def test_doctor_reads_no_weights_for_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_tiny_model(tmp_path / "tiny")
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN, which whoever reads this tensor refuses
    weights.write_bytes(data)
    assert main(["doctor", "--label", "yes", "--model", str(directory)]) == 0
    assert main(["generate", "yes", "--model", str(directory)]) == 2


def test_every_command_and_option_that_a_message_names_exists() -> None:
    """Texts such as `uma doctor --label WORD` in the package are held against the parser."""
    commands = next(a.choices for a in _parser()._actions if a.dest == "command")
    assert isinstance(commands, dict)
    named = 0
    for file in sorted((ROOT / "uma_engine").rglob("*.py")):
        for command, rest in re.findall(r"`uma ([a-z]+)([^`]*)`", file.read_text()):
            assert command in commands, f"{file}: `uma {command}`"
            for option in re.findall(r"--[a-z-]+", rest):
                assert option in commands[command]._option_string_actions, f"{file}: `uma {command} {option}`"
            named += 1
    assert named > 5


def test_help_is_quick_and_needs_no_torch() -> None:
    program = (
        "import sys; from uma_engine.cli.main import _parser; from uma_engine.catalog import DEFAULT_MODEL; "
        "assert DEFAULT_MODEL in _parser().parse_args(['rank', 'a', 'b']).model; "
        "print(sorted({'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
