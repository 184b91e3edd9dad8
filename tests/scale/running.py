"""A cluster of small engines behind an entry, for the tests: how it is started, asked without a pause, and held against the truth."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
ADMIN, RANK = "admin-secret-0123456789", "rank-secret-0123456789"
HEADERS = {"authorization": f"Bearer {RANK}"}
OPERATOR = {"authorization": f"Bearer {ADMIN}"}
QUERIES = [f"We need somebody who knows {word}." for word in ("Rust", "nursing", "tax law", "paint", "logistics", "Go")]
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law.", "Paints walls."]
ADAPTERS = ("", "alpha", "beta")
Truth = dict[tuple[str, str, str], list[Any]]


@contextlib.contextmanager
def entry(home: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`uma serve --replicas` and its address. What is left of it at the end is killed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(home / "one"), "--port", "0"]
    command += ["--keys", str(home / "keys"), "--adapter-root", str(home / "adapters"), "--threads", "1"]
    command += ["--replica-cpus", "0.5", "--target", "2", "--kv-cache-mb", "32", *more]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=home)
    try:
        assert child.stdout is not None
        found = None
        while line := child.stdout.readline():
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        assert found, "the cluster does not start"
        yield child, found.group()
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
