"""Three engines on this machine behind one address: right answers, one killed under load, swaps from engine to engine, more under load."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from uma_engine import Engine, SamplingParams

httpx = pytest.importorskip("httpx")
pytest.importorskip("ray.serve")
pytest.importorskip("uvicorn")

from tests.scale.running import (  # noqa: E402
    ADAPTERS,
    HEADERS,
    OPERATOR,
    QUERIES,
    TEXTS,
    Load,
    Truth,
    engines,
    entry,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with entry(home, "--replicas", "2:3") as (child, address):
        with httpx.Client(base_url=address, headers=OPERATOR, timeout=120) as http:
            for name in ADAPTERS[1:]:
                answer = http.post("/admin/adapters", json={"name": name, "path": name})
                assert answer.status_code == 200, answer.text
        yield address
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0


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
