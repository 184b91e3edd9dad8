"""Swaps under load: nobody is dropped, every answer is that of the base that it names, and what fails leaves the old base there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import SMALL
from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import AsyncEngine, Engine, UmaError, background
from uma_engine.cli.main import main
from uma_engine.errors import EngineUnavailable

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("msgspec")

from uma_engine.serve import ServeSettings, make_app  # noqa: E402
from uma_engine.serve.preparing import Opener  # noqa: E402
from uma_engine.serve.settings import Key  # noqa: E402

ADMIN = "admin-secret-0123456789"
HEADERS = {"authorization": f"Bearer {ADMIN}"}
QUERIES = [f"We need somebody who knows {word}." for word in ("Rust", "nursing", "tax law", "paint")]
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law.", "Paints walls."]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bases")
    return [make_tiny_model(root / name, seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def truth(bases: list[Path]) -> dict[str, dict[str, list[float]]]:
    """What each base says, recomputed by itself: by digest and query."""
    found = {}
    for base in bases:
        with Engine(base, **SMALL) as engine:
            digest = engine.stack_info().base_digest
            found[digest] = {q: [r.score for r in engine.rank(q, TEXTS).all_results] for q in QUERIES}
    assert len(found) == 2
    return found


class Server:
    """An application with swaps, in the test's own event loop."""

    def __init__(self, engine: AsyncEngine, **settings: Any) -> None:
        async def make(model: str) -> AsyncEngine:
            return await AsyncEngine.create(model, **SMALL)

        keys = (Key.of("admin", "admin", ADMIN),)
        self.app = make_app(engine, ServeSettings(keys=keys, **settings), make)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test", headers=HEADERS, timeout=60
        )

    async def swap(self, model: Path, **options: Any) -> Any:
        return (await self.http.post("/admin/swap", json={"model": str(model), "wait": True, **options})).json()

    async def close(self) -> None:
        await self.http.aclose()
        await self.app.state.generations.close()


async def under_load(server: Server, work: Any) -> list[Any]:
    """Requests without a pause while `work` runs; all their answers."""
    done, answers = asyncio.Event(), []

    async def ask(first: int) -> None:
        number = first
        while not done.is_set():
            query = QUERIES[number % len(QUERIES)]
            answers.append((query, await server.http.post("/v1/rank", json={"query": query, "candidates": TEXTS})))
            number += 1

    tasks = [asyncio.create_task(ask(n)) for n in range(4)]
    try:
        await work
    finally:
        done.set()
        await asyncio.gather(*tasks)
    return answers


def check(answers: list[Any], truth: dict[str, dict[str, list[float]]]) -> set[str]:
    """Every answer is whole and that of the base it names; which those were."""
    seen = set()
    for query, answer in answers:
        assert answer.status_code == 200, answer.text
        data = answer.json()
        digest = data["stack"]["base_digest"]
        scores = [r["score"] for r in data["all_results"]]
        assert scores == truth[digest][query], "an answer of another base than the one it names"
        seen.add(digest)
    return seen


@pytest.mark.parametrize("exclusive", [False, True], ids=["side by side", "exclusive"])
def test_swaps_drop_nobody_and_never_mix(
    bases: list[Path], truth: dict[str, dict[str, list[float]]], exclusive: bool
) -> None:
    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine)

            async def swaps() -> None:
                for number in range(1, 9):
                    status = await server.swap(bases[number % 2], exclusive=exclusive)
                    assert status["swap"]["phase"] == "done", status
                    assert status["current"]["generation"] == number + 1
                    await asyncio.sleep(0.05)

            answers = await under_load(server, swaps())
            assert len(answers) > 30
            assert check(answers, truth) == set(truth), "both bases have answered"
            status = (await server.http.get("/admin/swap/status")).json()
            assert (status["previous"] is None) == exclusive
            await server.close()

    asyncio.run(run())


def test_a_rollback_is_at_once(bases: list[Path], truth: dict[str, dict[str, list[float]]]) -> None:
    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine)
            first = engine.stack_info().base_digest
            assert (await server.http.post("/admin/swap/rollback")).status_code == 409
            for query in QUERIES:
                await server.http.post("/v1/rank", json={"query": query, "candidates": TEXTS})
            status = await server.swap(bases[1])
            assert status["swap"]["shadow"]["questions"] == 4
            assert -1 <= status["swap"]["shadow"]["kendall_tau"] <= 1
            loop = asyncio.get_running_loop()
            began = loop.time()
            back = (await server.http.post("/admin/swap/rollback")).json()
            assert loop.time() - began < 1
            assert back["current"]["base_digest"] == first
            answer = await server.http.post("/v1/rank", json={"query": QUERIES[0], "candidates": TEXTS})
            assert check([(QUERIES[0], answer)], truth) == {first}
            metrics = (await server.http.get("/metrics")).text
            assert "uma:swaps_total 2" in metrics
            await server.close()

    asyncio.run(run())


def test_a_base_that_is_prepared_gives_way_to_the_one_that_serves(
    bases: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The serving engine pretends to be busy: the other one steps once in a while, and at once when it is not."""
    monkeypatch.setattr("uma_engine.engine.loop.LONGEST_WAY_S", 0.5)

    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as serving, AsyncEngine(bases[1], **SMALL) as fresh:
            alone = await fresh.rank(QUERIES[0], TEXTS)
            fresh.give_way(serving)
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert (await fresh.rank(QUERIES[1], TEXTS)).results
            assert loop.time() - began < 0.5, "the other one is idle"
            fresh._stack.loop.give_way = lambda: True
            with background():
                began = loop.time()
                first = await fresh.rank(QUERIES[2], TEXTS)
                second = await fresh.rank(QUERIES[0], TEXTS)
                assert 0.4 < loop.time() - began < 20, "a step each half second"
            assert first.results
            assert [r.score for r in second.all_results] == [r.score for r in alone.all_results]

    asyncio.run(run())


def test_a_step_that_has_begun_gives_way_between_layers(bases: list[Path]) -> None:
    async def run() -> None:
        async with AsyncEngine(bases[1], **SMALL) as fresh:
            alone = await fresh.rank(QUERIES[0], TEXTS)
            asked: list[float] = []

            def busy() -> bool:
                """Not when the step begins, then for 0.3 s."""
                asked.append(time.perf_counter())
                return 0 < asked[-1] - asked[0] < 0.3

            fresh._stack.forget_cached()
            fresh._stack.loop.give_way = busy
            began = time.perf_counter()
            again = await fresh.rank(QUERIES[0], TEXTS)
            assert 0.3 < time.perf_counter() - began < 5
            assert [r.score for r in again.all_results] == [r.score for r in alone.all_results]
            fresh._stack.forget_cached()
            fresh.give_way(None)
            began = time.perf_counter()
            assert (await fresh.rank(QUERIES[0], TEXTS)).results
            assert time.perf_counter() - began < 0.3

    asyncio.run(run())


def test_a_step_that_gives_way_does_not_hold_up_the_end(bases: list[Path]) -> None:
    async def run() -> None:
        fresh = await AsyncEngine.create(bases[1], **SMALL)
        await fresh.rank(QUERIES[1], TEXTS)  # one that has not stepped for long does not wait
        asked: list[bool] = []

        def busy() -> bool:
            """Not when the step begins, then for ever."""
            asked.append(True)
            return len(asked) > 1

        fresh._stack.loop.give_way = busy
        waiting = asyncio.ensure_future(fresh.rank(QUERIES[0], TEXTS))
        async with asyncio.timeout(20):
            while len(asked) < 5:
                await asyncio.sleep(0.01)
        began = time.perf_counter()
        await fresh.close()
        assert time.perf_counter() - began < 2, "it would have waited for five seconds"
        with contextlib.suppress(EngineUnavailable):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_base_is_prepared_by_another_process_and_what_fails_there_fails_here(
    bases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    monkeypatch.setenv("UMA_CACHE", str(tmp_path))
    new_loop = pytest.importorskip(
        loop
    ).new_event_loop  # uvloop, which Ray Serve and many servers use, lacks some of asyncio's options
    opener = Opener(**SMALL)

    async def run() -> None:
        before = sys.getswitchinterval(), gc.isenabled()
        engine = await opener(str(bases[0]))
        assert (await engine.rank(QUERIES[0], TEXTS)).results
        await engine.close()
        assert any((tmp_path / "digests").iterdir()), "the cache was filled"
        with pytest.raises(UmaError):
            await opener(str(tmp_path / "nowhere"))
        assert (sys.getswitchinterval(), gc.isenabled()) == before

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("exclusive", [False, True], ids=["side by side", "exclusive"])
def test_a_swap_that_fails_leaves_the_old_base(
    bases: list[Path], truth: dict[str, dict[str, list[float]]], tmp_path: Path, exclusive: bool
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")

    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine, state_file=tmp_path / "state.json")

            async def swaps() -> None:
                for model in (broken, tmp_path / "nowhere"):
                    status = await server.swap(model, exclusive=exclusive)
                    assert status["swap"]["phase"] == "failed"
                    assert status["swap"]["error"]
                    assert status["current"]["generation"] == 1

            answers = await under_load(server, swaps())
            assert check(answers, truth) == {engine.stack_info().base_digest}
            assert not (tmp_path / "state.json").exists()
            status = await server.swap(bases[1], exclusive=exclusive)
            assert status["swap"]["phase"] == "done", "another one may follow"
            assert json.loads((tmp_path / "state.json").read_text())["model"] == str(bases[1])
            await server.close()

    asyncio.run(run())


def test_adapters_come_with_the_base(bases: list[Path], tmp_path: Path) -> None:
    make_tiny_adapter(tmp_path / "alpha", seed=3, rank=4)

    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine, adapter_root=tmp_path)
            await server.http.post("/admin/adapters", json={"name": "alpha", "path": "alpha"})
            asked = {"query": QUERIES[0], "candidates": TEXTS, "adapter": "alpha"}
            assert (await server.http.post("/v1/rank", json=asked)).status_code == 200
            await server.swap(bases[1])
            assert (await server.http.post("/v1/rank", json=asked)).status_code == 404, "it was the old base's"
            status = await server.swap(bases[0], adapters={"alpha": "alpha"})
            assert status["current"]["adapters"] == ["alpha"]
            assert (await server.http.post("/v1/rank", json=asked)).status_code == 200
            outside = await server.http.post("/admin/swap", json={"model": "x", "adapters": {"a": "../../etc"}})
            assert outside.status_code == 400
            first = server.http.post("/admin/swap", json={"model": str(bases[1])})
            second = server.http.post("/admin/swap", json={"model": str(bases[1])})
            statuses = sorted(a.status_code for a in await asyncio.gather(first, second))
            assert statuses == [202, 409]
            await server.app.state.generations.wait()
            await server.close()

    asyncio.run(run())


@pytest.fixture
def process(bases: list[Path], tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "keys").write_text(f"admin admin {ADMIN}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(bases[0]), "--port", "0"]
    command += ["--keys", str(tmp_path / "keys"), "--state", str(tmp_path / "state.json")]
    running: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> str:
        child = subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE, text=True)
        running.append(child)
        assert child.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", child.stdout.readline())
        assert found
        return found.group()

    yield start, running
    for child in running:
        child.kill()
        child.wait()


def test_a_restart_has_the_last_swaps_base(
    process: Any, bases: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, running = process
    monkeypatch.setenv("UMA_API_KEY", ADMIN)
    address = start()
    assert main(["swap", "--address", address, "start", str(bases[1])]) == 0
    assert f"current: {bases[1]}" in capsys.readouterr().out
    running[-1].send_signal(signal.SIGKILL)
    running[-1].wait()
    address = start()
    assert main(["swap", "--address", address, "status"]) == 0
    shown = capsys.readouterr().out
    assert f"current: {bases[1]}" in shown
    assert main(["swap", "--address", address, "start", str(bases[1].parent / "nowhere")]) == 1
    assert "failed" in capsys.readouterr().out
    assert main(["swap", "--address", address, "rollback"]) != 0


def test_a_restart_has_the_adapters_their_other_names_and_what_is_pinned(
    process: Any, bases: list[Path], tmp_path: Path
) -> None:
    start, running = process
    for name in ("first", "second"):
        make_tiny_adapter(tmp_path / "adapters" / name, seed=len(name))
    with httpx.Client(base_url=start("--adapter-root", str(tmp_path / "adapters")), headers=HEADERS) as http:

        def change(**body: Any) -> None:
            assert http.post("/admin/adapters", json=body).status_code == 200

        change(name="one", path="first", pinned=True)
        change(name="two", path="second", load=False)
        change(name="three", path="second", load=False)
        for alias, name in (("fit", "one"), ("best", "one"), ("gone", "three"), ("best", "two")):
            change(name=alias, alias_of=name)
        assert http.delete("/admin/adapters/three").status_code == 200
        assert http.delete("/admin/adapters/fit").status_code == 200
        known = http.get("/v1/adapters").json()
        said = http.post("/v1/rank", json={"query": QUERIES[0], "candidates": TEXTS, "adapter": "best"}).json()
    running[-1].send_signal(signal.SIGKILL)
    running[-1].wait()
    with httpx.Client(base_url=start("--adapter-root", str(tmp_path / "adapters")), headers=HEADERS) as http:
        assert http.get("/v1/adapters").json() == known == {"adapters": ["best", "one", "two"]}
        assert {r["name"]: r["pinned"] for r in http.get("/admin/adapters").json()["adapters"]} == {
            "one": True,
            "two": False,
        }
        again = http.post("/v1/rank", json={"query": QUERIES[0], "candidates": TEXTS, "adapter": "best"}).json()
        assert again["all_results"] == said["all_results"]
        assert again["stack"]["adapter_digest"] == said["stack"]["adapter_digest"]


def test_a_canary_answers_its_share_of_the_keys_and_always_the_same(
    bases: list[Path], truth: dict[str, dict[str, list[float]]]
) -> None:
    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine)
            old = engine.stack_info().base_digest
            status = await server.swap(bases[1], canary=0.3)
            assert status["swap"]["phase"] == "canary"
            assert status["canary"]["share"] == 0.3
            assert status["current"]["base_digest"] == old
            by_key: dict[str, set[str]] = {}
            for key in [f"client-{n}" for n in range(60)] * 2:
                body = {"query": QUERIES[0], "candidates": TEXTS}
                answer = await server.http.post("/v1/rank", json=body, headers={"x-uma-sticky": key})
                check([(QUERIES[0], answer)], truth)
                by_key.setdefault(key, set()).add(answer.json()["stack"]["base_digest"])
            assert all(len(digests) == 1 for digests in by_key.values()), "a key has one base"
            share = sum(digests != {old} for digests in by_key.values()) / len(by_key)
            assert 0.12 < share < 0.5
            assert (await server.http.post("/admin/swap", json={"model": str(bases[1])})).status_code == 409
            done = (await server.http.post("/admin/swap/finish")).json()
            assert done["current"]["base_digest"] != old
            assert done["canary"] is None
            assert (await server.http.post("/admin/swap/finish")).status_code == 409
            assert (await server.http.post("/admin/swap/rollback")).json()["current"]["base_digest"] == old
            for bad in (0, 1, -1):
                refused = await server.http.post("/admin/swap", json={"model": str(bases[1]), "canary": bad})
                assert refused.status_code == 400, bad
            await server.close()

    asyncio.run(run())


def test_a_canary_that_fails_is_taken_back(bases: list[Path], truth: dict[str, dict[str, list[float]]]) -> None:
    async def run() -> None:
        async with AsyncEngine(bases[0], **SMALL) as engine:
            server = Server(engine)
            old = engine.stack_info().base_digest
            await server.swap(bases[1], canary=0.5)
            canary = server.app.state.generations.canary.engine

            async def broken(*args: Any, **options: Any) -> None:
                raise ZeroDivisionError("inside")

            canary.rank = broken
            statuses = []
            for n in range(40):
                body = {"query": QUERIES[0], "candidates": TEXTS}
                answer = await server.http.post("/v1/rank", json=body, headers={"x-uma-sticky": f"client-{n}"})
                statuses.append(answer.status_code)
            assert statuses.count(500) == 3, "so many it takes to tell"
            status = (await server.http.get("/admin/swap/status")).json()
            assert status["canary"] is None
            assert status["swap"]["why"] == "the canary failed"
            assert status["current"]["base_digest"] == old
            await asyncio.sleep(0.05)
            assert canary.closed
            await server.close()

    asyncio.run(run())
