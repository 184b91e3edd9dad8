"""Slots, names and reference counts: reloads take effect at once, and what a request holds never changes under it."""

from __future__ import annotations

import gc
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uma_engine.adapters import AdapterRegistry
from uma_engine.core import AdapterRef
from uma_engine.errors import AdapterError, InvariantViolation, Overloaded, UnknownAdapter
from uma_kernels.lora import LoraRouting, PackedLora, lora

Q, V = "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"
SITES = {Q: (8, 8), V: (8, 8)}


def write_adapter(path: Path, value: float, target: str = "q_proj") -> Path:
    """An adapter of rank 1 on one site that adds 8 * value to every output of an input of ones."""
    path.mkdir(exist_ok=True, parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [target]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.model.layers.0.self_attn.{target}"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.full((8, 1), value)},
        path / "adapter_model.safetensors",
    )
    return path


def value_in(registry: AdapterRegistry, slot: int, site: str = Q) -> float:
    """What the adapter in a slot adds at a site, as a layer would see it; 0 where it leaves the site alone."""
    out = torch.zeros(1, 8)
    adapters = registry.sites_of(site)
    lora(torch.ones(1, 8), out, adapters, LoraRouting.build(torch.tensor([slot], dtype=torch.int32), len(adapters)))
    return out[0, 0].item() / 8


def num_packed() -> int:
    """How many packed adapters are alive in this process, whoever holds them."""
    gc.collect()
    return sum(type(thing) is PackedLora for thing in gc.get_objects())


def refs(registry: AdapterRegistry) -> dict[str, AdapterRef]:
    """What every name means now."""
    return {info.name: info.ref for info in registry.loaded()}


def resident_slots(registry: AdapterRegistry) -> list[int]:
    """Slots that hold weights."""
    return sorted({slot for site in SITES for slot, packed in enumerate(registry.sites_of(site)) if packed is not None})


def assert_idle(registry: AdapterRegistry) -> None:
    assert registry.num_requests == 0
    assert registry.num_bytes == 0
    assert resident_slots(registry) == []


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry(max_loras=2, max_rank=8, sites=SITES)


def test_a_loaded_adapter_is_found_and_listed(registry: AdapterRegistry, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", 2.0)
    ref = registry.load("talent-match", path)
    assert refs(registry) == {"talent-match": ref}
    assert registry.path_of(ref) == str(path)
    assert value_in(registry, ref.slot) == 2.0
    assert value_in(registry, ref.slot, V) == 0.0
    (info,) = registry.loaded()
    assert (info.name, info.path, info.ref, info.rank, info.num_requests) == ("talent-match", str(path), ref, 1, 0)
    assert info.num_bytes == registry.num_bytes > 0


def test_an_unknown_name_is_refused_with_the_nearest(registry: AdapterRegistry, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapter, match="no adapter is loaded yet"):
        registry.lease("talent-match")
    registry.load("talent-match", write_adapter(tmp_path / "a", 1.0))
    with pytest.raises(UnknownAdapter, match="did you mean `talent-match`"):
        registry.lease("talent-mach")
    with pytest.raises(UnknownAdapter, match="loaded are `talent-match`"):
        registry.unload("xyz")
    with pytest.raises(UnknownAdapter):
        registry.lease("Talent")


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a" * 257])
def test_an_impossible_name_is_refused(registry: AdapterRegistry, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="adapter name"):
        registry.load(name, write_adapter(tmp_path / "a", 1.0))


def test_unloading_frees_slot_and_memory(registry: AdapterRegistry, tmp_path: Path) -> None:
    before = num_packed()
    ref = registry.load("a", write_adapter(tmp_path / "a", 1.0))
    assert num_packed() == before + 1
    assert registry.sites_of(Q)[ref.slot] is not None
    registry.unload("a")
    assert num_packed() == before
    assert_idle(registry)
    with pytest.raises(UnknownAdapter):
        registry.lease("a")


def test_an_adapter_in_use_stays_until_its_last_request(registry: AdapterRegistry, tmp_path: Path) -> None:
    ref = registry.load("a", write_adapter(tmp_path / "a", 1.0))
    for _ in range(3):
        assert registry.lease("a") == ref
    registry.unload("a")
    for _ in range(2):
        registry.release(ref)
        assert value_in(registry, ref.slot) == 1.0
    registry.release(ref)
    assert_idle(registry)
    with pytest.raises(UnknownAdapter, match="no longer loaded"):
        registry.path_of(ref)
    with pytest.raises(InvariantViolation):
        registry.release(ref)


def test_a_reload_takes_effect_at_once_beside_the_old_one(registry: AdapterRegistry, tmp_path: Path) -> None:
    old = registry.load("a", write_adapter(tmp_path / "a", 1.0))
    assert registry.lease("a") == old
    new = registry.load("a", write_adapter(tmp_path / "a", 2.0))
    assert new.slot != old.slot
    assert new.digest != old.digest
    assert (value_in(registry, old.slot), value_in(registry, new.slot)) == (1.0, 2.0)
    assert registry.lease("a") == new
    with pytest.raises(Overloaded):  # both slots are busy with the same name
        registry.load("a", write_adapter(tmp_path / "a", 3.0))
    assert refs(registry) == {"a": new}
    registry.release(new)
    registry.release(old)
    assert resident_slots(registry) == [new.slot]
    registry.unload("a")
    assert_idle(registry)


def test_an_idle_adapter_is_replaced_even_when_all_slots_are_taken(tmp_path: Path) -> None:
    registry = AdapterRegistry(max_loras=1, max_rank=8, sites=SITES)
    registry.load("a", write_adapter(tmp_path / "a", 1.0))
    ref = registry.load("a", write_adapter(tmp_path / "a", 2.0, target="v_proj"))
    assert value_in(registry, ref.slot, V) == 2.0
    assert value_in(registry, ref.slot) == 0.0  # nothing is left of the first
    registry.unload("a")
    assert_idle(registry)


def test_loading_the_same_content_again_changes_nothing(registry: AdapterRegistry, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", 1.0)
    ref = registry.load("a", path)
    assert registry.load("a", path) == ref
    assert resident_slots(registry) == [ref.slot]


def test_no_free_slot_is_an_error_and_evicts_nobody(registry: AdapterRegistry, tmp_path: Path) -> None:
    held = [registry.load(name, write_adapter(tmp_path / name, 1.0 + i)) for i, name in enumerate("ab")]
    with pytest.raises(Overloaded) as error:
        registry.load("c", write_adapter(tmp_path / "c", 9.0))
    assert "`max_loras` is 2" in error.value.message
    assert error.value.hint == "unload an adapter, or start the engine with a larger `max_loras`"
    assert [value_in(registry, ref.slot) for ref in held] == [1.0, 2.0]
    with pytest.raises(UnknownAdapter):
        registry.lease("c")


def test_a_failed_reload_leaves_the_old_adapter(registry: AdapterRegistry, tmp_path: Path) -> None:
    ref = registry.load("a", write_adapter(tmp_path / "a", 1.0))
    with pytest.raises(AdapterError):
        registry.load("a", write_adapter(tmp_path / "bad", float("nan")))
    assert refs(registry) == {"a": ref}
    assert value_in(registry, ref.slot) == 1.0
    assert resident_slots(registry) == [ref.slot]


def test_reload_races_never_change_what_a_request_holds(tmp_path: Path) -> None:
    """One thread reloads a name 200 times while others lease it and look, as steps do, at what lies in their slot."""
    registry = AdapterRegistry(max_loras=6, max_rank=8, sites=SITES)
    values = [1.0, 2.0, 4.0, 8.0]
    paths = [write_adapter(tmp_path / str(value), value) for value in values]
    digest_value: dict[bytes, float] = {}
    for path, value in zip(paths, values, strict=True):
        digest_value[registry.load("job", path).digest] = value
    stop, failures = threading.Event(), []

    def serve(seed: int) -> None:
        rng, held = random.Random(seed), list[AdapterRef]()
        try:
            while not stop.is_set() or held:
                if len(held) < 2 and not stop.is_set():
                    held.append(registry.lease("job"))
                for ref in held:
                    assert value_in(registry, ref.slot) == digest_value[ref.digest]
                registry.release(held.pop(rng.randrange(len(held))))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    reloads = 0
    while reloads < 200 and not failures:
        value = values[reloads % 4]
        try:
            ref = registry.load("job", paths[reloads % 4])
        except Overloaded:  # every slot still serves somebody: try again
            continue
        assert digest_value[ref.digest] == value
        assert refs(registry) == {"job": ref}
        reloads += 1
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    registry.unload("job")
    assert_idle(registry)
