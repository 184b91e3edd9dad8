"""Adapters by the thousand: who is known, who sits in a slot, and who goes to make room.

Knows names, aliases, paths, what loading costs and who waits; does not know files' contents or requests. A registered adapter takes no
memory until somebody asks for it. Then it takes a free slot, or that of an idle one by greedy-dual (Young 1994): of those that are not
pinned the one goes whose last use and cost of loading count least. Where every slot is in use, callers wait in the order in which they
came; one who has waited `PATIENCE_S` stops new requests from taking the adapter that counts least, so that nobody starves behind popular
ones. Any thread may call it, and may block.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from uma_engine.adapters.registry import MAX_NAME_CHARS, AdapterInfo, AdapterRegistry
from uma_engine.core import AdapterRef
from uma_engine.errors import AdapterError, Overloaded

__all__ = ["AdapterStore", "Known"]

LOAD_S = 10.0  # that an operator's load waits for a slot
PATIENCE_S = 0.25
DRAINED_S = 2.0  # at most in one go: a request of several stages asks again for what it holds
CONFIG = "adapter_config.json"


@dataclass
class Known:
    """A registered adapter. `credit` grows with every use by what loading it took."""

    name: str
    path: Path
    pinned: bool = False
    load_s: float = 0.0
    credit: float = 0.0
    drained_until: float = 0.0
    loads: int = 0


class AdapterStore:
    """The names of one engine, over its slots."""

    def __init__(self, registry: AdapterRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._known: dict[str, Known] = {}
        self._aliases: dict[str, str] = {}
        self._inflation = 0.0  # the credit of who went last: what greedy-dual ages by
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # callers who need a slot, in order
        self.num_misses = 0
        self.num_evictions = 0

    # ---- what an operator does ----

    def register(self, name: str, path: str | Path, pinned: bool = False) -> None:
        """Make a name known. Nothing is loaded, unless it is loaded under this name already and comes from elsewhere now.

        Errors:  AdapterError for an impossible name or where no adapter is
        """
        path = Path(path)
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise AdapterError(
                f"the adapter name {name[:MAX_NAME_CHARS]!r} is not 1 to {MAX_NAME_CHARS} printable characters"
            )
        if not (path / CONFIG).is_file():
            raise AdapterError(f"`{path}` has no `{CONFIG}`", hint="give the directory of a PEFT adapter")
        with self._changed:
            if name in self._aliases:
                raise AdapterError(f"`{name}` is an alias of `{self._aliases[name]}`", hint="remove the alias first")
            known = self._known.get(name)
            if known is not None and known.path == path:
                known.pinned = pinned
                return
            self._known[name] = Known(name, path, pinned)
        if known is not None and self._registry.is_loaded(name):
            self.reload(name)

    def load(self, name: str, path: str | Path, pinned: bool = False) -> AdapterRef:
        """Register and load, replacing what had that name at once: all or nothing. Errors: AdapterError; Overloaded: no slot got free"""
        with self._changed:
            if name in self._aliases:
                raise AdapterError(f"`{name}` is an alias of `{self._aliases[name]}`", hint="remove the alias first")
        known = Known(name, Path(path), pinned, credit=self._inflation)
        ref = self._loaded(known, LOAD_S)
        with self._changed:
            self._known[name] = known
        return ref

    def reload(self, name: str) -> AdapterRef:
        """Read a known adapter again; requests from now on get what is there. Errors: UnknownAdapter, AdapterError"""
        with self._changed:
            known = self._find(name)
        return self._loaded(known, LOAD_S)

    def unload(self, name: str) -> None:
        """Forget an adapter or an alias; requests that use it finish. Errors: UnknownAdapter"""
        with self._changed:
            if self._aliases.pop(name, None) is not None:
                return
            known = self._known.pop(name, None)
            self._aliases = {alias: target for alias, target in self._aliases.items() if target != name}
            if known is None or self._registry.is_loaded(name):
                self._registry.unload(name)
            self._changed.notify_all()

    def alias(self, alias: str, name: str) -> None:
        """Another name of a known adapter; an alias may be moved from one to another. Errors: UnknownAdapter, AdapterError"""
        with self._changed:
            if alias in self._known or not alias or len(alias) > MAX_NAME_CHARS or not alias.isprintable():
                raise AdapterError(f"`{alias[:MAX_NAME_CHARS]}` cannot be an alias", hint="an adapter has this name")
            self._aliases[alias] = self._find(name).name

    def pin(self, name: str, pinned: bool = True) -> None:
        """A pinned adapter stays in its slot once it is there. Errors: UnknownAdapter"""
        with self._changed:
            self._find(name).pinned = pinned

    def names(self) -> list[str]:
        """All that may be asked for, aliases included, sorted."""
        with self._changed:
            return sorted({*self._known, *self._aliases})

    def known(self) -> list[tuple[Known, AdapterInfo | None]]:
        """Known adapters by name, each with what sits in its slot."""
        resident = {info.name: info for info in self._registry.loaded()}
        with self._changed:
            return [(self._known[name], resident.get(name)) for name in sorted(self._known)]

    def is_cold(self, name: str) -> bool:
        """Whether this is a known adapter that is in no slot."""
        with self._changed:
            known = self._known.get(self._aliases.get(name, name))
            return known is not None and not self._registry.is_loaded(known.name)

    # ---- what requests do ----

    def lease(self, name: str, timeout: float = 30.0) -> AdapterRef:
        """Hold for one request what the name means now; loads it where it is not there. Waits at most `timeout` seconds.

        Errors:  UnknownAdapter; AdapterError where its files have gone bad; Overloaded where no slot gets free in time
        """
        with self._changed:
            target = self._aliases.get(name, name)
            known = self._known.get(target)
            if known is not None and known.drained_until <= self._clock() and self._registry.is_loaded(target):
                known.credit = self._inflation + known.load_s
                return self._registry.lease(target)
        if known is None:
            return self._registry.lease(name)  # which says what there is
        return self._loaded(known, timeout, lease=True)

    def release(self, ref: AdapterRef) -> None:
        """Give back what `lease` took."""
        self._registry.release(ref)
        if self._queue:
            with self._changed:
                self._changed.notify_all()

    # ---- slots ----

    def _loaded(self, known: Known, timeout: float, lease: bool = False) -> AdapterRef:
        """Read `known` into a slot when it is this caller's turn. Who has the turn alone loads and evicts."""
        me = object()  # a place in the queue
        end = self._clock() + timeout
        with self._changed:
            self._queue.append(me)
        try:
            while True:
                if (held := self._room_for(known, me, end, timeout, lease)) is not None:
                    return held
                began = self._clock()
                try:
                    ref = self._registry.load(known.name, known.path)
                except Overloaded:  # what was idle a moment ago, its own old slot, is in use again
                    continue
                with self._changed:
                    known.load_s = self._clock() - began
                    known.credit = self._inflation + known.load_s
                    known.drained_until = 0.0
                    known.loads += 1
                    self.num_misses += lease
                    return self._registry.lease(known.name) if lease else ref
        finally:
            with self._changed:
                self._queue.remove(me)
                self._changed.notify_all()

    def _room_for(self, known: Known, me: object, end: float, timeout: float, lease: bool) -> AdapterRef | None:
        """Wait until it is this caller's turn and a slot is free. A lease, if somebody has loaded the adapter meanwhile."""
        patience = self._clock() + PATIENCE_S
        with self._changed:
            while True:
                now = self._clock()
                if self._queue[0] is me:
                    if lease and known.drained_until <= now and self._registry.is_loaded(known.name):
                        return self._registry.lease(known.name)
                    if self._has_room(known):
                        return None
                    if now >= patience:
                        self._drain_least(now)
                        patience = now + DRAINED_S
                if now >= end:
                    raise Overloaded(
                        f"no slot got free for adapter `{known.name}` within {timeout:g} s",
                        hint="ask later, or start the engine with a larger `max_loras`",
                        param="max_loras",
                    )
                self._changed.wait(max(0.001, min(end, patience) - now))

    def _has_room(self, known: Known) -> bool:
        """A slot is free for `known`, if need be since the idle adapter that counts least has gone."""
        if self._registry.has_room(known.name):
            return True
        idle = [
            self._known[info.name]
            for info in self._registry.loaded()
            if not info.num_requests and info.name in self._known and not self._known[info.name].pinned
        ]
        if not idle:
            return False
        least = min(idle, key=lambda k: (k.credit, k.name))
        self._inflation = max(self._inflation, least.credit)
        self._registry.unload(least.name)
        self.num_evictions += 1
        return True

    def _drain_least(self, now: float) -> None:
        """New requests wait for the adapter in use that counts least, until it has left or some time has gone."""
        busy = [self._known[i.name] for i in self._registry.loaded() if i.name in self._known]
        busy = [k for k in busy if not k.pinned]
        if busy and not any(k.drained_until > now for k in busy):
            min(busy, key=lambda k: (k.credit, k.name)).drained_until = now + DRAINED_S

    def _find(self, name: str) -> Known:
        known = self._known.get(self._aliases.get(name, name))
        if known is None:
            self._registry.unknown(name)
        assert known is not None
        return known
