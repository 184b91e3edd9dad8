"""The entry of a cluster ends by `kill -9`: nobody hangs, nothing is left behind, and the next one has the stack that there was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uma_engine.errors import EngineUnavailable

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray.serve")
pytest.importorskip("uvicorn")

from tests.scale.running import (  # noqa: E402
    ADAPTERS,
    HEADERS,
    OPERATOR,
    QUERIES,
    ROOT,
    TEXTS,
    Load,
    Truth,
    engines,
    entry,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENDS_S = 30


def swap_to_two(address: str, home: Path) -> str:
    """The digest of the base that answers then."""
    with httpx.Client(base_url=address, headers=OPERATOR, timeout=200) as http:
        body = {"model": str(home / "two"), "adapters": {n: n for n in ADAPTERS[1:]}, "wait": True}
        status = http.post("/admin/swap", json=body).json()
        assert status["swap"]["phase"] == "done", status
        answer = http.post("/v1/rank", json={"query": QUERIES[0], "candidates": TEXTS}).json()
        return str(answer["stack"]["base_digest"])


def kill_under_load(child: subprocess.Popen[str], address: str) -> list[Any]:
    """What became of the requests: a status, or the error that ended one. All have ended."""
    ends: list[Any] = []

    def ask(query: str) -> None:
        with httpx.Client(base_url=address, headers=HEADERS, timeout=ENDS_S) as http:
            while True:
                try:
                    ends.append(http.post("/v1/rank", json={"query": query, "candidates": TEXTS}).status_code)
                except httpx.TransportError as error:
                    ends.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(query,)) for query in QUERIES[:4]]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for thread in threads:
        thread.join(ENDS_S + 10)
        assert not thread.is_alive(), "a request hangs"
    return ends


def check_ends(ends: list[Any]) -> None:
    assert ends.count(200) > 4
    errors = [e for e in ends if e != 200]
    assert len(errors) == 4
    assert not any(isinstance(e, httpx.TimeoutException) for e in errors), errors


def check_next(home: Path, arguments: tuple[str, ...], truth: Truth, base: str) -> None:
    """The next entry answers with `base`, and leaves no engine behind when it is asked to end."""
    with entry(home, *arguments) as (child, address):
        with Load(address, truth, threads=2) as load:
            time.sleep(2)
        assert set(load.bases) == {base}
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    wait_for(lambda: not engines(), ENDS_S)


def test_with_engines_of_its_own(home: Path, truth: Truth, tmp_path: Path) -> None:
    arguments = ("--replicas", "2", "--state", str(tmp_path / "state.json"))
    with entry(home, *arguments) as (child, address):
        base = swap_to_two(address, home)
        assert len(engines()) == 2
        check_ends(kill_under_load(child, address))
    wait_for(lambda: not engines(), ENDS_S)
    check_next(home, arguments, truth, base)


def test_a_cluster_that_is_not_there(home: Path) -> None:
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(home / "one"), "--port", "0"]
    command += ["--keys", str(home / "keys"), "--replicas", "1", "--ray-address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == EngineUnavailable.exit_code
    assert "127.0.0.1:1" in done.stderr
    assert "--ray-address" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def ray_address(tmp_path: Path) -> Iterator[str]:
    """A cluster that was there before. It ends with its command: `ray stop` would end those of others as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=3",
    ]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    said = tmp_path / "ray.out"
    with said.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as child:
        try:
            wait_for(lambda: "runtime started" in said.read_text() or child.poll() is not None)
            assert child.poll() is None, said.read_text()
            yield f"127.0.0.1:{port}"
        finally:
            child.terminate()
            try:
                child.wait(60)
            finally:
                child.kill()


def test_engines_of_a_cluster_wait_for_the_next_entry(
    ray_address: str, home: Path, truth: Truth, tmp_path: Path
) -> None:
    arguments = ("--replicas", "2", "--state", str(tmp_path / "state.json"), "--ray-address", ray_address)
    with entry(home, *arguments) as (child, address):
        base = swap_to_two(address, home)
        check_ends(kill_under_load(child, address))
    time.sleep(3)
    assert len(engines()) == 2, "they are the cluster's"
    check_next(home, arguments, truth, base)
