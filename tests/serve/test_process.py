"""`uma serve` as a process: it starts, answers, ends cleanly, and does not open itself to everybody."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import tiny_dir  # noqa: F401
from uma_engine.cli.main import main

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tiny_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:  # noqa: F811
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(tiny_dir), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://[\d.]+:\d+", line)
    assert found, line
    yield process, found.group()
    process.kill()
    process.wait()


def test_it_answers_and_ends_when_it_is_told_to(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    people = [f"A candidate who knows Rust {i} " * 30 for i in range(60)]
    assert httpx.get(f"{address}/readyz").text == "ready\n"
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{address}/v1/rank", json={"query": "Rust", "candidates": people}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    while "uma:num_requests_running 0" in httpx.get(f"{address}/metrics").text and thread.is_alive():
        pass
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].status_code == 200, "what has begun is finished"
    assert len(answers[0].json()["results"]) == 60
    assert process.wait(timeout=60) == 0


def test_nobody_from_outside_without_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--port", "70000"],
        ["--deadline", "0"],
        ["--keys", str(tmp_path / "none")],
        ["--adapter-root", str(tmp_path / "none")],
    ):
        assert main(["serve", "--check", *arguments]) == 2, arguments
        assert "hint" in capsys.readouterr().err or arguments[0] not in ("--host",)
    (tmp_path / "keys").write_text("a rank 0123456789abcdef\n")
    assert main(["serve", "--check", "--host", "0.0.0.0", "--keys", str(tmp_path / "keys")]) == 0
    assert "fine: 1 keys" in capsys.readouterr().out
