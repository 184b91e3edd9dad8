"""The base that answers, and how another one takes its place while requests run.

Knows engines, leases and the phases of a swap; does not know HTTP. A request holds the generation that it began with until its answer is
whole: no answer mixes two bases, and a swap drops nobody. A new base is loaded beside the old one, tested, and asked what the old one was
asked lately; then one assignment makes it the current one. The old one stays for a rollback until the next swap.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.core import background
from uma_engine.errors import InvalidRequest, InvariantViolation, UmaError
from uma_engine.ranking.agreement import kendall_tau

if TYPE_CHECKING:
    from uma_engine.retrieval.embedder import Embedder
    from uma_engine.tasks.api import AsyncEngine

__all__ = ["Busy", "Generation", "Generations", "Lease", "Make", "SwapPlan"]

logger = logging.getLogger("uma_engine.serve")
SHADOWED = 16  # questions that are remembered
SHADOW_CANDIDATES = 8  # of each
SHADOW_S = 5.0  # after which no more of them are asked
JOB = "We need a developer who knows Rust and PostgreSQL."
PEOPLE = ("Ten years of Rust and databases.", "A careful nurse.", "Paints walls and fixes roofs.")
CANARY_FAILURES = 3  # before a canary's rate means anything
Make = Callable[[str], Awaitable["AsyncEngine"]]


class Busy(UmaError):
    """Another swap is under way, or there is nothing to go back to."""

    status = 409


@dataclass(frozen=True)
class SwapPlan:
    """`adapters`: by name, below the server's adapter root; `aliases`: other names for them; `pinned`: those that stay in their slots.
    `exclusive`: where memory holds one base, requests wait while the old one is closed and the new one loaded; if that fails the old one is
    loaded again. `canary`: at first the new base answers this share of the keys, always the same ones, until it is finished or, by hand or
    since it fails, rolled back."""

    model: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    exclusive: bool = False
    canary: float | None = None

    def register(self, engine: AsyncEngine) -> None:
        """Make the adapters and their other names known. Errors: AdapterError, UnknownAdapter"""
        for name, path in self.adapters.items():
            engine.register_adapter(name, path, pinned=name in self.pinned)
        for alias, name in self.aliases.items():
            engine.alias_adapter(alias, name)


@dataclass
class Generation:
    """One base with its adapters, and how many requests hold it."""

    number: int
    engine: AsyncEngine
    plan: SwapPlan
    held: int = 0
    answered: int = 0
    failed: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, Any]:
        stack = self.engine.stack_info()
        return {
            "generation": self.number,
            "model": stack.model,
            "base_digest": stack.base_digest,
            "adapters": [] if self.engine.closed else self.engine.adapters(),
            "requests": self.held,
            "answered": self.answered,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class _Asked:
    """A question lately, and what a generation said to it, where it was asked as the next one will be."""

    query: str
    texts: tuple[str, ...]
    generation: int
    scores: tuple[float, ...] | None


class Lease:
    """A request's hold on a generation. `release` may be called again."""

    def __init__(self, generation: Generation) -> None:
        self._generation: Generation | None = generation
        self.engine = generation.engine
        self.number = generation.number
        generation.held += 1
        generation.idle.clear()

    def release(self, failed: bool = False) -> None:
        """`failed`: the engine did not do what it should have."""
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.held -= 1
            generation.answered += 1
            generation.failed += failed
            if not generation.held:
                generation.idle.set()


class Generations:
    """The current base, the one before it, and the swap under way. All methods belong to one event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        make: Make | None = None,
        state_file: Path | None = None,
        exclusive: bool = False,
        plan: SwapPlan | None = None,
    ) -> None:
        """`engine` belongs to the caller; `make` opens others, None: no swaps. `state_file` keeps which base answers. `exclusive`: every
        swap is, since two engines cannot both hold what this one holds, such as a decision log. `plan`: what `engine` was made from."""
        self._make = make
        self._exclusive = exclusive
        self._state_file = state_file
        self._first = engine
        self.current = Generation(1, engine, plan or SwapPlan(engine.model))
        self.previous: Generation | None = None
        self.canary: Generation | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._task: asyncio.Task[None] | None = None
        self._report: dict[str, Any] = {"phase": "idle"}
        self._asked: deque[_Asked] = deque(maxlen=SHADOWED)
        self.num_swaps = 0
        self._phase_began = 0.0
        self._closing: set[asyncio.Future[None]] = set()
        self._embedder: asyncio.Task[Embedder] | None = None

    async def lease(self, key: str = "") -> Lease:
        """The current generation, or for some keys a canary; waits while an exclusive swap runs."""
        await self._open.wait()
        canary = self.canary
        if canary is not None and _share_of(key) < (canary.plan.canary or 0.0):
            return Lease(canary)
        return Lease(self.current)

    def watch(self) -> None:
        """Called after a request: a canary that fails more often than it may is taken back."""
        canary = self.canary
        if canary is None or canary.failed < CANARY_FAILURES:
            return
        rate, usual = (g.failed / max(1, g.answered) for g in (canary, self.current))
        if rate > 2 * usual:
            logger.warning(
                "the canary `%s` failed %s of %s requests", canary.plan.model, canary.failed, canary.answered
            )
            self._report = {"phase": "rolled back", "model": self.current.engine.model, "why": "the canary failed"}
            self._drop_canary()

    def finish(self) -> dict[str, Any]:
        """The canary becomes the current base. Errors: Busy"""
        canary = self.canary
        if canary is None:
            raise Busy("there is no canary", hint="start one: `canary` of a swap")
        self.canary = None
        canary.plan = replace(canary.plan, canary=None)
        self.current, self.previous = canary, self.current
        self.num_swaps += 1
        self._keep()
        self._report = {"phase": "done", "model": canary.engine.model}
        return self.status()

    def _drop_canary(self) -> None:
        canary, self.canary = self.canary, None
        if canary is not None:
            task = asyncio.ensure_future(self._retire(canary))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def embedder(self) -> Embedder:
        """The sentence encoder, opened when it is first asked for. Errors: MissingPackage, DownloadError"""
        if self._embedder is None or (self._embedder.done() and self._embedder.exception() is not None):
            from uma_engine.retrieval.embedder import Embedder

            self._embedder = asyncio.create_task(asyncio.to_thread(lambda: Embedder(cache=False)))
        return await asyncio.shield(self._embedder)

    def remember(
        self, query: str, texts: Sequence[str], generation: int = 0, scores: Sequence[float] | None = None
    ) -> None:
        """What was asked: a new base is asked the same before it takes over. `scores`: of a plain ranking by `generation`. In memory
        alone."""
        known = None if scores is None else tuple(scores[:SHADOW_CANDIDATES])
        self._asked.append(_Asked(query, tuple(texts[:SHADOW_CANDIDATES]), generation, known))

    def status(self) -> dict[str, Any]:
        return {
            "current": self.current.describe(),
            "previous": None if self.previous is None else self.previous.describe(),
            "canary": None if self.canary is None else self.canary.describe() | {"share": self.canary.plan.canary},
            "swap": dict(self._report),
            "swaps": self.num_swaps,
        }

    def start(self, plan: SwapPlan) -> dict[str, Any]:
        """Begin a swap in the background. Errors: Busy, InvalidRequest where this server cannot"""
        if self._make is None:
            raise InvalidRequest("this server swaps no bases", hint="start it with `uma serve`")
        if plan.canary is not None and not (0 < plan.canary < 1 and not plan.exclusive and not self._exclusive):
            raise InvalidRequest(
                f"`canary` is {plan.canary} but must lie between 0 and 1, beside the old base", param="canary"
            )
        if self.canary is not None:
            raise Busy(f"`{self.canary.plan.model}` is a canary", hint="finish it, or roll back")
        if self.swapping:
            raise Busy(f"a swap to `{self._report.get('model')}` is under way", hint="ask `GET /admin/swap/status`")
        plan = replace(plan, exclusive=plan.exclusive or self._exclusive)
        self._report = {"phase": "loading", "model": plan.model, "exclusive": plan.exclusive, "began": time.time()}
        self._task = asyncio.create_task(self._swap(plan))
        return self.status()

    @property
    def swapping(self) -> bool:
        return self._task is not None and not self._task.done()

    async def wait(self) -> dict[str, Any]:
        """The end of the swap under way."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        return self.status()

    def keep_adapter(self, name: str, path: Path | None, pinned: bool = False) -> None:
        """The current base has another adapter, or (None) one less, or an alias less: a restart has what there is."""
        plan = self.current.plan
        adapters = {n: p for n, p in plan.adapters.items() if n != name} | ({} if path is None else {name: path})
        aliases = {a: n for a, n in plan.aliases.items() if a != name and (path is not None or n != name)}
        kept = (plan.pinned - {name}) | ({name} if pinned else set())
        self.current.plan = replace(plan, adapters=adapters, aliases=aliases, pinned=kept)
        self._keep()

    def keep_alias(self, alias: str, name: str) -> None:
        """The current base has another name for an adapter: a restart has it too."""
        plan = self.current.plan
        self.current.plan = replace(plan, aliases={**plan.aliases, alias: name})
        self._keep()

    def rollback(self) -> dict[str, Any]:
        """The base before is the current one again, at once. Errors: Busy"""
        if self.swapping:
            raise Busy("a swap is under way", hint="ask `GET /admin/swap/status`, then roll back")
        if self.canary is not None:
            self._drop_canary()
            self._report = {"phase": "rolled back", "model": self.current.engine.model}
            return self.status()
        if self.previous is None or self.previous.engine.closed:
            raise Busy("there is no base to go back to", hint="swap to it by name")
        self.current, self.previous = self.previous, self.current
        self.num_swaps += 1
        self._keep()
        self._report = {"phase": "rolled back", "model": self.current.engine.model}
        return self.status()

    async def close(self) -> None:
        """Close every engine that a swap has made."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)
        for generation in (self.current, self.previous, self.canary):
            if generation is not None and generation.engine is not self._first:
                await generation.engine.close()
        if self._embedder is not None:
            with contextlib.suppress(Exception):
                (await self._embedder).close()

    # ---- a swap ----

    async def _swap(self, plan: SwapPlan) -> None:
        began = self._phase_began = time.perf_counter()
        fresh: AsyncEngine | None = None
        old = self.current
        try:
            if self.previous is not None:  # its memory is needed
                self._phase("retiring")
                await self._retire(self.previous)
                self.previous = None
            if plan.exclusive:
                self._phase("draining")
                self._open.clear()
                await self._retire(old)
            self._phase("loading")
            fresh = await self._loaded(plan)
            if not plan.exclusive:
                fresh.give_way(old.engine)
            with background():
                self._phase("testing")
                await self._tested(fresh)
                if not plan.exclusive:
                    self._phase("shadowing")
                    self._report["shadow"] = await self._shadowed(old, fresh)
            fresh.give_way(None)
            if plan.canary is not None:
                self.canary = Generation(old.number + 1, fresh, plan)
                self._phase("canary")
                return
            # One assignment: a request before it has the old base, one after it the new one.
            self.current, self.previous = Generation(old.number + 1, fresh, plan), None if plan.exclusive else old
            self.num_swaps += 1
            self._keep()
            self._phase("done")
        except BaseException as error:
            logger.warning("the swap to `%s` failed: %s", plan.model, error)
            if fresh is not None:
                await asyncio.shield(fresh.close())
            if plan.exclusive and old.engine.closed:
                await self._restored(old)
            self._report |= {"phase": "failed", "error": f"{type(error).__name__}: {error}"}
            if not isinstance(error, Exception):
                raise
        finally:
            self._open.set()
            self._report["seconds"] = round(time.perf_counter() - began, 3)

    def _phase(self, name: str) -> None:
        """The report's phase from now on; how long the one before took is kept in it."""
        now, took = time.perf_counter(), self._report.setdefault("took", {})
        before = self._report["phase"]
        if self._phase_began:
            took[before] = round(took.get(before, 0.0) + now - self._phase_began, 3)
        self._report["phase"], self._phase_began = name, now

    async def _loaded(self, plan: SwapPlan) -> AsyncEngine:
        assert self._make is not None
        engine = await self._make(plan.model)
        try:
            plan.register(engine)  # the test that follows asks for each, so each is loaded
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _tested(self, engine: AsyncEngine) -> None:
        """It answers, in company and alone with the same bits, with and without each adapter."""
        for adapter in (None, *engine.adapters()):
            together = await engine.rank(JOB, PEOPLE, adapter=adapter)
            alone = await engine.rank(JOB, PEOPLE[1:2], adapter=adapter)
            if alone.all_results[0].logits != together.all_results[1].logits:
                raise InvariantViolation("the new base gives a candidate another score in company than alone")

    async def _shadowed(self, old: Generation, fresh: AsyncEngine) -> dict[str, Any]:
        """How much the order of what was asked lately changes, by as many questions as `SHADOW_S` allows, the latest first."""
        taus: list[float] = []
        began = time.perf_counter()
        for asked in reversed(list(self._asked)):
            if taus and time.perf_counter() - began > SHADOW_S:
                break
            with contextlib.suppress(UmaError):  # too long for the new base, say: that is not the swap's affair
                after = await fresh.rank(asked.query, asked.texts)
                before: Sequence[float]
                if asked.scores is not None and asked.generation == old.number:
                    before = asked.scores
                else:
                    before = [r.score for r in (await old.engine.rank(asked.query, asked.texts)).all_results]
                taus.append(kendall_tau(before, [r.score for r in after.all_results]))
        return {"questions": len(taus), "kendall_tau": round(sum(taus) / len(taus), 4) if taus else None}

    async def _retire(self, generation: Generation) -> None:
        if generation.held:
            await generation.idle.wait()
        await generation.engine.close()

    async def _restored(self, old: Generation) -> None:
        """After an exclusive swap that failed: the base that was closed is loaded again."""
        try:
            engine = await asyncio.shield(self._loaded(old.plan))
        except Exception:
            logger.exception("the base `%s` could not be loaded again", old.plan.model)
            return
        self.current = Generation(old.number, engine, old.plan)

    def _keep(self) -> None:
        if self._state_file is None:
            return
        plan = self.current.plan
        state = {
            "model": plan.model,
            "adapters": {name: str(path) for name, path in plan.adapters.items()},
            "aliases": dict(plan.aliases),
            "pinned": sorted(plan.pinned),
        }
        partial = self._state_file.with_name(f".{self._state_file.name}.part")
        with partial.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._state_file)


def _share_of(key: str) -> float:
    """From 0 to 1, always the same for a key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
