"""Which engine a request goes to: one that has its adapter in a slot, and among those always the same one for the same beginning.

Knows names and hashes; does not know Ray, HTTP or what an answer is. Rendezvous hashing (Thaler & Ravishankar 1998): an engine that comes
or goes moves only the requests that were its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

__all__ = ["Route", "preferred", "route_of"]

MOST_PREFIX = 4096  # characters of the beginning that tell requests apart


@dataclass(frozen=True, slots=True)
class Route:
    """`adapter`: by the name that was asked for, empty for none. `prefix`: a digest of what the request's tokens begin with."""

    adapter: str = ""
    prefix: bytes = b""


class _Begins(msgspec.Struct):
    """The parts of the request shapes that say where its tokens begin."""

    adapter: str | None = None
    model: str | None = None
    query: str | None = None
    prompt: object = None
    messages: object = None
    text_1: object = None


def route_of(body: bytes) -> Route:
    """Of a request's body; a body that is no JSON has a route like any other: who reads it says what is wrong."""
    try:
        asked = msgspec.json.decode(body, type=_Begins)
    except (msgspec.MsgspecError, RecursionError):
        return Route()
    begins = next((v for v in (asked.query, asked.prompt, asked.messages, asked.text_1) if v is not None), "")
    text = begins if isinstance(begins, str) else repr(begins)
    digest = hashlib.sha256(text[:MOST_PREFIX].encode("utf-8", "surrogatepass")).digest()
    return Route(asked.adapter or asked.model or "", digest)


def preferred(route: Route, engines: Mapping[str, Collection[str]]) -> list[str]:
    """All engines, best first. `engines`: by id the adapters that each has in its slots.

    Those that have the adapter come first, by the beginning; then the others, by the adapter: one that nobody has is loaded by few.
    """
    has = [e for e, adapters in engines.items() if route.adapter and route.adapter in adapters]
    rest = [e for e in engines if e not in has]
    adapter = route.adapter.encode("utf-8", "surrogatepass")
    return [
        *sorted(has, key=lambda e: _weight(route.prefix, e), reverse=True),
        *sorted(rest, key=lambda e: _weight(adapter if route.adapter else route.prefix, e), reverse=True),
    ]


def _weight(what: bytes, engine: str) -> bytes:
    return hashlib.sha256(len(what).to_bytes(4) + what + engine.encode()).digest()
