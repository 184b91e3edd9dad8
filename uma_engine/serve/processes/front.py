"""A front end: connections, keys and limits on this side, the engine process on the other, and no torch.

Knows HTTP and which requests may be asked twice; does not know what they mean. If the engine process ends while an answer is on its way,
the request is asked again as soon as there is a new one: what is computed is a function of the request, so an answer that has begun to
stream goes on where it was, and is checked to be the same bytes up to there. What may not be asked twice ends in a typed error.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from uma_engine.errors import EngineUnavailable, Overloaded, UmaError
from uma_engine.serve.app import CREATED, OPEN, error_data, error_response, find_key, read_body
from uma_engine.serve.processes.frames import Ask, Head
from uma_engine.serve.processes.link import Linked, LinkLost, Reply, SlowReader
from uma_engine.serve.settings import ServeSettings

__all__ = ["FrontEnd"]

logger = logging.getLogger("uma_engine.serve")
MOST_TRIES = 3  # a request that ends the engine process so often is not tried again


class FrontEnd:
    """An ASGI application that asks an engine process over `link`."""

    def __init__(self, settings: ServeSettings, link: Linked) -> None:
        self._settings = settings
        self._link = link
        self._draining = False
        self.num_retries = 0

    def drain(self) -> None:
        self._draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if scope["path"] == "/livez":
            return await PlainTextResponse("ok\n")(scope, receive, send)
        if scope["path"] in ("/readyz", "/healthz") and (self._draining or not self._link.connected):
            said = "draining\n" if self._draining else "the engine is starting\n"
            return await PlainTextResponse(said, 503)(scope, receive, send)
        name = request.headers.get("x-request-id", "")[:64] or secrets.token_hex(8)
        try:
            ask = await self._read(request, name)
        except UmaError as error:
            return await _said(error, name)(scope, receive, send)
        except ClientDisconnect:
            return
        await self._until_gone(_Answer(ask, self._link, self._settings.deadline_s, send, name), receive, scope)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._link.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._link.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _read(self, request: Request, name: str) -> Ask:
        """The request, whole. Who has no key is refused before their body is read."""
        if request.url.path not in OPEN:
            find_key(request, self._settings)
            if self._draining:
                raise EngineUnavailable("the server is shutting down", hint="ask another one")
        body = await read_body(request, self._settings.max_body_bytes)
        ours = {b"x-request-id": name.encode("latin-1"), CREATED.encode(): str(int(time.time())).encode()}
        headers = [(n, v) for n, v in request.scope["headers"] if n not in ours] + list(ours.items())
        return Ask(0, request.method, request.scope["path"], request.scope["query_string"], headers, body)

    async def _until_gone(self, answer: _Answer, receive: Receive, scope: Scope) -> None:
        task = asyncio.ensure_future(answer.give(scope, receive))
        watch = asyncio.ensure_future(_gone(receive))
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        for other in (task, watch):
            if not other.done():
                other.cancel()
        results = await asyncio.gather(task, watch, return_exceptions=True)
        self.num_retries += answer.tries - 1
        if isinstance(results[0], Exception):
            raise results[0]  # the server closes the connection: what was sent is not a whole answer


class _Answer:
    """One answer on its way, over as many engine processes as it takes."""

    def __init__(self, ask: Ask, link: Linked, patience: float, send: Send, name: str) -> None:
        self._ask, self._link, self._send, self._name = ask, link, send, name
        self._patience = patience
        self._head: Head | None = None
        self._sent = 0  # bytes of a stream that the client has
        self._digest = hashlib.sha256()  # of those
        self.tries = 1

    async def give(self, scope: Scope, receive: Receive) -> None:
        try:
            while True:
                try:
                    return await self._once()
                except LinkLost:
                    if not repeatable(self._ask):
                        raise EngineUnavailable(
                            "the engine process ended while it had this request, which may or may not have been done",
                            hint="look at the state, then ask again",
                        ) from None
                    if self.tries == MOST_TRIES:
                        raise EngineUnavailable(
                            f"the engine process ended {MOST_TRIES} times under this request"
                        ) from None
                    self.tries += 1
                    logger.warning("request %s is asked again: the engine process ended", self._name)
        except UmaError as error:
            await self._refuse(error, scope, receive)

    async def _once(self) -> None:
        try:
            reply = await self._link.ask(self._ask, self._patience)
        except TimeoutError:
            raise EngineUnavailable("the engine process does not come back", hint="see the server's log") from None
        try:
            await self._pass_on(reply)
        except SlowReader:
            raise Overloaded("the answer is not read as fast as it is written", hint="read faster") from None
        finally:
            reply.close()

    async def _pass_on(self, reply: Reply) -> None:
        head = await reply.next()
        assert isinstance(head, Head)
        if not _is_stream(head):
            body = b"".join([part async for part in _parts(reply)])
            if self._head is not None:
                raise EngineUnavailable("the request was answered otherwise when it was asked again")
            await self._send({"type": "http.response.start", "status": head.status, "headers": head.headers})
            await self._send({"type": "http.response.body", "body": body})
            return
        if self._head is None:
            self._head = head
            await self._send({"type": "http.response.start", "status": head.status, "headers": head.headers})
        known, seen = self._sent, hashlib.sha256()
        async for data in _parts(reply):
            if known:
                old, data = data[:known], data[known:]
                known -= len(old)
                seen.update(old)
                if not known and seen.digest() != self._digest.digest():
                    raise EngineUnavailable("the request was answered otherwise when it was asked again")
            if data:
                self._sent += len(data)
                self._digest.update(data)
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _refuse(self, error: UmaError, scope: Scope, receive: Receive) -> None:
        if self._head is None:
            return await _said(error, self._name)(scope, receive, self._send)
        event = b"data: " + msgspec.json.encode(error_data(error)) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def repeatable(ask: Ask) -> bool:
    """Whether asking twice is as asking once: for all but what changes the server. A completion without a seed gets one from its prompt."""
    return ask.method == "GET" or not ask.path.startswith("/admin/")


async def _parts(reply: Reply) -> AsyncIterator[bytes]:
    while True:
        part = await reply.next()
        assert not isinstance(part, Head)
        if part.body:
            yield part.body
        if part.last:
            return


def _is_stream(head: Head) -> bool:
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in head.headers)


def _said(error: UmaError, name: str) -> Response:
    response = error_response(error)
    response.headers["x-request-id"] = name
    return response


async def _gone(receive: Receive) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await receive())["type"] != "http.disconnect":
            pass
