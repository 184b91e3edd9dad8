"""Requests that end early: cancelled, past their deadline, refused, or caught by a closing or failing engine. None is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL, assert_idle
from uma_engine import AsyncEngine, Engine, SamplingParams
from uma_engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    InvariantViolation,
    Overloaded,
    UmaError,
)

LONG = SamplingParams(max_tokens=1500, ignore_eos=True)


def test_a_passed_deadline_is_a_typed_error(engine: Engine) -> None:
    with pytest.raises(DeadlineExceeded, match="deadline"):
        engine.generate("yes", LONG, deadline=0.05)
    assert_idle(engine)


def test_a_full_queue_refuses_at_once_and_loses_nobody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_waiting=2, max_num_seqs=1)
    ended: list[str] = []

    def client() -> None:
        try:
            engine.generate("yes", SamplingParams(max_tokens=60, ignore_eos=True))
            ended.append("answer")
        except Overloaded as error:
            ended.append("overloaded" if error.retry_after > 0 else "overloaded without a time")

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 12
    assert "overloaded" in ended
    assert "answer" in ended


def test_closing_ends_calls_in_flight_with_a_typed_error(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    errors: list[BaseException] = []

    def client() -> None:
        try:
            engine.generate("yes", LONG)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    engine.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert len(errors) == 4
    assert all(isinstance(e, EngineUnavailable) for e in errors)
    with pytest.raises(EngineUnavailable):
        engine.rank("job", ["x"])
    engine.close()


def test_a_cancelled_task_cancels_its_request(tiny_dir: Path) -> None:
    async def main() -> None:
        async with await AsyncEngine.create(tiny_dir, **SMALL) as engine:
            task = asyncio.create_task(engine.generate("yes", LONG))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.generate("no", SamplingParams(max_tokens=2))
            assert_idle(engine)
            assert engine._stack.scheduler.counters.cancelled == 1

    asyncio.run(main())


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.rank("job", ["a", "b"]).results
    run = engine._stack.runner.run

    def fail(output: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine._stack.runner, "run", fail)
    with pytest.raises(InvariantViolation, match="out of luck"):
        engine.rank("job", ["a", "b"])
    monkeypatch.setattr(engine._stack.runner, "run", run)
    assert engine.rank("job", ["a", "b"]).results == expected
    assert_idle(engine)


def test_two_engines_live_in_one_process(make_engine: Callable[..., Engine], tiny_dir: Path) -> None:
    first, second = make_engine(), make_engine(num_threads=1)
    expected = first.rank("job", ["a", "b"]).results
    answers: list[object] = []
    threads = [
        threading.Thread(target=lambda e=e: answers.append(e.rank("job", ["a", "b"]).results))
        for e in (first, second) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8


def test_unknown_options_and_bad_values_are_refused(tiny_dir: Path) -> None:
    for options, says in (
        ({"max_sequences": 3}, "unknown engine option"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_seqs": True}, "an integer of at least 1"),
        ({"max_model_len": 10**9}, "positions"),
        ({"kv_cache_bytes": 2**16, "max_model_len": 8192}, "KV cache holds"),
        ({"precision": "guess"}, "`precision`"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            Engine(tiny_dir, **options)


def test_ctrl_c_ends_a_call_cleanly(tiny_dir: Path) -> None:
    program = (
        "import sys, threading, _thread, time\n"
        "from uma_engine import Engine, SamplingParams\n"
        f"engine = Engine({str(tiny_dir)!r}, kv_cache_bytes=2**22, max_model_len=2048)\n"
        "engine.generate('yes', SamplingParams(max_tokens=2))\n"  # what is imported on first use is there
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True: engine.generate('yes', SamplingParams(max_tokens=1500, ignore_eos=True))\n"
        "except KeyboardInterrupt:\n"
        "    engine.generate('no', SamplingParams(max_tokens=2))\n"
        "    assert engine._stack.block_pool.num_used == 0\n"
        "    engine.close()\n"
        "    print('clean', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are born with it ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "clean\n", err
    assert process.returncode == 0


def test_every_error_is_typed_and_has_a_status() -> None:
    def subclasses(cls: type[UmaError]) -> list[type[UmaError]]:
        return [cls, *(s for c in cls.__subclasses__() for s in subclasses(c))]

    for cls in subclasses(UmaError):
        assert 400 <= cls.status < 600
        assert 0 < cls.exit_code < 256
