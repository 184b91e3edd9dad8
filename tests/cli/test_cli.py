"""The `uma` command as a person meets it: tables, JSON, records, and bad input in words instead of tracebacks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine.cli.main import main

JOB = "# Senior Rust engineer\n\nWe need a senior Rust engineer who knows databases, Linux and networks.\n"
PEOPLE = [
    {"id": "rust", "text": "Ten years of Rust and Linux.", "facts": {"rate": 80}},
    {"id": "nurse", "text": "Ten years of nursing in a hospital, careful and kind. " * 30},
    {
        "id": "tax",
        "name": "Ana Lima",
        "headline": "Accountant",
        "summary": "Bookkeeping and taxes.",
        "skills": ["payroll"],
        "rate": 40,
    },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "job.md").write_text(JOB)
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PEOPLE))
    return str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")


def test_rank_prints_a_table_with_warnings_and_the_cost(
    model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["rank", *files, "--model", str(model), "--max-tokens-per-candidate", "60"]) == 0
    out = capsys.readouterr().out
    assert "Senior Rust engineer" in out
    for word in (
        "rust",
        "nurse",
        "Ana Lima, Accountant",
        "mean ",
        "tok",
        "not advice",
        "candidates/s",
        "computed",
        "reused",
    ):
        assert word in out, word
    assert out.index("score") < out.index("candidates/s")


def test_rank_gives_json_that_a_program_can_read(
    model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", *files, "--model", str(model), "--json", "--top-n", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["results"]) == 2
    assert answer["results"][0]["score"] >= answer["results"][1]["score"]
    assert answer["usage"]["reused_tokens"] > 0
    assert answer["stack"]["base_digest"]


def test_standard_input_csv_and_an_adapter(
    model: Path,
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "people.csv").write_text("id,text\na,Rust and Linux\nb,Nursing\n")
    adapter = make_tiny_adapter(tmp_path / "talent", rank=100)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JOB.encode()), encoding="utf-8"))
    arguments = ["rank", "-", str(tmp_path / "people.csv"), "--model", str(model), "--adapter", str(adapter), "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["stack"]["adapter"] == "talent"
    assert answer["warnings"] == []


def test_a_record_is_replayed_and_a_changed_one_is_noticed(
    model: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    assert main(["rank", *files, "--model", str(model), "--record", str(record)]) == 0
    assert main(["replay", str(record)]) == 0
    assert "identical: 3 candidates" in capsys.readouterr().out
    data = json.loads(record.read_text())
    data["candidates"][0]["text"] += " And Go."
    record.write_text(json.dumps(data))
    assert main(["replay", str(record)]) == 1
    assert "candidate `rust`" in capsys.readouterr().out


def test_generate_streams_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "yes no", "--model", str(model), "--max-tokens", "5", "--raw"]) == 0
    first = capsys.readouterr().out
    assert main(["generate", "yes no", "--model", str(model), "--max-tokens", "5", "--raw"]) == 0
    assert capsys.readouterr().out == first


def test_doctor_and_models_tell_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {op["op"] for op in found["ops"]} >= {"linear", "attention.tree", "lora", "label_head"}
    assert all(op["reason"] for op in found["ops"])
    assert main(["doctor"]) == 0
    assert "attention.tree" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert names >= {"smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "minilm-l6"}
    assert main(["models"]) == 0


def bad_cases() -> dict[str, tuple[dict[str, bytes], list[str], str]]:
    """Name -> files to write, arguments, what the message must say."""
    ok = {"job.md": JOB.encode(), "p.jsonl": b'{"id": "a", "text": "Rust"}\n'}
    return {
        "empty job": ({**ok, "job.md": b""}, ["job.md", "p.jsonl"], "job.md"),
        "no job": (ok, ["nowhere.md", "p.jsonl"], "nowhere.md"),
        "no candidates": ({**ok, "p.jsonl": b""}, ["job.md", "p.jsonl"], "p.jsonl"),
        "huge candidate": (
            {**ok, "p.jsonl": b'{"text": "' + b"x" * 10_000_000 + b'"}\n'},
            ["job.md", "p.jsonl"],
            "characters",
        ),
        "invalid UTF-8": ({**ok, "p.jsonl": b'{"text": "\xff"}\n'}, ["job.md", "p.jsonl"], "UTF-8"),
        "NaN fact": ({**ok, "p.jsonl": b'{"text": "x", "rate": NaN}\n'}, ["job.md", "p.jsonl"], "NaN"),
        "duplicate ids": (
            {**ok, "p.jsonl": b'{"id":"a","text":"x"}\n{"id":"a","text":"y"}\n'},
            ["job.md", "p.jsonl"],
            "`a`",
        ),
        "unknown adapter": (ok, ["job.md", "p.jsonl", "--adapter", "no-such-dir"], "no-such-dir"),
        "unknown model": (ok, ["job.md", "p.jsonl", "--model", "smollm3-135m"], "smollm2-135m"),
        "pickle": ({**ok, "m.bin": b"\x80\x02"}, ["job.md", "p.jsonl", "--model", "m.bin"], "pickle"),
        "corrupt GGUF": (
            {**ok, "m.gguf": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64},
            ["job.md", "p.jsonl", "--model", "m.gguf"],
            "m.gguf",
        ),
        "truncated GGUF": ({**ok, "m.gguf": b"GG"}, ["job.md", "p.jsonl", "--model", "m.gguf"], "m.gguf"),
        "labels of two tokens": (ok, ["job.md", "p.jsonl", "--labels", "absolutely,never"], "exactly one"),
        "both from standard input": (ok, ["-", "-"], "standard input"),
        "record of another kind": ({**ok, "r.json": b"{}"}, ["replay:r.json"], "decision record"),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_is_a_message_with_a_hint_and_no_traceback(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, arguments, says = bad_cases()[name]
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    if arguments[0].startswith("replay:"):
        command = ["replay", arguments[0].removeprefix("replay:")]
    else:
        command = ["rank", *arguments, *([] if "--model" in arguments else ["--model", str(model)])]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files), "nothing may be left behind"


@pytest.mark.parametrize("damage", ["truncated", "flipped header", "absurd header", "NaN", "wrong shape"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make_tiny_model(tmp_path / "damaged", **({"intermediate_size": 128} if damage == "wrong shape" else {}))
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        data = data[:-1000]
    elif damage == "flipped header":
        data[20] ^= 0xFF
    elif damage == "absurd header":
        data[:8] = (2**62).to_bytes(8, "little")
    elif damage == "NaN":
        data[-4:] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(data)
    assert main(["rank", *files, "--model", str(directory)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


def test_a_record_that_cannot_be_written_is_an_error(
    model: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", *files, "--model", str(model), "--record", "/proc/nowhere/record.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_in_the_middle_of_a_rank_is_clean(model: Path, files: tuple[str, str], tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"id": str(i), "text": f"{i} years of Rust " * 40}) + "\n" for i in range(20_000))
    )
    command = [
        sys.executable,
        "-m",
        "uma_engine.cli.main",
        "rank",
        files[0],
        str(many),
        "--model",
        str(model),
        "--record",
        "r.json",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are born with it ignored
    )
    # Time of its own, not of the clock: on a busy machine six seconds may not be enough for its imports.
    while process.poll() is None and cpu_seconds(process.pid) < 6:
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert out == ""
    assert not list(tmp_path.glob("*r.json*"))


def test_importing_the_package_is_quick_and_torch_free() -> None:
    program = "import sys, time; t = time.perf_counter(); import uma_engine; s = time.perf_counter() - t; print(s, 'torch' in sys.modules)"
    seconds, torch_imported = min(
        (
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(3)
        ),
        key=lambda line: float(line[0]),
    )
    assert float(seconds) <= 0.5
    assert torch_imported == "False"
