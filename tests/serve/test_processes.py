"""Several processes: the engine process is killed, stopped and made to hang, and no request is lost, doubled or left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import adapter_dirs, tiny_dir  # noqa: F401
from tests.serve.test_process import _started
from tests.tiny import make_tiny_model

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from uma_engine.serve.processes import frames  # noqa: E402
from uma_engine.serve.processes.front import repeatable  # noqa: E402
from uma_engine.serve.processes.link import MOST_QUEUED, Reply, SlowReader  # noqa: E402

RANK, ADMIN = "rank-secret-0123456789", "admin-secret-0123456789"
PEOPLE = [f"A candidate who knows Rust {i} " * 20 for i in range(24)]


def children(pid: int, role: str) -> list[int]:
    """Processes of `uma serve`, told apart by torch: a front end has none."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                has_torch = "libtorch" in stat.with_name("maps").read_text()
                if has_torch == (role == "engine"):
                    found.append(int(stat.parent.name))
    return found


@pytest.fixture
def server(
    tiny_dir: Path,  # noqa: F811
    adapter_dirs: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Any, Any]]:
    keys = tmp_path / "keys"
    keys.write_text(f"shop rank {RANK}\noperator admin {ADMIN}\n")
    root = adapter_dirs["alpha"].parent
    flags = [
        "--front-ends",
        "2",
        "--keys",
        str(keys),
        "--adapter-root",
        str(root),
        "--hang-timeout",
        "4" if "hangs" in request.node.name else "60",
    ]
    with (
        _started(tiny_dir, *flags) as (process, address),
        httpx.Client(base_url=address, headers={"authorization": f"Bearer {RANK}"}, timeout=120) as client,
    ):
        yield process, client
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def ask(client: Any) -> Any:
    return client.post("/v1/rank", json={"query": "Rust", "candidates": PEOPLE, "top_n": 3})


def told(answer: Any) -> Any:
    """An answer without what is another one every time."""
    assert answer.status_code == 200, answer.text
    return [(r["id"], r["score"], r["logits"]) for r in answer.json()["results"]]


def test_front_ends_have_no_torch_and_the_engine_is_one(server: tuple[Any, Any]) -> None:
    process, client = server
    assert told(ask(client))
    assert len(children(process.pid, "engine")) == 1
    assert len(children(process.pid, "front")) == 2
    assert client.get("/livez").text == "ok\n"
    assert client.get("/readyz").text == "ready\n"
    assert "Content-Security-Policy".lower() in client.get("/").headers
    assert client.get("/metrics").status_code == 200
    assert httpx.get(f"{client.base_url}/v1/models").status_code == 401
    answer = client.post(
        "/v1/rank", json={"query": "Rust", "candidates": PEOPLE, "top_n": -1}, headers={"x-request-id": "mine"}
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "mine")
    assert client.post("/v1/rank", content=b"x" * (9 * 2**20)).status_code == 413


def test_a_killed_engine_process_loses_no_request(server: tuple[Any, Any]) -> None:
    process, client = server
    admin = {"authorization": f"Bearer {ADMIN}"}
    loaded = client.post("/admin/adapters", json={"name": "alpha", "path": "alpha"}, headers=admin)
    assert loaded.status_code == 200, loaded.text
    expected = told(ask(client))
    answers: list[Any] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(ask(client))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.7)
        (engine,) = children(process.pid, "engine")
        os.kill(engine, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert len(answers) > 8
    assert all(told(answer) == expected for answer in answers)
    assert client.get("/v1/adapters").json() == {"adapters": ["alpha"]}, "the new process has what the old one had"


def test_a_stream_goes_on_where_it_was(server: tuple[Any, Any]) -> None:
    process, client = server
    body = {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "prompt": "Rust",
        "max_tokens": 400,
        "stream": True,
    }
    asked = {"json": body, "headers": {"x-request-id": "same"}}

    def texts(kill: bool) -> str:
        found, killed = [], not kill
        with client.stream("POST", "/v1/completions", **asked) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    data = json.loads(line.removeprefix("data: "))
                    assert "error" not in data, data
                    found.append(data["choices"][0]["text"])
                    if len(found) > 5 and not killed:
                        killed = True
                        os.kill(children(process.pid, "engine")[0], signal.SIGKILL)
        assert killed
        return "".join(found)

    assert texts(kill=True) == texts(kill=False)


def test_a_kill_in_the_middle_of_a_swap_leaves_the_old_base(server: tuple[Any, Any], tmp_path: Path) -> None:
    """What changes the server is not done twice: it ends in an error that says so."""
    process, client = server
    other = make_tiny_model(tmp_path / "other", seed=9)
    before = client.get("/v1/models").json()
    expected = told(ask(client))
    admin = {"authorization": f"Bearer {ADMIN}"}
    answers = []
    body = {"model": str(other), "wait": True}
    slow = body | {"adapters": {f"n{i}": "alpha" for i in range(60)}}  # each is tested: there is a middle to kill in
    thread = threading.Thread(target=lambda: answers.append(client.post("/admin/swap", json=slow, headers=admin)))
    thread.start()
    while client.get("/admin/swap/status", headers=admin).json()["swap"]["phase"] == "idle":
        pass
    os.kill(children(process.pid, "engine")[0], signal.SIGKILL)
    thread.join(60)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["type"] == "EngineUnavailable"
    assert told(ask(client)) == expected
    assert client.get("/v1/models").json() == before
    done = client.post("/admin/swap", json=body, headers=admin)
    assert done.json()["swap"]["phase"] == "done", done.text
    (engine,) = children(process.pid, "engine")
    os.kill(engine, signal.SIGKILL)
    assert told(ask(client)) != expected
    assert client.get("/v1/models").json() != before, "the last swap outlives a kill"


def test_an_engine_that_hangs_is_started_again(server: tuple[Any, Any]) -> None:
    process, client = server
    expected = told(ask(client))
    (engine,) = children(process.pid, "engine")
    os.kill(engine, signal.SIGSTOP)
    assert told(ask(client)) == expected
    assert children(process.pid, "engine") != [engine]


def test_nothing_outlives_a_supervisor_that_was_killed(server: tuple[Any, Any]) -> None:
    process, _ = server
    everybody = children(process.pid, "engine") + children(process.pid, "front")
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in everybody):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.wait = lambda timeout=None: 0  # the fixture's check is of another end


def test_a_base_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--front-ends", "1", "--port", "0"]
    done = subprocess.run([*command, "--model", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search("error: ", done.stderr)


def test_frames_are_data_or_an_error() -> None:
    async def read(data: bytes) -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await frames.read_frame(reader)

    for bad in (b"", b"\0\0\0\5ab", b"\0\0\0\1\xc1", b"\xff\xff\xff\xff", b"\0\0\0\7\x92\xa5hello"):
        with pytest.raises(ConnectionError):
            asyncio.run(read(bad))


def test_which_requests_are_asked_twice() -> None:
    def of(method: str, path: str) -> bool:
        return repeatable(frames.Ask(1, method, path, b"", [], b""))

    assert of("POST", "/v1/rank")
    assert of("POST", "/v1/completions")
    assert of("GET", "/admin/swap/status")
    assert not of("POST", "/admin/adapters")
    assert not of("DELETE", "/admin/adapters/a")


def test_a_reader_who_does_not_read_is_left() -> None:
    left = []
    reply = Reply(lambda: left.append(1))
    reply.feed(frames.Head(1, 200, []))
    for _ in range(3):
        reply.feed(frames.Part(1, b"x" * (MOST_QUEUED // 2), False))

    async def rest() -> None:
        while True:
            await reply.next()

    with pytest.raises(SlowReader):
        asyncio.run(rest())
    assert left
