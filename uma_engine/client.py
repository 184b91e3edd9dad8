"""A client of `uma serve`: the calls of the engine over HTTP, with its answers as data and its errors as themselves.

Knows paths and JSON; needs no torch and no model (extra `server` for httpx). `Client` blocks, `AsyncClient` has the same methods as
coroutines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

from uma_engine import errors
from uma_engine.core import Candidate
from uma_engine.errors import EngineUnavailable, MissingPackage, Overloaded, UmaError

__all__ = ["AsyncClient", "Client", "Ranked", "Ranking"]

TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate's place. `data` is all that the server said of it, the ledger included."""

    index: int
    id: str
    score: float
    data: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Best first. `request_id` is in the server's log; `data` is the whole answer: usage, stack, warnings, assessments."""

    results: tuple[Ranked, ...]
    request_id: str
    data: Mapping[str, Any] = field(repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self.data["warnings"])

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingPackage(
            "`httpx` is not installed", hint="install it with `pip install 'uma-engine[server]'`"
        ) from None
    return httpx


def _rank_body(query: str, candidates: Sequence[Candidate | str], options: Mapping[str, Any]) -> dict[str, Any]:
    people = [
        c if isinstance(c, str) else {"id": c.id, "text": c.text, "facts": dict(c.facts), "prior": c.prior}
        for c in candidates
    ]
    return {"query": query, "candidates": people, **{k: v for k, v in options.items() if v is not None}}


def _swap_body(
    model: str, adapters: Mapping[str, str] | None, exclusive: bool, canary: float | None, wait: bool
) -> dict[str, Any]:
    return {
        "model": model,
        "adapters": dict(adapters or {}),
        "exclusive": exclusive,
        "canary": canary,
        "wait": wait,
    }


def _ranking(data: Mapping[str, Any]) -> Ranking:
    results = tuple(Ranked(r["index"], r["id"], r["score"], r) for r in data["results"])
    return Ranking(results, str(data.get("id", "")), data)


def error_of(status: int, body: bytes, headers: Mapping[str, str]) -> UmaError:
    """The error that an answer stands for, of the class that the engine raised where it is one that callers know."""
    try:
        told = json.loads(body)["error"]
        kind, message = str(told["type"]), str(told["message"])
        hint, param = told.get("hint"), told.get("param")
    except (ValueError, KeyError, TypeError):
        return EngineUnavailable(f"the server answered with status {status} and no reason")
    found = getattr(errors, kind, None)
    if kind not in errors.__all__ or found is None:
        error = UmaError(message, hint=hint, param=param)
        error.status = status
        return error
    if found is Overloaded:
        after = headers.get("retry-after", "1")
        return Overloaded(message, hint=hint, param=param, retry_after=float(after) if after.isdigit() else 1.0)
    return cast(UmaError, found(message, hint=hint, param=param))


def _checked(response: Any) -> Any:
    if response.status_code >= 400:
        raise error_of(response.status_code, response.content, response.headers)
    return response.json()


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("data: "):
        return None
    data = json.loads(line[6:])
    if "error" in data:
        raise error_of(int(data["error"].get("code", 500)), line[6:].encode(), {})
    return cast(dict[str, Any], data)


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


class Client:
    """Calls of one server. A context manager; safe to call from several threads.

    Errors:  those of the engine (`uma_engine.errors`), EngineUnavailable where no answer comes
    """

    def __init__(self, address: str, *, key: str | None = None, timeout: float = TIMEOUT_S) -> None:
        self._http = _httpx().Client(base_url=address, headers=_headers(key), timeout=timeout)

    def rank(self, query: str, candidates: Sequence[Candidate | str], **options: Any) -> Ranking:
        """As `Engine.rank`; `options` are the fields of `/v1/rank`."""
        return _ranking(self._ask("POST", "/v1/rank", _rank_body(query, candidates, options)))

    def rank_stream(
        self, query: str, candidates: Sequence[Candidate | str], **options: Any
    ) -> Iterator[dict[str, Any]]:
        """As `Engine.rank_stream`: events as data. Leaving early ends the request."""
        body = _rank_body(query, candidates, options) | {"stream": True}
        with _reached(), self._http.stream("POST", "/v1/rank", json=body) as response:
            if response.status_code >= 400:
                response.read()
                _checked(response)
            for line in response.iter_lines():
                if (event := _event(line)) is not None:
                    yield event

    def models(self) -> list[str]:
        """The base, its other names, and its adapters."""
        return [m["id"] for m in self._ask("GET", "/v1/models")["data"]]

    def load_adapter(self, name: str, path: str) -> str:
        """Load an adapter from below the server's root: its digest. Needs an `admin` key."""
        return str(self._ask("POST", "/admin/adapters", {"name": name, "path": path})["digest"])

    def unload_adapter(self, name: str) -> None:
        self._ask("DELETE", f"/admin/adapters/{name}")

    def swap(
        self,
        model: str,
        adapters: Mapping[str, str] | None = None,
        *,
        exclusive: bool = False,
        canary: float | None = None,
        wait: bool = True,
    ) -> dict[str, Any]:
        """Swap the base while requests run; the status, at its end with `wait`. `canary`: the new base answers this share of the keys until
        `finish_swap` or `rollback`. Needs an `admin` key."""
        body = _swap_body(model, adapters, exclusive, canary, wait)
        return cast(dict[str, Any], self._ask("POST", "/admin/swap", body))

    def swap_status(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._ask("GET", "/admin/swap/status"))

    def finish_swap(self) -> dict[str, Any]:
        """The canary becomes the current base."""
        return cast(dict[str, Any], self._ask("POST", "/admin/swap/finish"))

    def rollback(self) -> dict[str, Any]:
        """The base before is the current one again."""
        return cast(dict[str, Any], self._ask("POST", "/admin/swap/rollback"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        with _reached():
            return _checked(self._http.request(method, path, json=body))


class AsyncClient:
    """As `Client`, its methods coroutines."""

    def __init__(
        self, address: str, *, key: str | None = None, timeout: float = TIMEOUT_S, transport: Any = None
    ) -> None:
        """`transport`: of httpx, for tests."""
        self._http = _httpx().AsyncClient(base_url=address, headers=_headers(key), timeout=timeout, transport=transport)

    async def rank(self, query: str, candidates: Sequence[Candidate | str], **options: Any) -> Ranking:
        return _ranking(await self._ask("POST", "/v1/rank", _rank_body(query, candidates, options)))

    async def rank_stream(
        self, query: str, candidates: Sequence[Candidate | str], **options: Any
    ) -> AsyncIterator[dict[str, Any]]:
        body = _rank_body(query, candidates, options) | {"stream": True}
        with _reached():
            async with self._http.stream("POST", "/v1/rank", json=body) as response:
                if response.status_code >= 400:
                    await response.aread()
                    _checked(response)
                async for line in response.aiter_lines():
                    if (event := _event(line)) is not None:
                        yield event

    async def models(self) -> list[str]:
        return [m["id"] for m in (await self._ask("GET", "/v1/models"))["data"]]

    async def load_adapter(self, name: str, path: str) -> str:
        return str((await self._ask("POST", "/admin/adapters", {"name": name, "path": path}))["digest"])

    async def unload_adapter(self, name: str) -> None:
        await self._ask("DELETE", f"/admin/adapters/{name}")

    async def swap(
        self,
        model: str,
        adapters: Mapping[str, str] | None = None,
        *,
        exclusive: bool = False,
        canary: float | None = None,
        wait: bool = True,
    ) -> dict[str, Any]:
        body = _swap_body(model, adapters, exclusive, canary, wait)
        return cast(dict[str, Any], await self._ask("POST", "/admin/swap", body))

    async def swap_status(self) -> dict[str, Any]:
        return cast(dict[str, Any], await self._ask("GET", "/admin/swap/status"))

    async def finish_swap(self) -> dict[str, Any]:
        return cast(dict[str, Any], await self._ask("POST", "/admin/swap/finish"))

    async def rollback(self) -> dict[str, Any]:
        return cast(dict[str, Any], await self._ask("POST", "/admin/swap/rollback"))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        with _reached():
            return _checked(await self._http.request(method, path, json=body))


class _reached:
    """Turns what a connection can do wrong into EngineUnavailable."""

    def __enter__(self) -> None:
        self._errors = _httpx().HTTPError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._errors):
            raise EngineUnavailable(
                f"no answer came: {type(error).__name__} {error}".rstrip(), hint="is the server running?"
            ) from error
