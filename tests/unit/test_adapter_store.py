"""Thousands of adapters over few slots: what is loaded when, who goes, who waits how long, and that no answer is stale."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.unit.test_adapter_registry import SITES, value_in, write_adapter
from uma_engine.adapters import AdapterRegistry, AdapterStore
from uma_engine.errors import AdapterError, Overloaded, UnknownAdapter


def store_of(slots: int) -> tuple[AdapterStore, AdapterRegistry]:
    registry = AdapterRegistry(slots, 4, SITES)
    return AdapterStore(registry), registry


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"a{i}", float(i + 1)) for i in range(24)]


def test_registering_loads_nothing_and_a_lease_does(paths: list[Path]) -> None:
    store, registry = store_of(2)
    for path in paths:
        store.register(path.name, path)
    assert store.names() == sorted(p.name for p in paths)
    assert registry.loaded() == []
    assert store.is_cold("a7")
    ref = store.lease("a7")
    assert value_in(registry, ref.slot) == 8
    assert not store.is_cold("a7")
    store.release(ref)
    for path in paths:
        ref = store.lease(path.name)
        assert value_in(registry, ref.slot) == int(path.name[1:]) + 1
        store.release(ref)
    assert len(registry.loaded()) == 2, "what made room is gone from memory"
    assert store.num_misses - len(paths) in (0, 1), "a7 may have had to go, and come again"
    with pytest.raises(UnknownAdapter):
        store.lease("nobody")
    with pytest.raises(AdapterError, match="has no"):
        store.register("x", paths[0].parent)


def test_the_least_useful_idle_one_goes_and_a_pinned_one_never(paths: list[Path]) -> None:
    store, registry = store_of(3)
    for path in paths:
        store.register(path.name, path)
    store.pin("a0")

    def use(name: str) -> None:
        store.release(store.lease(name))

    for name in ("a0", "a1", "a2"):
        use(name)
    store._known["a1"].load_s = 5.0  # dear to load: worth keeping
    use("a1")
    for path in paths[3:]:
        use(path.name)
        assert {"a0", "a1"} <= {info.name for info in registry.loaded()}
    store.pin("a0", False)
    store._known["a1"].load_s = 0.0
    for path in paths[3:]:
        for _ in range(2):
            use(path.name)
    for known in store._known.values():
        known.credit = min(known.credit, store._inflation)
    use("a20")
    use("a21")
    use("a22")
    assert {info.name for info in registry.loaded()} & {"a20", "a21", "a22"}


def test_aliases_move_between_two_requests(paths: list[Path]) -> None:
    store, registry = store_of(2)
    store.register("a1", paths[1])
    store.register("a2", paths[2])
    store.alias("live", "a1")
    first = store.lease("live")
    store.alias("live", "a2")
    second = store.lease("live")
    assert (value_in(registry, first.slot), value_in(registry, second.slot)) == (2, 3)
    with pytest.raises(AdapterError, match="alias"):
        store.register("live", paths[3])
    with pytest.raises(AdapterError, match="alias"):
        store.alias("a1", "a2")
    with pytest.raises(UnknownAdapter):
        store.alias("x", "nobody")
    store.unload("a2")
    with pytest.raises(UnknownAdapter):
        store.lease("live")
    store.release(first)
    store.release(second)
    assert [info.name for info in registry.loaded()] == ["a1"]


def test_who_needs_a_slot_waits_in_turn_and_not_for_ever(paths: list[Path]) -> None:
    """One slot, and a popular adapter that is asked for without a pause by many: the other one still gets it."""
    store, registry = store_of(1)
    for path in paths[:2]:
        store.register(path.name, path)
    stop = threading.Event()
    served = [0]

    def popular() -> None:
        while not stop.is_set():
            ref = store.lease("a0")
            time.sleep(0.01)
            store.release(ref)
            served[0] += 1

    crowd = [threading.Thread(target=popular) for _ in range(6)]
    for thread in crowd:
        thread.start()
    time.sleep(0.2)
    waits = []
    for _ in range(3):
        began = time.monotonic()
        ref = store.lease("a1", timeout=20)
        waits.append(time.monotonic() - began)
        assert value_in(registry, ref.slot) == 2
        store.release(ref)
    before = served[0]
    time.sleep(0.3)
    stop.set()
    for thread in crowd:
        thread.join()
    assert max(waits) < 5
    assert served[0] > before, "and the popular one goes on"


def test_no_slot_in_time(paths: list[Path]) -> None:
    store, _ = store_of(1)
    for path in paths[:2]:
        store.register(path.name, path)
    ref = store.lease("a0")
    with pytest.raises(Overloaded, match="no slot"):
        store.lease("a1", timeout=0.1)
    again = store.lease("a0", timeout=5)  # who gave up leaves nothing behind
    store.release(again)
    store.release(ref)
    store.release(store.lease("a1", timeout=1))


def test_files_that_went_bad_are_an_error_and_block_nobody(paths: list[Path]) -> None:
    store, registry = store_of(2)
    for path in paths[:3]:
        store.register(path.name, path)
    (paths[0] / "adapter_model.safetensors").write_bytes(b"garbage")
    for _ in range(3):
        with pytest.raises(AdapterError):
            store.lease("a0")
        ref = store.lease("a1")
        assert value_in(registry, ref.slot) == 2
        store.release(ref)


def test_reloads_race_with_requests_and_no_answer_is_stale(tmp_path: Path) -> None:
    """What a lease gives is what the files held at some moment between the last reload before it and its own end."""
    store, registry = store_of(3)
    names = ("x", "y")
    written = dict.fromkeys(names, 1)
    for name in names:
        store.register(name, write_adapter(tmp_path / name, 1.0))
    others = [write_adapter(tmp_path / f"o{i}", 100.0 + i) for i in range(4)]
    for path in others:
        store.register(path.name, path)
    stop, wrong, counted = threading.Event(), [], [0]

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            name = rng.choice(names)
            low = done[name]
            ref = store.lease(name)
            value = value_in(registry, ref.slot)
            if not low <= value <= written[name]:
                wrong.append((low, value, written[name]))
            store.release(ref)
            counted[0] += 1
            if rng.random() < 0.1:
                store.release(store.lease(rng.choice(others).name))

    done = dict(written)  # versions whose reload has returned
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for version in range(2, 2 + int(os.environ.get("UMA_RELOADS", "400")) // 2):
        for name in names:
            written[name] = version
            part = write_adapter(tmp_path / f"{name}.part", float(version))
            (part / "adapter_model.safetensors").replace(tmp_path / name / "adapter_model.safetensors")
            store.reload(name)
            done[name] = version
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert counted[0] > 200
    assert registry.num_requests == 0
