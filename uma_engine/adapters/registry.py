"""Which adapter sits in which slot, under which name, and who still uses it.

Knows names, slots and reference counts; does not know files' contents, requests or the KV cache. Any thread may call
it.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from uma_engine.adapters.loader import LoadedAdapter, load_adapter
from uma_engine.core import AdapterRef
from uma_engine.errors import AdapterError, InvariantViolation, Overloaded, UnknownAdapter
from uma_kernels.dispatch import use_backend
from uma_kernels.lora import PackedLora

__all__ = ["AdapterInfo", "AdapterRegistry"]

MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an operator sees of a loaded adapter. `num_requests` counts the requests that hold it now."""

    name: str
    path: str
    ref: AdapterRef
    rank: int
    num_bytes: int
    num_requests: int
    base_model: str | None


@dataclass(slots=True)
class _Resident:
    ref: AdapterRef
    adapter: LoadedAdapter
    path: str
    num_requests: int = 0
    name: str | None = field(default=None)  # None once unloaded or replaced: it leaves with its last request


class Pools(Protocol):
    """A device's memory for adapters. `load` returns when the factors are there."""

    def load(self, slot: int, packed: Mapping[str, PackedLora]) -> None: ...


class AdapterRegistry:
    """Slots 0..max_loras-1 of one base, whose sites are fixed.

    A slot's content never changes while a request holds its adapter: an unloaded or replaced adapter stays until its
    last request is released, and a reload goes to another slot. Nothing is evicted to make room.

    `pools`: where factors also go on a device, before anybody can ask for them. Uploads take turns among themselves, and
    nobody else waits for one.
    """

    def __init__(
        self, max_loras: int, max_rank: int, sites: Mapping[str, tuple[int, int]], pools: Pools | None = None
    ) -> None:
        self._max_rank = max_rank
        self._pools = pools
        self._loading = threading.Lock()
        self._site_shapes = dict(sites)
        self._lock = threading.Lock()
        self._slots: list[_Resident | None] = [None] * max_loras
        self._names: dict[str, _Resident] = {}
        self._sites: dict[str, list[PackedLora | None]] = {site: [None] * max_loras for site in sites}
        self._version = 0

    def load(self, name: str, path: str | Path) -> AdapterRef:
        """Load the PEFT directory `path` under `name`; requests that ask for the name from now on get it.

        All or nothing: the adapter is read, checked and packed before anybody sees it, and a failure leaves what the
        name meant before. Loading the same content again under its name changes nothing.

        Errors:  AdapterError as `load_adapter`, or for an impossible name; Overloaded when no slot is free
        """
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise AdapterError(
                f"the adapter name {name[:MAX_NAME_CHARS]!r} is not 1 to {MAX_NAME_CHARS} printable characters"
            )
        # What goes to a device stays in plain tensors here.
        with contextlib.nullcontext() if self._pools is None else use_backend("reference"):
            adapter = load_adapter(path, self._site_shapes, self._max_rank)
        if self._pools is None:
            with self._lock:
                return self._install(name, path, adapter, None)
        with self._loading:
            with self._lock:
                old = self._names.get(name)
                if old is not None and old.ref.digest == adapter.digest:
                    return old.ref
                slot = self._slot_for(name, old)
                if self._slots[slot] is not None and old is not None:
                    self._forget(old)  # idle, and the only place left is its own
                reserved = self._slots[slot] = _Resident(AdapterRef(adapter.digest, slot), adapter, str(path), 1)
            try:
                self._pools.load(slot, adapter.packed)
            except BaseException:
                with self._lock:
                    self._slots[slot] = None
                raise
            with self._lock:
                assert self._slots[slot] is reserved
                return self._install(name, path, adapter, slot)

    def _install(self, name: str, path: str | Path, adapter: LoadedAdapter, slot: int | None) -> AdapterRef:
        """Give `name` this meaning, in `slot`, or in a free one."""
        old = self._names.get(name)
        if old is not None and old.ref.digest == adapter.digest:
            return old.ref
        if slot is None:
            slot = self._slot_for(name, old)
        if old is not None:
            self._forget(old)
        resident = _Resident(AdapterRef(adapter.digest, slot), adapter, str(path), name=name)
        self._slots[slot] = self._names[name] = resident
        for site, packed in adapter.packed.items():
            self._sites[site][slot] = packed
        self._version += 1
        return resident.ref

    def unload(self, name: str) -> None:
        """Take the name away at once; the memory goes with the last request that holds the adapter.

        Errors:  UnknownAdapter
        """
        with self._lock:
            self._forget(self._named(name))

    def lease(self, name: str) -> AdapterRef:
        """Hold for one request what the name means now. Errors: UnknownAdapter, naming the nearest ones"""
        with self._lock:
            resident = self._named(name)
            resident.num_requests += 1
            return resident.ref

    def release(self, ref: AdapterRef) -> None:
        """Give back what `lease` took. Errors: InvariantViolation when nothing was taken"""
        with self._lock:
            resident = self._slots[ref.slot]
            if resident is None or resident.ref != ref or resident.num_requests == 0:
                raise InvariantViolation(f"slot {ref.slot} was released more often than it was leased")
            resident.num_requests -= 1
            self._free_if_unused(resident)

    def path_of(self, ref: AdapterRef) -> str:
        """Where an adapter that the caller holds was loaded from. Errors: UnknownAdapter when it has left its slot"""
        with self._lock:
            resident = self._slots[ref.slot]
            if resident is None or resident.ref != ref:
                raise UnknownAdapter(f"the adapter with digest `{ref.digest.hex()[:12]}` is no longer loaded")
            return resident.path

    def is_loaded(self, name: str) -> bool:
        with self._lock:
            return name in self._names

    def has_room(self, name: str) -> bool:
        """Whether `load` would find a slot for this name now."""
        with self._lock:
            old = self._names.get(name)
            return None in self._slots or (old is not None and old.num_requests == 0)

    @property
    def version(self) -> int:
        """Another number whenever a slot has got or lost its adapter."""
        return self._version

    def sites_of(self, site: str) -> Sequence[PackedLora | None]:
        """The resident adapters of a site, indexed by slot; a live view."""
        return self._sites[site]

    def loaded(self) -> list[AdapterInfo]:
        """Loaded adapters by name, alphabetically."""
        with self._lock:
            return [_info(name, self._names[name]) for name in sorted(self._names)]

    @property
    def num_bytes(self) -> int:
        """Memory of all resident adapters, those that only wait for their last request included."""
        with self._lock:
            return sum(resident.adapter.num_bytes for resident in self._slots if resident is not None)

    @property
    def num_requests(self) -> int:
        """How many holds are out; 0 when idle."""
        with self._lock:
            return sum(resident.num_requests for resident in self._slots if resident is not None)

    def _named(self, name: str) -> _Resident:
        found = self._names.get(name)
        return found if found is not None else self.unknown(name)

    def unknown(self, name: str) -> NoReturn:
        """Raise UnknownAdapter, naming the nearest ones."""
        near = difflib.get_close_matches(str(name), self._names, n=3, cutoff=0.5)
        if near:
            hint = "did you mean " + " or ".join(f"`{n}`" for n in near)
        elif self._names:
            hint = "loaded are " + ", ".join(f"`{n}`" for n in sorted(self._names)[:10])
        else:
            hint = "no adapter is loaded yet"
        raise UnknownAdapter(f"no adapter is loaded under the name `{name}`", hint=hint, param="adapter")

    def _slot_for(self, name: str, old: _Resident | None) -> int:
        """A free slot, or the idle one of the adapter that is being replaced."""
        if None in self._slots:
            return self._slots.index(None)
        if old is not None and old.num_requests == 0:
            return old.ref.slot
        raise Overloaded(
            f"`max_loras` is {len(self._slots)} and no slot is free for adapter `{name}`",
            hint="unload an adapter, or start the engine with a larger `max_loras`",
            param="max_loras",
        )

    def _forget(self, resident: _Resident) -> None:
        assert resident.name is not None
        del self._names[resident.name]
        resident.name = None
        self._free_if_unused(resident)

    def _free_if_unused(self, resident: _Resident) -> None:
        if resident.name is not None or resident.num_requests:
            return
        slot = resident.ref.slot
        self._slots[slot] = None
        for site in resident.adapter.packed:
            self._sites[site][slot] = None
        self._version += 1


def _info(name: str, resident: _Resident) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        path=resident.path,
        ref=resident.ref,
        rank=resident.adapter.rank,
        num_bytes=resident.adapter.num_bytes,
        num_requests=resident.num_requests,
        base_model=resident.adapter.base_model,
    )
