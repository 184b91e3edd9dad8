"""The entry to a cluster: the HTTP API of `uma serve`, where what an operator changes is changed on every engine.

Knows the paths that concern all engines; everything else goes to one of them as it came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from uma_engine.errors import InvalidRequest, UmaError
from uma_engine.serve.app import Forbidden, answer_json, error_response, find_key, read_body
from uma_engine.serve.paths import below
from uma_engine.serve.processes.front import FrontEnd
from uma_engine.serve.settings import ServeSettings
from uma_engine.serve.shapes import AdapterRequest, SwapRequest, decode

if TYPE_CHECKING:
    from uma_engine.scale.cluster import Cluster, RayLink

__all__ = ["Entry"]

ADAPTERS = "/admin/adapters"


class Entry(FrontEnd):
    """An ASGI application over a cluster."""

    def __init__(self, settings: ServeSettings, link: RayLink, cluster: Cluster) -> None:
        super().__init__(settings, link)
        self._cluster = cluster

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_ours(scope["method"], scope["path"]):
            request = Request(scope, receive)
            try:
                response = await self._changed(request)
            except UmaError as error:
                response = error_response(error)
            return await response(scope, receive, send)
        await super().__call__(scope, receive, send)

    @staticmethod
    def _is_ours(method: str, path: str) -> bool:
        return path.startswith("/admin/swap") or (path.startswith(ADAPTERS) and method != "GET")

    async def _changed(self, request: Request) -> Response:
        key = find_key(request, self._settings)
        if key is None or key.scope != "admin":
            raise Forbidden("nobody may do this without a key of scope `admin`", hint="start with one, and send it")
        body = await read_body(request, self._settings.max_body_bytes)
        path, cluster = request.url.path, self._cluster
        if path == "/admin/swap/status":
            await cluster.refresh()
            return answer_json(cluster.status())
        if path == "/admin/swap/rollback":
            cluster.rollback()
            return answer_json(await cluster.wait())
        if path == "/admin/swap" and request.method == "POST":
            return await self._swap(decode(body, SwapRequest))
        if path == ADAPTERS and request.method == "POST":
            return await self._adapter(decode(body, AdapterRequest))
        if path.startswith(ADAPTERS + "/") and request.method == "DELETE":
            name = path.removeprefix(ADAPTERS + "/")
            if name not in cluster.stack.adapters and name not in cluster.stack.aliases:
                raise InvalidRequest(f"`{name}` is not known", param="name")
            return await self._done(cluster.with_adapter(name, None))
        raise InvalidRequest(
            f"`{request.method} {path}` is not for a cluster", hint="swap, roll back, or change adapters"
        )

    async def _swap(self, asked: SwapRequest) -> Response:
        from uma_engine.scale.cluster import Stack

        if asked.canary is not None or asked.exclusive:
            raise InvalidRequest("a cluster swaps engine by engine", hint="leave `canary` and `exclusive` out")
        adapters = {name: str(below(self._settings, path)) for name, path in asked.adapters.items()}
        status = self._cluster.change(Stack(asked.model, adapters, dict(asked.aliases), tuple(asked.pinned)))
        if asked.wait:
            return answer_json(await self._cluster.wait())
        return answer_json(status, 202)

    async def _adapter(self, asked: AdapterRequest) -> Response:
        if (asked.path is None) == (asked.alias_of is None):
            raise InvalidRequest("one of `path` and `alias_of` is needed", param="path")
        path = None if asked.path is None else str(below(self._settings, asked.path))
        return await self._done(self._cluster.with_adapter(asked.name, path, asked.alias_of, asked.pinned))

    async def _done(self, stack: Any) -> Response:
        self._cluster.change(stack)
        status = await self._cluster.wait()
        return answer_json(status, 200 if status["swap"]["phase"] == "done" else 400)
