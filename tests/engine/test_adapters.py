"""Adapters in a running engine: loading, reloading under traffic, refusal, memory."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import make_tiny_adapter
from uma_engine import Engine
from uma_engine.errors import AdapterError, UnknownAdapter

JOB = "We need a senior Rust engineer who knows databases, Linux and networks. " * 3
PEOPLE = [f"Candidate {i} knows Rust and {i} more things" for i in range(6)]


def test_a_reload_under_the_same_name_takes_effect_at_once(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    """200 reloads while other threads score: every answer belongs to the adapter that its digest names, never to old KV."""
    engine = make_engine()
    versions = [make_tiny_adapter(tmp_path / str(i), seed=100 + i) for i in range(4)]
    expected: dict[str, list[tuple[float, ...]]] = {}
    for path in versions:
        ref = engine.load_adapter("live", path)
        expected[ref.digest.hex()] = [r.logits for r in engine.rank(JOB, PEOPLE, adapter="live").all_results]
    assert len({tuple(map(tuple, e)) for e in expected.values()}) == 4
    stop, wrong, answers = threading.Event(), [], []

    def traffic() -> None:
        while not stop.is_set():
            answer = engine.rank(JOB, PEOPLE, adapter="live")
            answers.append(answer.stack.adapter_digest)
            if [r.logits for r in answer.all_results] != expected[answer.stack.adapter_digest or ""]:
                wrong.append(answer.stack.adapter_digest)

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(200):
            ref = engine.load_adapter("live", versions[i % 4])
            if i % 5 == 0:
                answer = engine.rank(JOB, PEOPLE, adapter="live")
                assert answer.stack.adapter_digest == ref.digest.hex(), (
                    "a call after the reload must use the new weights"
                )
                assert [r.logits for r in answer.all_results] == expected[ref.digest.hex()]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(answers) > 10


def test_the_same_content_under_another_name_shares_cached_keys(engine: Engine, adapter_dirs: dict[str, Path]) -> None:
    engine.load_adapter("one", adapter_dirs["alpha"])
    engine.load_adapter("two", adapter_dirs["alpha"])
    first = engine.rank(JOB, PEOPLE, adapter="one")
    second = engine.rank(JOB, PEOPLE, adapter="two")
    assert second.usage.cached_tokens > 0
    assert [r.logits for r in first.all_results] == [r.logits for r in second.all_results]
    assert engine.rank(JOB, PEOPLE, adapter="one", tenant="someone else").usage.cached_tokens == 0


def test_unloading_frees_memory_and_the_name(make_engine: Callable[..., Engine], adapter_dirs: dict[str, Path]) -> None:
    engine = make_engine(max_loras=2)
    before = engine._stack.adapters.num_bytes
    for name in ("alpha", "beta"):
        engine.load_adapter(name, adapter_dirs[name])
    assert engine.adapters() == ["alpha", "beta"]
    assert engine._stack.adapters.num_bytes > before
    engine.unload_adapter("alpha")
    with pytest.raises(UnknownAdapter):
        engine.rank(JOB, PEOPLE, adapter="alpha")
    engine.load_adapter("gamma", adapter_dirs["gamma"])
    for name in ("beta", "gamma"):
        engine.unload_adapter(name)
    gc.collect()
    assert engine._stack.adapters.num_bytes == before
    with pytest.raises(UnknownAdapter):
        engine.unload_adapter("beta")


def test_a_refused_adapter_leaves_the_old_one_in_place(
    engine: Engine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    engine.load_adapter("live", adapter_dirs["alpha"])
    before = engine.rank(JOB, PEOPLE, adapter="live")
    broken = tmp_path / "broken"
    shutil.copytree(adapter_dirs["beta"], broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    big = make_tiny_adapter(tmp_path / "big", rank=128)
    for path, says in ((broken, "adapter_model"), (big, "rank 128"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(AdapterError, match=says):
            engine.load_adapter("live", path)
    after = engine.rank(JOB, PEOPLE, adapter="live")
    assert [r.logits for r in after.all_results] == [r.logits for r in before.all_results]
