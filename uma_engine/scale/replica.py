"""One engine of several: the same application as `uma serve`, asked by frames that Ray carries.

Knows a replica's life in Ray Serve; does not know the other replicas or how a request comes to this one. Ray is imported when it begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from uma_engine.errors import EngineUnavailable, UmaError, UnknownAdapter
from uma_engine.serve.processes.backend import Answering
from uma_engine.serve.processes.frames import Ask, Head, Part, decode_frame, encode_frame

__all__ = ["NAMESPACE", "EngineReplica"]

logger = logging.getLogger("uma_engine.scale")
NAMESPACE = "uma-engine"  # of the operator among Ray's actors
FOLLOW_S = 0.5
STARTING = {"phase": "starting"}
T = TypeVar("T")


class EngineReplica:
    """`settings`: fields of `ServeSettings` but the state, which the cluster keeps; `options`: of the engine; `operator`: the name of the
    Ray actor that is asked what to answer with."""

    def __init__(self, settings: dict[str, Any], options: dict[str, Any], operator: str) -> None:
        self._settings, self._options, self._operator_name = settings, options, operator
        self._app: Any = None
        self._engine: Any = None
        self._over = contextlib.AsyncExitStack()
        self._operator: Any = None
        self._number = 0
        self._name = secrets.token_hex(4)
        self._following: asyncio.Task[None] | None = None

    async def reconfigure(self, _: Any) -> None:
        """Begin: Ray calls this once a replica. Errors: as of opening the base"""
        import ray

        if self._app is not None:
            return
        self._operator = ray.get_actor(self._operator_name, namespace=NAMESPACE)
        stack = None
        while stack is None:
            number, stack, _may = await self._operator.ask.remote(self._name, 0, STARTING)
            if stack is None:
                await asyncio.sleep(FOLLOW_S)
        await self._heard(self._start(stack), 0, lambda: STARTING)
        self._number = number
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        """Answer with what the operator says, when it is this engine's turn."""
        refused = 0  # a stack that this engine could not change to
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                number, stack, may = await self._operator.ask.remote(self._name, self._number, self._about())
                if not may or number == refused:
                    continue
                try:
                    await self._change(stack)
                    self._number = number
                except UmaError as error:
                    refused = number
                    await self._operator.failed.remote(self._name, number, f"{type(error).__name__}: {error}")
            except Exception as error:  # the operator is being restarted, say
                logger.warning("the operator was not reached: %s", error)

    def _about(self) -> dict[str, Any]:
        return {"process": os.getpid(), **self._app.state.generations.status()}

    async def _change(self, stack: dict[str, Any]) -> None:
        """A swap here is one of `Generations`: requests that have begun keep their base."""
        generations = self._app.state.generations
        now, plan = generations.current, _plan(stack)
        if plan.model == now.plan.model:
            self._adapt(now, plan)
            return
        generations.start(plan)
        status = await self._heard(generations.wait(), self._number, self._about)
        if status["swap"]["phase"] != "done":
            raise EngineUnavailable(f"the swap to `{plan.model}` failed: {status['swap'].get('error')}")

    async def _heard(self, work: Awaitable[T], number: int, about: Callable[[], dict[str, Any]]) -> T:
        """What `work` gives; the operator hears of this engine meanwhile."""
        done = asyncio.ensure_future(work)
        while not done.done():
            await asyncio.wait({done}, timeout=FOLLOW_S)
            with contextlib.suppress(Exception):  # it is being restarted, say
                await self._operator.ask.remote(self._name, number, about())
        return done.result()

    async def _start(self, stack: dict[str, Any]) -> None:
        from uma_engine.serve import ServeSettings, make_app
        from uma_engine.serve.preparing import Opener
        from uma_engine.serve.settings import Key

        plan = _plan(stack)
        opener = Opener(max_lora_rank=256, **self._options)
        self._engine = await self._over.enter_async_context(await opener(plan.model))
        plan.register(self._engine)
        fields = dict(self._settings)
        keys = tuple(Key(name, scope, bytes.fromhex(digest)) for name, scope, digest in fields.pop("keys", ()))
        root = fields.pop("adapter_root", None)
        settings = ServeSettings(
            keys=keys, adapter_root=None if root is None else Path(root), behind_front_end=True, **fields
        )
        app = make_app(self._engine, settings, opener, plan)
        await self._over.enter_async_context(app.router.lifespan_context(app))
        self._app = app

    def _adapt(self, generation: Any, plan: Any) -> None:
        """Same base, other adapters."""
        before = generation.plan
        gone = [n for n in before.aliases if n not in plan.aliases] + [
            n for n in before.adapters if n not in plan.adapters
        ]
        for name in gone:
            with contextlib.suppress(UnknownAdapter):  # an alias goes with its adapter
                generation.engine.unload_adapter(name)
        plan.register(generation.engine)
        generation.plan = plan

    async def answer(self, frame: bytes, route: Any = None) -> AsyncIterator[bytes]:
        """The frames of one answer. `route` is for the router alone."""
        ask = decode_frame(frame)
        assert isinstance(ask, Ask)
        ready: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)

        async def write(part: Head | Part) -> None:
            await ready.put(encode_frame(part))

        answering = Answering(self._app, ask, write)
        task = asyncio.create_task(answering.run())
        task.add_done_callback(lambda _: asyncio.ensure_future(ready.put(None)))
        try:
            while (part := await ready.get()) is not None:
                yield part
        finally:  # the entry has left, or all is said
            answering.gone.set()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router: which adapters are in slots, by the names and aliases that requests use."""
        if self._app is None:
            return {}
        generation = self._app.state.generations.current
        if generation.engine.closed:
            return {}
        resident = {known.name for known, info in generation.engine.known_adapters() if info is not None}
        aliases = [alias for alias, name in generation.plan.aliases.items() if name in resident]
        return {"resident": [*sorted(resident), *aliases]}

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has ended. Errors: EngineUnavailable"""
        if self._app is not None and self._app.state.generations.current.engine.closed:
            raise EngineUnavailable("the engine has ended")


def _plan(stack: dict[str, Any]) -> Any:
    from uma_engine.serve.generations import SwapPlan

    adapters = {name: Path(path) for name, path in stack.get("adapters", {}).items()}
    return SwapPlan(stack["model"], adapters, dict(stack.get("aliases", {})), frozenset(stack.get("pinned", ())))
