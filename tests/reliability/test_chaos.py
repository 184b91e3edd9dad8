"""Chaos against a whole `uma serve`: kills, hangs, storms, damage and noise; each answer is what the base and adapter it names say.

`make reliability` runs the short form, `make reliability FORM=long` the long one and keeps its numbers in bench/results/reliability.jsonl.
The oracle: answers differ for each base and adapter and are computed beforehand by the engine alone; an answer under chaos is one of these
to the bit, or a typed error, and comes in the time that was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.rows import append_row
from tests.serve.test_process import _started
from tests.serve.test_processes import children
from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine
from uma_engine.errors import AdapterError

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.slow, pytest.mark.reliability, pytest.mark.timeout(3600)]

LONG = os.environ.get("UMA_RELIABILITY") == "long"
RANK, NOISY, ADMIN = "rank-secret-0123456789", "noisy-secret-0123456789", "admin-secret-0123456789"
QUERIES = [f"We need somebody who knows {word}." for word in ("Rust", "nursing", "tax law", "paint", "logistics")]
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law.", "Paints walls."]
ADAPTERS = ("none", "alpha", "beta")
HEADERS = {"authorization": f"Bearer {RANK}"}
Truth = dict[tuple[str, str, str], list[Any]]


def times(short: int, long: int) -> int:
    return long if LONG else short


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chaos")
    for seed, name in enumerate(("one", "two")):
        make_tiny_model(root / name, seed=seed)
    for seed, name in enumerate(ADAPTERS[1:], start=1):
        make_tiny_adapter(root / "adapters" / name, seed=seed, rank=4)
    (root / "keys").write_text(f"shop rank {RANK}\nnoisy rank {NOISY}\noperator admin {ADMIN}\n")
    return root


@pytest.fixture(scope="module")
def truth(home: Path) -> Truth:
    """Results by base digest, adapter and query."""
    found: Truth = {}
    for base in ("one", "two"):
        with Engine(home / base) as engine:
            for name in ADAPTERS[1:]:
                engine.load_adapter(name, home / "adapters" / name)
            for name in ADAPTERS:
                for query in QUERIES:
                    answer = engine.rank(query, TEXTS, adapter=None if name == "none" else name)
                    key = (answer.stack.base_digest, name, query)
                    found[key] = [[r.id, r.score] for r in answer.results]
    assert len({json.dumps(v) for v in found.values()}) == len(found), "no two say the same: a mix-up shows"
    return found


@contextlib.contextmanager
def server(home: Path, *flags: str) -> Iterator[tuple[Any, str]]:
    common = [
        "--front-ends",
        "1",
        "--keys",
        str(home / "keys"),
        "--adapter-root",
        str(home / "adapters"),
        "--register",
        "*",
    ]
    with _started(home / "one", *common, *flags) as (process, address):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            time.sleep(0.05)
        yield process, address
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


class Load:
    """Threads that ask without a pause; every answer is held against the truth."""

    def __init__(self, address: str, truth: Truth, threads: int = 4, adapters: tuple[str, ...] = ADAPTERS) -> None:
        self._address, self._truth, self._adapters = address, truth, adapters
        self._stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()  # what was said where an answer is an error
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)
            assert not thread.is_alive(), "a request hangs"
        assert not self.wrong, self.wrong[:3]

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._address, headers=HEADERS, timeout=130) as client:
            while not self._stop.is_set():
                name, query = rng.choice(self._adapters), rng.choice(QUERIES)
                body = {"query": query, "candidates": TEXTS} | ({} if name == "none" else {"adapter": name})
                began = time.monotonic()
                try:
                    answer = client.post("/v1/rank", json=body)
                except httpx.TransportError as error:
                    self.wrong.append(f"no answer: {error!r}")
                    continue
                self.seconds.append(time.monotonic() - began)
                self.statuses[answer.status_code] += 1
                self.check(answer, name, query)

    def check(self, answer: Any, name: str, query: str) -> None:
        data = answer.json()
        if answer.status_code != 200:
            self.errors[str(data.get("error", {}).get("message"))] += 1
            if "type" not in data.get("error", {}):
                self.wrong.append(f"{answer.status_code} without a type: {answer.text[:200]}")
            return
        said = [[r["id"], r["score"]] for r in data["results"]]
        expected = self._truth.get((data["stack"]["base_digest"], data["stack"]["adapter"] or "none", query))
        if said != expected or (data["stack"]["adapter"] or "none") != name:
            self.wrong.append(f"{name} {query}: {said} instead of {expected}")


def keep(name: str, **numbers: Any) -> None:
    if LONG:
        append_row("reliability", {"bench": "reliability", "case": name, **numbers})


def test_kills(home: Path, truth: Truth) -> None:
    """The engine process is killed while requests run: none is lost, none is wrong."""
    kills = times(4, 50)
    with server(home) as (process, address), Load(address, truth) as load:
        for _ in range(kills):
            time.sleep(1)
            for pid in children(process.pid, "engine"):
                os.kill(pid, signal.SIGKILL)
            wait_ready(address)
    assert set(load.statuses) == {200}, load.errors
    keep("kill", kills=kills, requests=sum(load.statuses.values()), longest_s=round(max(load.seconds), 2))


def wait_ready(address: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TimeoutException):  # its answer waits for an engine process
            if httpx.get(f"{address}/readyz").status_code == 200:
                return
        assert time.monotonic() < deadline, "the engine process does not come back"
        time.sleep(0.05)


def test_hangs(home: Path, truth: Truth) -> None:
    """An engine process that stops moving is replaced, and what it held is answered."""
    hangs = times(1, 10)
    with server(home, "--hang-timeout", "4") as (process, address), Load(address, truth) as load:
        for _ in range(hangs):
            time.sleep(0.5)
            (pid,) = children(process.pid, "engine")
            os.kill(pid, signal.SIGSTOP)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.1)
            wait_ready(address)
    assert set(load.statuses) == {200}, load.errors
    keep("hang", hangs=hangs, requests=sum(load.statuses.values()), longest_s=round(max(load.seconds), 2))


def test_swaps_and_kills(home: Path, truth: Truth) -> None:
    """Bases change under load and the engine process is killed in between: an answer is always whole, of one base."""
    rounds = times(3, 25)
    rng = random.Random(4)
    with (
        server(home) as (process, address),
        Load(address, truth, adapters=("none",)) as load,
        httpx.Client(base_url=address, headers={"authorization": f"Bearer {ADMIN}"}, timeout=120) as admin,
    ):
        for number in range(rounds):
            base = ("two", "one")[number % 2]
            told = admin.post("/admin/swap", json={"model": str(home / base), "wait": True})
            assert told.json()["swap"]["phase"] == "done", told.text
            if rng.random() < 0.5:
                os.kill(children(process.pid, "engine")[0], signal.SIGKILL)
                wait_ready(address)
                time.sleep(1)  # a request that sees three processes end is not asked a fourth time
            if rng.random() < 0.3:
                admin.post("/admin/swap/rollback")
    assert set(load.statuses) == {200}, load.errors
    keep("swap", swaps=rounds, requests=sum(load.statuses.values()))


def test_raw_bytes(home: Path, truth: Truth) -> None:
    """Bytes that are no requests, or almost: answered or dropped, and never a failure of the server."""
    count = times(1500, 100_000)
    rng = random.Random(11)
    body = json.dumps({"query": QUERIES[0], "candidates": TEXTS}).encode()
    head = f"POST /v1/rank HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {RANK}\r\ncontent-type: application/json\r\n".encode()
    whole = head + f"content-length: {len(body)}\r\n\r\n".encode() + body
    failed: Counter[str] = Counter()
    with server(home) as (_, address), Load(address, truth, threads=1) as load:
        host, port = address.removeprefix("http://").split(":")
        for number in range(count):
            data = bytearray(whole)
            kind = number % 5
            if kind == 0:
                data = bytearray(rng.randbytes(rng.randrange(1, 300)))
            elif kind == 1:
                for _ in range(rng.randrange(1, 8)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind == 2:
                data = data[: rng.randrange(len(data))]
            elif kind == 3:  # only the body is damaged
                for _ in range(rng.randrange(1, 6)):
                    data[rng.randrange(len(data) - len(body), len(data))] = rng.randrange(256)
            else:
                place = rng.randrange(len(data))
                data[place:place] = rng.randbytes(rng.randrange(1, 20))
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as raw:
                raw.settimeout(5)
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(64)
                if answer.startswith(b"HTTP/1.1 5") and not answer.startswith(b"HTTP/1.1 504"):
                    failed[answer[:16].decode()] += 1
    assert not failed, failed
    assert set(load.statuses) == {200}
    keep("raw bytes", requests=count)


def test_damaged_adapters(home: Path, tmp_path: Path, truth: Truth) -> None:
    """Thousands of adapters with bytes changed, cut off or put in: each is refused with a reason, or loads and is finite."""
    count = times(150, 5000)
    rng = random.Random(12)
    (root := tmp_path / "adapters").mkdir()
    refused = 0
    with Engine(home / "one") as engine:
        engine.load_adapter("alpha", home / "adapters" / "alpha")
        for number in range(count):
            path = root / str(number % 7)
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(home / "adapters" / "beta", path)
            file = path / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
            data = bytearray(file.read_bytes())
            kind = number % 4
            if kind == 0:
                for _ in range(rng.randrange(1, 5)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind == 1:
                data = data[: rng.randrange(len(data))]
            elif kind == 2:  # the header, where sizes are
                for _ in range(rng.randrange(1, 5)):
                    data[rng.randrange(min(200, len(data)))] = rng.randrange(256)
            else:
                place = rng.randrange(len(data))
                data[place:place] = rng.randbytes(rng.randrange(1, 50))
            file.write_bytes(bytes(data))
            try:
                engine.load_adapter("damaged", path)
            except AdapterError:
                refused += 1
        answer = engine.rank(QUERIES[0], TEXTS, adapter="alpha")
        key = (answer.stack.base_digest, "alpha", QUERIES[0])
        assert [[r.id, r.score] for r in answer.results] == truth[key]
    assert refused > count / 2
    keep("damaged adapters", adapters=count, refused=refused)


def test_storms(home: Path, truth: Truth) -> None:
    """Clients who leave at once and deadlines that cannot be kept: afterwards nothing is left behind."""
    count = times(120, 5000)

    async def storm(address: str) -> Counter[str]:
        found: Counter[str] = Counter()
        rng = random.Random(13)
        limits = httpx.Limits(max_connections=64)
        long = [f"{text} {i} " * 30 for i, text in enumerate(TEXTS * 12)]
        async with httpx.AsyncClient(base_url=address, headers=HEADERS, timeout=60, limits=limits) as client:

            async def one(number: int) -> None:
                body: dict[str, Any] = {"query": QUERIES[number % 5], "candidates": long, "stream": number % 3 == 0}
                if number % 2:
                    answer = await client.post("/v1/rank", json=body | {"deadline": 0.001 + rng.random() / 50})
                    found[str(answer.status_code)] += 1
                    return
                with contextlib.suppress(TimeoutError, httpx.TransportError):
                    async with asyncio.timeout(rng.random() / 10):
                        await client.post("/v1/rank", json=body)
                        found["in time"] += 1

            for first in range(0, count, 60):
                await asyncio.gather(*(one(n) for n in range(first, min(count, first + 60))))
        return found

    with server(home) as (_, address):
        found = asyncio.run(storm(address))
        assert set(found) <= {"200", "429", "504", "in time"}, found
        deadline = time.monotonic() + 30
        while True:
            metrics = httpx.get(f"{address}/metrics", headers=HEADERS).text
            left = [
                line for line in metrics.splitlines() if line.startswith(("uma:num_requests", "uma:kv_cache_usage"))
            ]
            if all(line.endswith(" 0") for line in left):
                break
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        with Load(address, truth, threads=1) as load:
            time.sleep(0.5)
        assert set(load.statuses) == {200}
    keep("storms", requests=count, **{f"answered_{k.replace(' ', '_')}": v for k, v in found.items()})


def test_slow_clients(home: Path, truth: Truth) -> None:
    """Hundreds of connections that say nothing, or one byte a second, or do not read: the others do not notice."""
    count = times(100, 500)
    body = json.dumps({"query": QUERIES[0], "candidates": TEXTS, "stream": True}).encode()
    head = f"POST /v1/rank HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {RANK}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with server(home) as (_, address), contextlib.ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        for number in range(count):
            raw = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            if number % 3 == 1:
                raw.sendall(head[: 10 + number % 60])
            elif number % 3 == 2:
                raw.sendall(head + body)  # and never reads
        with Load(address, truth, threads=2) as load:
            time.sleep(2)
        assert set(load.statuses) == {200}, load.errors
        slowest = sorted(load.seconds)[int(0.99 * len(load.seconds))]
        assert slowest < 5
    keep("slow clients", clients=count, requests=sum(load.statuses.values()), p99_s=round(slowest, 3))


def test_a_noisy_neighbour(home: Path, truth: Truth) -> None:
    """One key asks a hundred times as much as another, which has its answers all the same."""
    stop = threading.Event()
    answered: Counter[int] = Counter()
    noise = {"query": QUERIES[1], "candidates": [f"{t} {i} " * 20 for i, t in enumerate(TEXTS * 4)]}

    def bother() -> None:
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {NOISY}"}, timeout=130) as client:
            while not stop.is_set():
                answered[client.post("/v1/rank", json=noise).status_code] += 1

    with server(home) as (_, address):
        with Load(address, truth, threads=1) as alone:
            time.sleep(times(2, 10))
        crowd = [threading.Thread(target=bother) for _ in range(times(16, 50))]
        for thread in crowd:
            thread.start()
        time.sleep(1)
        with Load(address, truth, threads=1) as beside:
            time.sleep(times(6, 40))
        stop.set()
        for thread in crowd:
            thread.join(130)
    quiet, loud = (sorted(load.seconds)[len(load.seconds) // 2] for load in (alone, beside))
    assert set(beside.statuses) == {200}, beside.statuses
    assert len(beside.seconds) >= 5
    # Its turn comes after what is inside, which is four steps at most, not after everybody who came before.
    assert loud < 2.5, (quiet, loud)
    keep("noisy neighbour", noisy_threads=len(crowd), alone_p50_s=round(quiet, 4), beside_p50_s=round(loud, 4))


def test_drains(home: Path, truth: Truth) -> None:
    """A signal under load: what was accepted is answered, and the process ends with 0."""
    drains = times(2, 20)
    for _ in range(drains):
        statuses: Counter[str] = Counter()
        with server(home) as (process, address):
            stop = threading.Event()

            def run(address: str = address, stop: threading.Event = stop, statuses: Counter[str] = statuses) -> None:
                with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as client:
                    while not stop.is_set():
                        try:
                            answer = client.post("/v1/rank", json={"query": QUERIES[0], "candidates": TEXTS})
                        except httpx.ConnectError:  # it listens no more
                            return
                        except httpx.TransportError as error:
                            # A connection may be closed between two requests, or before anybody accepted it; one that was read is answered.
                            closed = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
                            statuses["closed" if isinstance(error, closed) else repr(error)] += 1
                            return
                        statuses[str(answer.status_code)] += 1

            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            stop.set()
            for thread in threads:
                thread.join(60)
        assert set(statuses) <= {"200", "503", "closed"}, statuses
        assert statuses["200"] > 3
    keep("drain", drains=drains)


def test_memory_stays_flat(home: Path, truth: Truth) -> None:
    """Many requests, each with its own words: no process grows."""
    count, warm = times(3000, 200_000), times(1500, 20_000)

    def bytes_of(pid: int) -> int:
        (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    async def ask(address: str, first: int, number: int) -> None:
        async with httpx.AsyncClient(base_url=address, headers=HEADERS, timeout=60) as client:

            async def worker(mine: int) -> None:
                for i in range(first + mine, first + number, 8):
                    body = {"query": f"{QUERIES[i % 5]} {i}", "candidates": [f"{t} {i}" for t in TEXTS[:2]]}
                    answer = await client.post("/v1/rank", json=body)
                    assert answer.status_code == 200, answer.text

            await asyncio.gather(*(worker(i) for i in range(8)))

    with server(home, "--kv-cache-mb", "4") as (process, address):  # filled while it warms: a cache is no leak
        asyncio.run(ask(address, 0, warm))
        pids = children(process.pid, "engine") + children(process.pid, "front")
        before = [bytes_of(pid) for pid in pids]
        asyncio.run(ask(address, warm, count))
        grown = [bytes_of(pid) - b for pid, b in zip(pids, before, strict=True)]
    per_100k = max(grown) / count * 100_000
    assert max(grown) < times(12, 4) * 2**20, grown
    keep("soak", requests=count, grown_bytes=grown, per_100k_bytes=round(per_100k))
