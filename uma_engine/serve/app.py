"""The ASGI application: paths, keys, limits, and that a client who leaves takes their request along.

Knows HTTP; what a path answers is in `ranking_routes` and `openai_routes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from uma_engine.core import background
from uma_engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    TooLarge,
    UmaError,
    UnknownAdapter,
)
from uma_engine.serve import console, logs
from uma_engine.serve.admission import Admission, Ticket
from uma_engine.serve.generations import Generations, Lease, Make, SwapPlan
from uma_engine.serve.metrics import Metrics
from uma_engine.serve.openapi import document
from uma_engine.serve.settings import Key, Scope, ServeSettings
from uma_engine.serve.shapes import NamedRequest

if TYPE_CHECKING:
    from uma_engine.tasks.api import AsyncEngine
    from uma_engine.tasks.results import RankAnswer, Usage

__all__ = [
    "CREATED",
    "OPEN",
    "Context",
    "Handler",
    "answer_json",
    "error_data",
    "error_response",
    "events",
    "find_key",
    "make_app",
    "read_body",
]

logger = logging.getLogger("uma_engine.serve")
BYTES_A_TOKEN = 4  # for the estimate of what a request costs, before it is read
STEPS_INSIDE = 4  # of prefill, by estimate: enough to fill every step, and little for who comes next to wait for
CREATED = "x-uma-created"  # set by a front end, so that an answer that is given again has the same time in it
STICKY = "x-uma-sticky"  # requests with one value get one base while a canary answers a share of them
MOST_HEADERS = 100
PRIORITY = "x-uma-priority"
OPEN = frozenset({"/livez", "/healthz", "/readyz", "/openapi.json", *console.FILES})  # without a key
Handler = Callable[["Context", bytes], Coroutine[Any, Any, Response]]


class Context:
    """One request: who asks, and the engine that answers. `engine` is there once the request has been admitted, and stays the same."""

    engine: AsyncEngine

    def __init__(
        self,
        request: Request,
        generations: Generations,
        settings: ServeSettings,
        metrics: Metrics,
        admission: Admission,
    ) -> None:
        self.request = request
        self.admission = admission
        self.ticket: Ticket | None = None
        self.generations = generations
        self.lease: Lease | None = None
        self.settings = settings
        self.metrics = metrics
        self.id = request.headers.get("x-request-id", "")[:64] or secrets.token_hex(8)
        self.tenant = ""
        self.batch = False
        told = request.headers.get(CREATED, "") if settings.behind_front_end else ""
        self.created = int(told) if told.isdigit() else int(time.time())

    async def wait(self, body: bytes) -> None:
        """Wait for this tenant's turn."""
        wanted = self.request.headers.get(PRIORITY, "interactive")
        if wanted not in ("interactive", "batch"):
            raise InvalidRequest(
                f"the header `{PRIORITY}` is `{wanted:.20}` but must be interactive or batch", param=PRIORITY
            )
        self.batch = wanted == "batch"
        self._prefetch(body)
        cost = len(body) / BYTES_A_TOKEN
        self.ticket = await self.admission.enter(self.tenant, cost, self.settings.deadline_s, self.batch)

    def priority(self) -> contextlib.AbstractContextManager[None]:
        """What the engine is asked inside has this request's priority."""
        return background() if self.batch else contextlib.nullcontext()

    def _prefetch(self, body: bytes) -> None:
        """Begin to load what the request will ask for: it has to wait here anyway. What is wrong shows when it is asked for."""
        engine = self.generations.current.engine
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            asked = msgspec.json.decode(body, type=NamedRequest)
            names = [name for name in (asked.adapter, asked.model) if name and name != engine.model]
            if names and not engine.closed and engine.is_cold(names[0]):
                task = asyncio.ensure_future(asyncio.to_thread(engine.prefetch_adapter, names[0]))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def deadline(self, asked: float | None = None) -> float:
        """Seconds that are left of what the request, or else the server, allows."""
        allowed = self.settings.deadline_s if asked is None else asked
        waited = 0.0 if self.ticket is None else self.ticket.waited
        if allowed > 0 and waited >= allowed:
            raise DeadlineExceeded(f"the request waited {waited:.3f} s and `deadline` is {allowed:g}", param="deadline")
        return allowed - waited

    def used(self, usage: Usage) -> None:
        """What an answer, or a part of it, cost: for the metrics, and on the tenant's account."""
        self.metrics.used(usage)
        if self.ticket is not None:
            self.ticket.used(usage.computed_tokens + usage.output_tokens)

    def remember(self, query: str, texts: Sequence[str], answer: RankAnswer | None = None, plain: bool = False) -> None:
        """For a base that comes after this one. `plain`: the answer is what job and candidates alone make it."""
        scores = [r.score for r in answer.all_results] if answer is not None and plain else None
        number = 0 if self.lease is None else self.lease.number
        self.generations.remember(query, texts, number, scores if scores and len(scores) == len(texts) else None)

    async def hold(self) -> None:
        """Take the current generation for as long as the answer lasts."""
        self.lease = await self.generations.lease(self.request.headers.get(STICKY, self.tenant or self.id))
        self.engine = self.lease.engine

    def release(self, failed: bool = False) -> None:
        if self.lease is not None:
            self.lease.release(failed)
            self.generations.watch()
        if self.ticket is not None:
            self.ticket.release()

    def model(self, name: str | None) -> tuple[str, str | None]:
        """(the name to answer with, the adapter) of a request's `model`: the base, an alias of it, or a loaded adapter."""
        if name is None or name == self.engine.model or name in self.settings.model_aliases:
            return name or self.engine.model, None
        if name in self.engine.adapters():
            return name, name
        raise UnknownAdapter(
            f"there is no model `{name}`", hint="`/v1/models` lists the base and its adapters", param="model"
        )

    def documents(self, count: int, param: str) -> None:
        if count > self.settings.max_documents:
            raise TooLarge(f"`{param}` has {count} entries but {self.settings.max_documents} are the most", param=param)


def make_app(
    engine: AsyncEngine,
    settings: ServeSettings | None = None,
    make: Make | None = None,
    plan: SwapPlan | None = None,
) -> Starlette:
    """The application over an engine that its caller opens and closes. `make` opens the engines of other bases, for swaps; `plan` is what
    this one was made from."""
    from uma_engine.serve import admin_routes, openai_routes, ranking_routes

    settings = settings or ServeSettings()
    generations = Generations(engine, make, settings.state_file, settings.exclusive_swaps, plan)
    inside = settings.max_admitted_tokens or STEPS_INSIDE * engine.config.max_num_batched_tokens
    admission = Admission(inside, settings.max_waiting)
    metrics = Metrics(generations, admission)
    state = {"draining": False}

    def route(path: str, handler: Handler, scope: Scope = "rank", methods: tuple[str, ...] = ("POST",)) -> Route:
        async def endpoint(request: Request) -> Response:
            context = Context(request, generations, settings, metrics, admission)
            return await _served(context, path, handler, scope, state)

        return Route(path, endpoint, methods=list(methods))

    async def alive(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        if state["draining"] or generations.current.engine.closed:
            return PlainTextResponse("draining\n" if state["draining"] else "closed\n", 503)
        return PlainTextResponse("ready\n")

    async def measured(context: Context, body: bytes) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def described(request: Request) -> Response:
        return answer_json(document([(r.path, sorted(r.methods or ())) for r in routes if r.path not in console.FILES]))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        state["draining"] = True
        await generations.close()

    routes: list[Route] = [
        Route("/livez", alive),
        Route("/healthz", ready),
        Route("/readyz", ready),
        route("/metrics", measured, methods=("GET",)),
        Route("/openapi.json", described),
        *console.routes(),
        *(route(path, *rest) for path, *rest in (*ranking_routes.ROUTES, *openai_routes.ROUTES, *admin_routes.ROUTES)),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.drain = lambda: state.update(draining=True)
    app.state.generations = generations
    return app


async def _served(context: Context, path: str, handler: Handler, scope: Scope, state: dict[str, bool]) -> Response:
    with logs.span(path, context.request.headers.get("traceparent")) as fields:
        try:
            return await _answer(context, path, handler, scope, state, fields)
        finally:
            logs.answered(path=path, **fields)


async def _answer(
    context: Context, path: str, handler: Handler, scope: Scope, state: dict[str, bool], fields: dict[str, Any]
) -> Response:
    began = time.perf_counter()
    error: UmaError | None = None
    held = True
    fields |= {"request": context.id, "status": 499}

    def ended(status: int) -> None:
        seconds = time.perf_counter() - began
        context.metrics.done(path, status, seconds)
        waited = None if context.ticket is None else round(context.ticket.waited, 6)
        stack = None if context.lease is None else context.lease.engine.stack_info().base_digest[:12]
        fields.update(status=status, seconds=round(seconds, 6), waited=waited, tenant=context.tenant, base=stack)
        if error is not None:
            fields["error"] = type(error).__name__

    try:
        _admit(context, scope, state)
        body = await read_body(context.request, context.settings.max_body_bytes)
        response = await _until_gone(context.request, _answered(context, handler, scope, body))
        if isinstance(response, StreamingResponse):
            response, held = _Held(response, context), False
    except UmaError as failed:
        error = failed
    except ClientDisconnect:
        error = RequestCancelled("the client has left")
    except asyncio.CancelledError:
        ended(499)
        raise
    except Exception:
        logger.exception("a request failed", extra={"fields": {"request": context.id}})
        error = UmaError("the server failed", hint=f"its log has request {context.id}")
    finally:
        if held:
            context.release(failed=error is not None and error.status == 500)
    if error is not None:
        response = error_response(error)
    response.headers["x-request-id"] = context.id
    ended(response.status_code)
    return response


async def _answered(context: Context, handler: Handler, scope: Scope, body: bytes) -> Response:
    if scope == "rank" and context.request.method == "POST":  # the others cost the engine nothing
        await context.wait(body)
    await context.hold()
    with context.priority():
        return await handler(context, body)


class _Held(Response):
    """A stream that holds its generation and its place until it has ended, also one that a client left before it began."""

    def __init__(self, stream: StreamingResponse, context: Context) -> None:
        self.stream, self.context = stream, context
        self.status_code, self.background = stream.status_code, None
        self.raw_headers = stream.raw_headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with self.context.priority():  # the parts of a stream are asked for while it is sent
                await self.stream(scope, receive, send)
        finally:
            self.context.release()


def _admit(context: Context, scope: Scope, state: dict[str, bool]) -> None:
    key = find_key(context.request, context.settings)
    if key is not None:
        if scope == "admin" and key.scope != "admin":
            raise Forbidden(f"key `{key.name}` may not do this", hint="use a key of scope `admin`")
        context.tenant = key.name
    elif scope == "admin":
        raise Forbidden("this server has no keys, and nobody may change it", hint="start it with an `admin` key")
    if state["draining"]:
        raise EngineUnavailable("the server is shutting down", hint="ask another one")


def find_key(request: Request, settings: ServeSettings) -> Key | None:
    """Whose key a request has; None where the server has no keys. Errors: Unauthorised, TooLarge for a head of too many lines"""
    if len(request.scope["headers"]) > MOST_HEADERS:
        raise TooLarge(f"the request has {len(request.scope['headers'])} headers but {MOST_HEADERS} are the most")
    if not settings.keys:
        return None
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    key = settings.find(secret.strip()) if scheme.lower() == "bearer" else None
    if key is None:
        raise Unauthorised("a key is needed", hint="send `Authorization: Bearer KEY`")
    return key


class Unauthorised(UmaError):
    """No key, or one that is not known."""

    status = 401


class Forbidden(UmaError):
    """A key that may not do this."""

    status = 403


async def read_body(request: Request, most: int) -> bytes:
    """A request's body. Errors: TooLarge"""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise TooLarge(f"the body has {declared} bytes but {most} are the most")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLarge(f"the body has more than {most} bytes, which are the most")
        parts.append(part)
    return b"".join(parts)


async def _until_gone(request: Request, work: Awaitable[Response]) -> Response:
    """What `work` gives, or its end as soon as the client has gone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestCancelled("the client has left")
    finally:
        for other in (task, watch):
            if not other.done():
                other.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await other


async def _gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def answer_json(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")


def error_data(error: UmaError) -> dict[str, Any]:
    """What every error looks like: OpenAI's fields, and a hint."""
    return {
        "error": {
            "type": type(error).__name__,
            "code": error.status,
            "message": error.message,
            "hint": error.hint,
            "param": error.param,
        }
    }


def error_response(error: UmaError) -> Response:
    response = answer_json(error_data(error), error.status)
    if isinstance(error, Overloaded):
        response.headers["retry-after"] = str(max(1, round(error.retry_after)))
    elif error.status == 503:
        response.headers["retry-after"] = "5"
    elif error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def events(parts: AsyncIterator[bytes]) -> Response:
    """Server-sent events. A client who leaves ends `parts`; an error after the first event is one more event."""

    async def safe() -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield b"data: " + part + b"\n\n"
        except UmaError as error:
            yield b"data: " + msgspec.json.encode(error_data(error)) + b"\n\n"

    return StreamingResponse(safe(), media_type="text/event-stream", headers={"cache-control": "no-store"})
