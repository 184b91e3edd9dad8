"""`uma serve` as a process: it starts, answers, ends cleanly, and does not open itself to everybody."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import tiny_dir  # noqa: F401
from uma_engine.cli.main import _parser, main
from uma_engine.cli.serve_options import PREFIX, option_names

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def _started(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(model), "--port", "0", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"https?://[\d.]+:\d+", line)
        assert found, line
        yield process, found.group()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(tiny_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:  # noqa: F811
    with _started(tiny_dir) as started:
        yield started


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


def test_flags_go_before_the_environment_and_that_before_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 9001\nmodel = "a"\nalias = ["x", "y"]\nmax_body_mb = 2\n')

    def check(*arguments: str) -> str:
        assert main(["serve", "--check", "--config", str(file), *arguments]) == 0
        return capsys.readouterr().out

    assert "127.0.0.1:9001, model a" in check()
    monkeypatch.setenv("UMA_SERVE_PORT", "9002")
    assert "127.0.0.1:9002, model a" in check()
    assert "127.0.0.1:9003, model b" in check("--port", "9003", "--model", "b")
    for text in ("port = true\n", "ports = 1\n", "port = [1]\n", "port = \n", 'device = "tpu"\n'):
        file.write_text(text)
        assert main(["serve", "--check", "--config", str(file)]) == 2, text
    file.write_text("")
    monkeypatch.setenv("UMA_SERVE_PRECISION", "wrong")
    assert main(["serve", "--check"]) == 2
    monkeypatch.delenv("UMA_SERVE_PRECISION")
    monkeypatch.setenv("UMA_SERVE_PROT", "1")
    assert main(["serve", "--check"]) == 2
    assert "no option" in capsys.readouterr().err


def test_every_option_and_the_deployment_files_are_documented() -> None:
    parser = _parser()._subparsers._group_actions[0].choices["serve"]  # type: ignore[union-attr,index]
    guide = (ROOT / "docs" / "guide-operator.md").read_text()
    for name in option_names(parser):
        assert f"`{PREFIX}{name.upper()}`" in guide, name
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for path in (ROOT / "deploy").iterdir():
        commands = [line for line in path.read_text().splitlines() if "uma serve" in line]
        assert {flag for line in commands for flag in re.findall(r"(?<![\w-])--[a-z-]+", line)} <= flags, path
        variables = {v.removeprefix(PREFIX).lower() for v in re.findall(PREFIX + r"[A-Z_]+", path.read_text())}
        assert variables <= {*option_names(parser), "config"}, path


def test_over_tls(tiny_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert main(["serve", "--check", "--tls-cert", str(certificate)]) == 2
    assert main(["serve", "--check", "--tls-cert", str(key), "--tls-key", str(certificate)]) == 2
    with _started(tiny_dir, "--tls-cert", str(certificate), "--tls-key", str(key)) as (_, address):
        assert address.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{address}/readyz", verify=context).text == "ready\n"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/readyz")
