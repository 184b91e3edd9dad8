"""Engines as replicas of one Ray Serve deployment, and the entry that asks them.

Knows Ray; does not know what a request means. Ray carries frames between processes and keeps as many replicas as there is work for; which
of them is asked is decided by `routing`, what is repeated after a loss by the front end that `uma serve` has too, and what all of them
answer with by the `operator`, an actor that every engine asks: a swap goes from engine to engine, and one that comes later begins with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from uma_engine.errors import EngineUnavailable, InvalidRequest, MissingPackage, Overloaded
from uma_engine.scale.operator import Operator
from uma_engine.scale.replica import NAMESPACE, EngineReplica
from uma_engine.scale.routing import Route, preferred, route_of
from uma_engine.serve.processes.frames import Ask, Head, Part, decode_frame, encode_frame
from uma_engine.serve.processes.link import LinkLost, Reply

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError
    from ray.serve.request_router import RequestRouter
except ImportError as _error:
    raise MissingPackage(
        f"`{_error.name}` is not installed", hint="install it with `pip install 'uma-engine[ray]'`"
    ) from None

__all__ = ["Cluster", "RayLink", "ScaleSpec", "Stack"]

logger = logging.getLogger("uma_engine.scale")
NAME = "uma-engine"
OPERATOR = "uma-operator"
STATS_S = 1.0  # between two looks at which adapters are where
OBJECT_STORE = 128 * 2**20  # bytes; frames are small and pass by it
LATE_S = 10.0  # that an engine has beyond a request's deadline to say that it has passed


@dataclass(frozen=True)
class Stack:
    """What every engine answers with; see `SwapPlan`. `adapters`: by name, directories that every machine can read."""

    model: str
    adapters: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "adapters": dict(self.adapters),
            "aliases": dict(self.aliases),
            "pinned": list(self.pinned),
        }


@dataclass(frozen=True)
class ScaleSpec:
    """`replicas`: the least and the most engines; between the two Ray keeps about one for every `target` requests that wait or run.
    `inside`: requests that an engine takes at once; the next one goes to the next engine that is as good. `cpus`, `gpus`: of one engine.
    `settings`: fields of `ServeSettings`; `options`: of `EngineConfig`."""

    replicas: tuple[int, int] = (1, 1)
    target: float = 8.0
    inside: int = 16
    cpus: float = 1.0
    gpus: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    state_file: Path | None = None

    def __post_init__(self) -> None:
        low, high = self.replicas
        if not 1 <= low <= high:
            raise InvalidRequest(f"`replicas` is {low}:{high} but must be 1 or more, the least first", param="replicas")


class Router(RequestRouter):
    """Ray's way of asking `preferred`. An engine that takes no more is passed over."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        by_id = {r.replica_id.unique_id: r for r in candidate_replicas}
        told = None if pending_request is None else pending_request.kwargs.get("route")
        route = Route() if told is None else Route(*told)
        engines: dict[str, Collection[str]] = {
            name: (r.routing_stats or {}).get("resident", ()) for name, r in by_id.items()
        }
        return [[by_id[name]] for name in preferred(route, engines)]


class Cluster:
    """The deployment. Methods that wait for Ray are coroutines of the entry's event loop."""

    def __init__(self, spec: ScaleSpec, stack: Stack) -> None:
        self._spec = spec
        self.stack = self._kept() or stack
        self.previous: Stack | None = None
        self._handle: Any = None
        self._changing: asyncio.Task[None] | None = None
        self._report: dict[str, Any] = {"phase": "idle"}
        self._started_ray = False
        self._operator: Any = None
        self._engines: dict[str, Any] = {}
        self._watching: asyncio.Task[None] | None = None

    @property
    def handle(self) -> Any:
        return self._handle

    @property
    def ready(self) -> bool:
        return self._handle is not None

    async def start(self, address: str | None = None) -> None:
        """Join the Ray cluster at `address`, or start one on this machine, and deploy. Errors: EngineUnavailable"""
        await asyncio.to_thread(self._start, address)
        self._watching = asyncio.create_task(self._watch())

    def _start(self, address: str | None) -> None:
        if not ray.is_initialized():
            _listens(address)
            local: dict[str, Any] = {}
            if address is None:
                most = self._spec.replicas[1]
                local = {
                    "num_cpus": max(1, -(-int(most * self._spec.cpus * 100) // 100)) + 1,
                    "object_store_memory": OBJECT_STORE,
                    "include_dashboard": False,
                }
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **local)
            except (ConnectionError, RuntimeError, ValueError) as error:  # Ray tells of it in several ways
                raise EngineUnavailable(
                    f"Ray is not reached: {str(error)[:300]}",
                    hint="see `--ray-address`, and RAY_AUTH_TOKEN where the cluster wants a token",
                ) from None
            self._started_ray = True
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        self._operator = (
            ray.remote(Operator)
            .options(
                name=OPERATOR, namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1, max_task_retries=3
            )
            .remote()
        )
        ray.get(self._operator.change.remote(self.stack.told()))
        self._deploy()

    def _deploy(self) -> None:
        spec = self._spec
        low, high = spec.replicas
        scaling = {
            "min_replicas": low, "initial_replicas": low, "max_replicas": high, "target_ongoing_requests": spec.target,
            "upscale_delay_s": 2, "downscale_delay_s": 60,
        }  # fmt: skip
        deployment = serve.deployment(EngineReplica).options(
            name="engines",
            user_config={},  # `reconfigure` is how a replica begins
            max_ongoing_requests=spec.inside,
            ray_actor_options={"num_cpus": spec.cpus, "num_gpus": spec.gpus},
            health_check_period_s=2,
            graceful_shutdown_timeout_s=60,
            request_router_config=RequestRouterConfig(
                request_router_class=f"{__name__}:Router", request_routing_stats_period_s=STATS_S
            ),
            **({"num_replicas": low} if low == high else {"autoscaling_config": scaling}),
        )
        settings = {name: value for name, value in spec.settings.items() if value is not None}
        try:
            self._handle = serve.run(deployment.bind(settings, spec.options, OPERATOR), name=NAME, route_prefix=None)
        except Exception as error:  # Ray tells of a failed deployment in several ways
            raise EngineUnavailable(
                f"the engines do not come up: {str(error)[-500:]}", hint="see the log of Ray Serve"
            ) from None

    async def _watch(self) -> None:
        """Look after the operator: an engine that begins waits for its word."""
        while True:
            await asyncio.sleep(STATS_S)
            with contextlib.suppress(Exception):  # it is being restarted
                await self.refresh()

    async def stop(self) -> None:
        for task in (self._watching, self._changing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._handle = None

        def down() -> None:
            if not ray.is_initialized():  # each of these would start Ray, or look for a cluster
                return
            with contextlib.suppress(Exception):
                ray.kill(self._operator)
                serve.shutdown()
            if self._started_ray:
                ray.shutdown()

        await asyncio.to_thread(down)

    # ---- what an operator does ----

    def change(self, stack: Stack) -> dict[str, Any]:
        """Take another stack from engine to engine, in the background. Errors: InvalidRequest while one is under way"""
        if self._changing is not None and not self._changing.done():
            raise InvalidRequest("a change is under way", hint="ask `GET /admin/swap/status`")
        self._report = {"phase": "rolling", "model": stack.model, "began": time.time()}
        self._changing = asyncio.create_task(self._changed(stack))
        return self.status()

    async def wait(self) -> dict[str, Any]:
        """The end of the change under way."""
        if self._changing is not None:
            await asyncio.gather(self._changing, return_exceptions=True)
        return self.status()

    def rollback(self) -> dict[str, Any]:
        """The stack before, from engine to engine. Errors: InvalidRequest where there is none"""
        if self.previous is None:
            raise InvalidRequest("there is no stack to go back to", hint="swap to it by name")
        return self.change(self.previous)

    def status(self) -> dict[str, Any]:
        previous = None if self.previous is None else self.previous.told()
        return {"stack": self.stack.told(), "previous": previous, "engines": self._engines, "swap": dict(self._report)}

    async def refresh(self) -> None:
        """Look at the engines, for `status`; an operator that was restarted is told the stack again."""
        told = await self._operator.status.remote()
        self._engines = told["engines"]
        if told["stack"] is None:
            await self._operator.change.remote(self.stack.told())

    async def _changed(self, stack: Stack) -> None:
        began, before = time.perf_counter(), self.stack
        try:
            # What cannot be opened at all is found here, before any engine is asked to.
            await _check.remote(stack.told())
            number = await self._operator.change.remote(stack.told())
            while True:
                told = await self._operator.status.remote()
                self._engines = told["engines"]
                if told["number"] != number:
                    raise EngineUnavailable("the operator was restarted", hint="change it again")
                if told["failed"] is not None:
                    raise EngineUnavailable(told["failed"])
                behind = [n for n, e in told["engines"].items() if e["number"] != number]
                self._report |= {"changed": len(told["engines"]) - len(behind), "behind": len(behind)}
                if told["engines"] and not behind:
                    break
                await asyncio.sleep(0.2)
            self.stack, self.previous = stack, before
            self._keep()
            self._report["phase"] = "done"
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            logger.warning("the change to `%s` failed: %s", stack.model, cause)
            self._report |= {"phase": "failed", "error": f"{type(cause).__name__}: {cause}"[:500]}
            with contextlib.suppress(Exception):  # those that have changed go back
                await self._operator.change.remote(before.told())
        finally:
            self._report["seconds"] = round(time.perf_counter() - began, 3)

    def _kept(self) -> Stack | None:
        if self._spec.state_file is None or not self._spec.state_file.exists():
            return None
        told = json.loads(self._spec.state_file.read_text())
        return Stack(told["model"], told["adapters"], told["aliases"], tuple(told["pinned"]))

    def _keep(self) -> None:
        if self._spec.state_file is not None:
            partial = self._spec.state_file.with_name(f".{self._spec.state_file.name}.part")
            partial.write_text(json.dumps(self.stack.told()))
            partial.replace(self._spec.state_file)

    def with_adapter(self, name: str, path: str | None, alias_of: str | None = None, pinned: bool = False) -> Stack:
        """The stack with an adapter or an alias more, or (neither given) less."""
        s = self.stack
        adapters = {n: p for n, p in s.adapters.items() if n != name}
        aliases = {a: n for a, n in s.aliases.items() if a != name}
        if path is not None:
            adapters[name] = path
        elif alias_of is not None:
            aliases[name] = alias_of
        aliases = {a: n for a, n in aliases.items() if n in adapters}
        kept = (*(n for n in s.pinned if n != name), *((name,) if pinned else ()))
        return replace(s, adapters=adapters, aliases=aliases, pinned=kept)


def _listens(address: str | None) -> None:
    """Errors: EngineUnavailable where nobody listens at HOST:PORT; Ray itself would try for minutes"""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():  # a local one, `auto`, a client's address
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise EngineUnavailable(
            f"no Ray cluster listens at {address}: {error}", hint="see `--ray-address`, and `ray status` there"
        ) from None


@ray.remote(num_cpus=0, max_retries=0)
def _check(stack: dict[str, Any]) -> None:
    """Whether a stack can be opened: its base is there and whole, its adapters are adapters. Errors: as of opening them"""
    from uma_engine.adapters.loader import CONFIG
    from uma_engine.catalog import open_model, resolve

    open_model(resolve(stack["model"]))
    for name, path in stack["adapters"].items():
        if not (Path(path) / CONFIG).is_file():
            raise InvalidRequest(f"`{path}` is no adapter", param=name)
    for alias, name in stack["aliases"].items():
        if name not in stack["adapters"]:
            raise InvalidRequest(f"the alias `{alias}` is of `{name}`, which is not known", param="aliases")


class RayLink:
    """A front end's way to the engines."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return self._cluster.ready

    def start(self) -> None:
        """Nothing to do: the cluster is started by who made it."""

    async def stop(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def ask(self, request: Ask, timeout: float) -> Reply:
        """As `Link.ask`; an engine that ends under the request is a lost link."""
        if not self._cluster.ready:
            raise EngineUnavailable("the engines are starting", hint="ask again")
        route = route_of(request.body) if request.method == "POST" else Route()
        parts = self._cluster.handle.options(stream=True).answer.remote(
            encode_frame(request), route=(route.adapter, route.prefix)
        )
        pump: asyncio.Task[None] | None = None

        def leave() -> None:
            if pump is not None and not pump.done():
                pump.cancel()

        reply = Reply(leave)
        begun = asyncio.Event()
        pump = asyncio.create_task(_pump(parts, reply, begun))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        try:
            async with asyncio.timeout(timeout + LATE_S):
                await begun.wait()
        except BaseException:
            leave()
            raise
        return reply


async def _pump(parts: Any, reply: Reply, begun: asyncio.Event) -> None:
    whole = False
    try:
        async for data in parts:
            frame = decode_frame(data)
            assert isinstance(frame, Head | Part)
            reply.feed(frame)
            begun.set()
            whole = isinstance(frame, Part) and frame.last
        if not whole:
            reply.fail(LinkLost())
    except BackPressureError:
        reply.fail(Overloaded("all engines are full", hint="try again later", retry_after=2.0))
    except asyncio.CancelledError:
        parts.cancel()
        raise
    except Exception as error:
        if not whole:
            logger.warning("an engine was lost: %s", str(error).partition("\n")[0][:300])
            reply.fail(LinkLost())
    finally:
        begun.set()
