"""Three engines on this machine behind one address: right answers, one killed under load, swaps from engine to engine, more under load."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine, SamplingParams

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray.serve")
pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
ADMIN, RANK = "admin-secret-0123456789", "rank-secret-0123456789"
HEADERS = {"authorization": f"Bearer {RANK}"}
OPERATOR = {"authorization": f"Bearer {ADMIN}"}
QUERIES = [f"We need somebody who knows {word}." for word in ("Rust", "nursing", "tax law", "paint", "logistics", "Go")]
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law.", "Paints walls."]
ADAPTERS = ("", "alpha", "beta")
Truth = dict[tuple[str, str, str], list[Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster")
    for seed, name in enumerate(("one", "two")):
        make_tiny_model(root / name, seed=seed)
    for seed, name in enumerate(ADAPTERS[1:], start=1):
        make_tiny_adapter(root / "adapters" / name, seed=seed, rank=4)
    (root / "keys").write_text(f"shop rank {RANK}\noperator admin {ADMIN}\n")
    return root


@pytest.fixture(scope="module")
def truth(home: Path) -> Truth:
    found: Truth = {}
    for base in ("one", "two"):
        with Engine(home / base) as engine:
            for name in ADAPTERS[1:]:
                engine.load_adapter(name, home / "adapters" / name)
            for name in ADAPTERS:
                for query in QUERIES:
                    answer = engine.rank(query, TEXTS, adapter=name or None)
                    found[answer.stack.base_digest, name, query] = [[r.id, r.score] for r in answer.results]
    assert len({json.dumps(v) for v in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(home / "one"), "--port", "0"]
    command += ["--keys", str(home / "keys"), "--adapter-root", str(home / "adapters"), "--threads", "1"]
    command += ["--replicas", "2:3", "--replica-cpus", "0.5", "--target", "2", "--kv-cache-mb", "32"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=home)
    try:
        assert child.stdout is not None
        while line := child.stdout.readline():
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        assert found, "the cluster does not start"
        with httpx.Client(base_url=found.group(), headers=OPERATOR, timeout=120) as http:
            for name in ADAPTERS[1:]:
                answer = http.post("/admin/adapters", json={"name": name, "path": name})
                assert answer.status_code == 200, answer.text
        yield found.group()
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


class Load:
    """Threads that ask without a pause; every answer is held against the truth."""

    def __init__(self, address: str, truth: Truth, threads: int = 4) -> None:
        self._address, self._truth = address, truth
        self._stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.bases: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

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
        with httpx.Client(base_url=self._address, headers=HEADERS, timeout=130) as http:
            while not self._stop.is_set():
                name, query = rng.choice(ADAPTERS), rng.choice(QUERIES)
                body = {"query": query, "candidates": TEXTS} | ({"adapter": name} if name else {})
                answer = http.post("/v1/rank", json=body)
                self.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    self.wrong.append(answer.text[:300])
                    continue
                data = answer.json()
                base = data["stack"]["base_digest"]
                self.bases[base] += 1
                said = [[r["id"], r["score"]] for r in data["results"]]
                if said != self._truth.get((base, name, query)):
                    self.wrong.append(f"{name} {query}: {said}")


def engines() -> list[int]:
    """Processes that hold an engine."""
    found = subprocess.run(["pgrep", "-f", "ServeReplica:uma-engine"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(what: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.3)


def test_answers_are_those_of_one_engine_and_streams_too(address: str, home: Path, truth: Truth) -> None:
    assert len(engines()) >= 2
    with Load(address, truth) as load:
        time.sleep(4)
    assert load.statuses[200] > 20
    with Engine(home / "one") as engine, httpx.Client(base_url=address, headers=HEADERS, timeout=60) as http:
        for prompt in ("once", "upon a time"):
            expected = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=1, seed=5))[0].text
            body = {"model": str(home / "one"), "prompt": prompt, "max_tokens": 12, "temperature": 1, "seed": 5}
            assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            assert "".join(p["choices"][0]["text"] for p in parts) == expected
        assert http.post("/v1/rank", json={"query": "x"}).status_code == 400
        assert http.get("/v1/models").status_code == 200
        assert http.post("/admin/swap", json={"model": "x"}).status_code == 403
        assert httpx.post(f"{address}/v1/rank", json={}).status_code == 401


def test_an_engine_that_is_killed_under_load_loses_nothing(address: str, truth: Truth) -> None:
    with Load(address, truth) as load:
        time.sleep(2)
        killed = engines()[0]
        os.kill(killed, signal.SIGKILL)
        time.sleep(6)
        before = load.statuses[200]
        time.sleep(2)
        assert load.statuses[200] > before
    assert set(load.statuses) == {200}
    wait_for(lambda: len(engines()) >= 2 and killed not in engines())


def test_a_swap_goes_from_engine_to_engine_under_load(address: str, home: Path, truth: Truth) -> None:
    with httpx.Client(base_url=address, headers=OPERATOR, timeout=200) as http:
        with Load(address, truth, threads=3) as load:
            adapters = {name: name for name in ADAPTERS[1:]}
            status = http.post(
                "/admin/swap", json={"model": str(home / "two"), "adapters": adapters, "wait": True}
            ).json()
            assert status["swap"]["phase"] == "done", status
            assert status["stack"]["model"] == str(home / "two")
            time.sleep(2)
            after = Counter(load.bases)
            time.sleep(2)
            (now,) = load.bases - after
        assert set(load.statuses) == {200}
        assert len(load.bases) == 2
        failed = http.post("/admin/swap", json={"model": str(home / "nowhere"), "wait": True}).json()
        assert failed["swap"]["phase"] == "failed"
        assert "nowhere" in failed["swap"]["error"]
        back = http.post("/admin/swap/rollback").json()
        assert (back["swap"]["phase"], back["stack"]["model"]) == ("done", str(home / "one"))
        with Load(address, truth, threads=2) as load:
            time.sleep(2)
        assert now not in load.bases


def test_adapters_and_their_other_names_reach_every_engine(address: str, truth: Truth) -> None:
    with httpx.Client(base_url=address, headers=OPERATOR, timeout=120) as http:
        assert http.post("/admin/adapters", json={"name": "best", "alias_of": "alpha"}).status_code == 200
        for query in QUERIES:  # different beginnings reach different engines
            answer = http.post("/v1/rank", json={"query": query, "candidates": TEXTS, "adapter": "best"}).json()
            said = [[r["id"], r["score"]] for r in answer["results"]]
            assert said == truth[answer["stack"]["base_digest"], "alpha", query]
        assert http.post("/admin/adapters", json={"name": "out", "path": "../one"}).status_code == 400
        assert http.delete("/admin/adapters/best").status_code == 200
        for query in QUERIES:
            refused = http.post("/v1/rank", json={"query": query, "candidates": TEXTS, "adapter": "best"})
            assert refused.status_code == 404, refused.text


def test_more_work_brings_more_engines(address: str, truth: Truth) -> None:
    assert len(engines()) in (2, 3)
    with Load(address, truth, threads=12):
        wait_for(lambda: len(engines()) >= 3)
