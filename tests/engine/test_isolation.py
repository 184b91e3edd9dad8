"""One caller's mistake stays that caller's: bad values, overflowing weights, abandoned calls, failing listeners, forks."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL, assert_idle
from tests.tiny import make_tiny_adapter
from uma_engine import AsyncEngine, Candidate, Engine, SamplingParams
from uma_engine.errors import InvalidRequest, ModelOverflow, Overloaded, UmaError

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": 2**70},
        {"seed": "x"},
        {"top_k": 2**40},
        {"top_k": 1.5},
        {"temperature": 1e300},
        {"temperature": "hot"},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"max_tokens": 2.5},
        {"max_tokens": "2"},
        {"max_tokens": True},
        {"stop_token_ids": ([1],)},
        {"stop_token_ids": 5},
        {"stop": (3,)},
        {"ignore_eos": 1},
    ],
    ids=str,
)
def test_sampling_values_that_no_kernel_can_take_fail_before_they_share_a_step(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_an_overflowing_adapter_ends_its_own_request_alone(engine: Engine, tmp_path: Path) -> None:
    engine.load_adapter("boom", make_tiny_adapter(tmp_path / "boom", scale=1e30))
    expected = engine.generate("yes", LONG)[0].token_ids
    answers: list[object] = []
    neighbour = threading.Thread(target=lambda: answers.append(engine.generate("yes", LONG)[0].token_ids))
    neighbour.start()
    for _ in range(5):
        with pytest.raises(ModelOverflow, match="not finite"):
            engine.rank("job", ["a", "b"], adapter="boom")
        with pytest.raises(ModelOverflow, match="not finite"):
            engine.generate("yes", LONG, adapter="boom")
    neighbour.join()
    assert answers == [expected]
    assert_idle(engine)


def test_calls_that_are_never_run_hold_no_adapter(
    make_engine: Callable[..., Engine], adapter_dirs: dict[str, Path]
) -> None:
    engine = make_engine(max_loras=1)
    engine.load_adapter("a", adapter_dirs["alpha"])
    stream = engine.stream("yes", LONG, adapter="a")  # never read
    del stream
    gc.collect()
    for wrong in ({"tenant": None}, {"adapter": ["a", ["x"]]}, {"adapter": 5}):
        with pytest.raises(InvalidRequest):
            engine.generate(["x", "y"], **({"adapter": "a"} | wrong))  # type: ignore[arg-type]
    deadline = time.monotonic() + 10
    while engine._stack.adapters.num_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.unload_adapter("a")
    engine.load_adapter("b", adapter_dirs["beta"])


def test_cancelled_tasks_and_closed_event_loops_leave_nothing_behind(
    tiny_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    engine = AsyncEngine(tiny_dir, **SMALL)

    async def storm() -> None:
        await engine.load_adapter("a", adapter_dirs["alpha"])
        tasks = [asyncio.create_task(engine.rank("job " * 50, ["x " * 50] * 40, adapter="a")) for _ in range(30)]
        for i, task in enumerate(tasks):
            await asyncio.sleep(0.0004 * (i % 7))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def leave_early() -> None:
        async for _ in engine.stream("yes", LONG, adapter="a"):
            break

    asyncio.run(storm())
    asyncio.run(leave_early())
    deadline = time.monotonic() + 20
    while engine._stack.adapters.num_requests and time.monotonic() < deadline:
        time.sleep(0.02)
    assert_idle(engine)
    asyncio.run(engine.close())


def test_a_command_that_fails_does_not_hang_those_behind_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    real = engine._stack.scheduler.add_request

    def fail_once(request: object) -> None:
        engine._stack.scheduler.add_request = real  # type: ignore[method-assign]
        raise RuntimeError("out of luck")

    engine._stack.scheduler.add_request = fail_once  # type: ignore[method-assign,assignment]
    ended: list[object] = []

    def client() -> None:
        try:
            ended.append(engine.rank("job", ["a"]).results[0].score)
        except UmaError as error:
            ended.append(type(error).__name__)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert ended.count("InvariantViolation") == 1
    assert len(ended) == 4


def test_a_forked_child_is_told_and_can_make_its_own_engine(tiny_dir: Path) -> None:
    program = (
        "import os, sys\n"
        "from uma_engine import Engine\n"
        "from uma_engine.errors import EngineUnavailable\n"
        f"make = lambda: Engine({str(tiny_dir)!r}, kv_cache_bytes=2**22, max_model_len=2048)\n"
        "engine = make()\n"
        "expected = engine.rank('job', ['a', 'b']).results\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        engine.rank('job', ['a'])\n"
        "    except EngineUnavailable as error:\n"
        "        assert 'after the fork' in str(error)\n"
        "        engine.close()\n"
        "        ok = make().rank('job', ['a', 'b']).results == expected\n"
        "        os._exit(0 if ok else 1)\n"
        "    os._exit(2)\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "assert engine.rank('job', ['a', 'b']).results == expected\n"
        "engine.close()\n"
        "sys.exit(status)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err


def test_a_closed_engine_gives_its_memory_back_and_a_forgotten_one_its_thread(tiny_dir: Path) -> None:
    engine = Engine(tiny_dir, **SMALL)
    model = weakref.ref(engine._stack.model)
    engine.close()
    gc.collect()
    assert model() is None, "the weights are still held by a closed engine"
    forgotten = Engine(tiny_dir, **SMALL)
    thread = forgotten._stack.loop._thread
    del forgotten
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_closing_under_load_balances_the_books(tiny_dir: Path) -> None:
    engine = Engine(tiny_dir, **SMALL)
    threads = [threading.Thread(target=_ignore, args=(lambda: engine.generate("yes", LONG),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    engine.close()
    for thread in threads:
        thread.join(timeout=10)
    counters = engine._stack.scheduler.counters
    assert counters.accepted == counters.finished + counters.cancelled + counters.failed
    assert engine._stack.block_pool.num_used == 0


def _ignore(call: Callable[[], object]) -> None:
    try:
        call()
    except UmaError:
        return


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.rank("j", None),
        lambda e: e.rank("j", ["a"], labels=5),
        lambda e: e.rank("j", ["a"], labels=None),
        lambda e: e.rank("j", ["a"], deadline="1"),
        lambda e: e.rank("j", ["a"], tenant=None),
        lambda e: e.score("a", None),
        lambda e: e.score("a", [None]),
        lambda e: e.score(None, ["a"]),
        lambda e: e.score("a", [[10**9]]),
        lambda e: e.generate(None),
        lambda e: e.generate("a", adapter=5),
        lambda e: e.generate(["a"], [None]),
        lambda e: e.generate(["a"], []),
        lambda e: e.load_adapter(None, "x"),
        lambda e: e.load_adapter("q", 5),
        lambda e: e.tokenize(7),
        lambda e: Candidate("a", "b", None),
    ],
)
def test_wrong_types_are_typed_errors(engine: Engine, call: Callable[[Engine], object]) -> None:
    with pytest.raises(InvalidRequest):
        call(engine)


def test_white_space_around_texts_changes_nothing(engine: Engine) -> None:
    plain = engine.rank("We need Rust", ["I know Rust"])
    spaced = engine.rank("\n We need Rust\n\n", ["  I know Rust \n"])
    assert [r.logits for r in plain.all_results] == [r.logits for r in spaced.all_results]


def test_errors_survive_pickling_with_everything_they_carry() -> None:
    error = pickle.loads(pickle.dumps(Overloaded("full", hint="later", param="queue", retry_after=7.5)))
    assert isinstance(error, Overloaded)
    assert (error.message, error.hint, error.param, error.retry_after) == ("full", "later", "queue", 7.5)
