"""What an operator does: adapters, and the base that answers.

Knows names and paths below the adapter root; does not know how anything is loaded.
"""

from __future__ import annotations

from starlette.responses import Response

from uma_engine.errors import InvalidRequest
from uma_engine.serve.app import Context, answer_json
from uma_engine.serve.generations import SwapPlan
from uma_engine.serve.paths import below
from uma_engine.serve.shapes import AdapterRequest, SwapRequest, decode

__all__ = ["ROUTES"]


async def adapters(context: Context, body: bytes) -> Response:
    return answer_json({"adapters": context.engine.adapters()})


async def known_adapters(context: Context, body: bytes) -> Response:
    rows = []
    for known, info in context.engine.known_adapters():
        row = {
            "name": known.name,
            "pinned": known.pinned,
            "resident": info is not None,
            "load_s": round(known.load_s, 4),
        }
        if info is not None:
            row |= {
                "digest": info.ref.digest.hex(),
                "rank": info.rank,
                "bytes": info.num_bytes,
                "requests": info.num_requests,
            }
        rows.append(row)
    return answer_json({"adapters": rows, "max_loras": context.engine.config.max_loras})


async def load_adapter(context: Context, body: bytes) -> Response:
    asked = decode(body, AdapterRequest)
    if (asked.path is None) == (asked.alias_of is None):
        raise InvalidRequest("one of `path` and `alias_of` is needed", param="path")
    if asked.alias_of is not None:
        context.engine.alias_adapter(asked.name, asked.alias_of)
        context.generations.keep_alias(asked.name, asked.alias_of)
        return answer_json({"name": asked.name, "alias_of": asked.alias_of})
    assert asked.path is not None
    path = below(context.settings, asked.path)
    if not asked.load:
        context.engine.register_adapter(asked.name, path, pinned=asked.pinned)
        context.generations.keep_adapter(asked.name, path, asked.pinned)
        return answer_json({"name": asked.name, "digest": None})
    ref = await context.engine.load_adapter(asked.name, path)
    if asked.pinned:
        context.engine.register_adapter(asked.name, path, pinned=True)
    context.generations.keep_adapter(asked.name, path, asked.pinned)
    return answer_json({"name": asked.name, "digest": ref.digest.hex()})


async def reload_adapter(context: Context, body: bytes) -> Response:
    name = context.request.path_params["name"]
    ref = await context.engine.reload_adapter(name)
    return answer_json({"name": name, "digest": ref.digest.hex()})


async def unload_adapter(context: Context, body: bytes) -> Response:
    name = context.request.path_params["name"]
    context.engine.unload_adapter(name)
    context.generations.keep_adapter(name, None)
    return answer_json({"name": name})


async def swap(context: Context, body: bytes) -> Response:
    asked = decode(body, SwapRequest)
    plan = SwapPlan(
        asked.model,
        {n: below(context.settings, p) for n, p in asked.adapters.items()},
        asked.aliases,
        frozenset(asked.pinned),
        asked.exclusive,
        asked.canary,
    )
    context.release()  # an exclusive swap waits for every request, and this is one
    status = context.generations.start(plan)
    if asked.wait:
        status = await context.generations.wait()
    return answer_json(status, 200 if asked.wait else 202)


async def swap_status(context: Context, body: bytes) -> Response:
    return answer_json(context.generations.status())


async def finish(context: Context, body: bytes) -> Response:
    return answer_json(context.generations.finish())


async def rollback(context: Context, body: bytes) -> Response:
    return answer_json(context.generations.rollback())


ROUTES = (
    ("/v1/adapters", adapters, "rank", ("GET",)),
    ("/admin/adapters", known_adapters, "admin", ("GET",)),
    ("/admin/adapters", load_adapter, "admin"),
    ("/admin/adapters/{name}/reload", reload_adapter, "admin"),
    ("/admin/adapters/{name}", unload_adapter, "admin", ("DELETE",)),
    ("/admin/swap", swap, "admin"),
    ("/admin/swap/status", swap_status, "admin", ("GET",)),
    ("/admin/swap/finish", finish, "admin"),
    ("/admin/swap/rollback", rollback, "admin"),
)
