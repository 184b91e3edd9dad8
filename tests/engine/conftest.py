"""Engines over a tiny random model; every one must hold nothing when its tests are over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine

SMALL = {"kv_cache_bytes": 4 * 2**20, "max_num_batched_tokens": 256, "max_model_len": 2048}


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_tiny_adapter(root / name, seed=i + 1, rank=4 << i)
        for i, name in enumerate(("alpha", "beta", "gamma"))
    }


def assert_idle(engine: Any) -> None:
    """No request, block or adapter reference is left."""
    stack = engine._stack
    if not stack.loop.closed:
        stack.loop.call(lambda scheduler: scheduler.check_integrity())
        assert not stack.scheduler.has_unfinished()
        assert stack.block_pool.num_used == 0, "KV blocks leaked"
        assert stack.adapters.num_requests == 0, "adapter references leaked"
        c = stack.scheduler.counters
        assert c.accepted == c.finished + c.cancelled + c.failed


@pytest.fixture
def make_engine(tiny_dir: Path) -> Iterator[Callable[..., Engine]]:
    """Engines made by a test, checked for leaks and closed after it."""
    made: list[Engine] = []

    def make(model: Path = tiny_dir, **options: Any) -> Engine:
        engine = Engine(model, **(SMALL | options))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        assert_idle(engine)
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()
