"""The OpenAPI document of the server, made from the shapes that it decodes: the two cannot differ.

Knows paths and schemas; does not know how anything is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from uma_engine._version import __version__
from uma_engine.serve import shapes

__all__ = ["document"]

# What a path takes, and what it is for.
BODIES: dict[str, tuple[type, str]] = {
    "/v1/rank": (shapes.RankRequest, "Rank candidates for a job, with everything that the engine can say of it"),
    "/v1/rerank": (
        shapes.RerankRequest,
        "Rerank documents: the shapes of Jina, Voyage, Infinity and Cohere's first version",
    ),
    "/rerank": (shapes.RerankRequest, "Rerank documents: TEI's and Infinity's shape"),
    "/v2/rerank": (shapes.RerankRequest, "Rerank documents: Cohere's second version"),
    "/v1/score": (shapes.ScoreRequest, "Score pairs (vLLM's shape), or items by label tokens (SGLang's)"),
    "/score": (shapes.ScoreRequest, "As `/v1/score`"),
    "/v1/completions": (shapes.CompletionRequest, "OpenAI's completions"),
    "/v1/chat/completions": (shapes.ChatRequest, "OpenAI's chat completions"),
    "/v1/embeddings": (shapes.EmbeddingRequest, "OpenAI's embeddings, by MiniLM"),
    "/admin/adapters": (shapes.AdapterRequest, "Load an adapter from below the server's adapter root"),
    "/admin/swap": (shapes.SwapRequest, "Swap the base while requests run"),
}
OPEN = {"/livez", "/readyz", "/healthz"}
ERRORS = {
    "400": "wrong",
    "401": "no key",
    "404": "not known",
    "413": "too large",
    "429": "full: see Retry-After",
    "504": "too late",
}


def document(routes: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """The document for paths with their methods."""
    types = [body for body, _ in BODIES.values()]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    of_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, methods in routes:
        for method in methods:
            if method == "HEAD":
                continue
            operation: dict[str, Any] = {
                "operationId": f"{method.lower()}{path.replace('/', '_').replace('{', '').replace('}', '')}",
                "responses": {"200": {"description": "answered"}},
            }
            if path not in OPEN:
                operation["security"] = [{"key": []}]
                error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
                operation["responses"] |= {status: {"description": text, **error} for status, text in ERRORS.items()}
            if method == "POST" and path in BODIES:
                body, text = BODIES[path]
                operation["summary"] = text
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": of_type[body]}},
                }
            names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
            if names:
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
                ]
            paths.setdefault(path, {})[method.lower()] = operation
    components["Error"] = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "code": {"type": "integer"},
                    "message": {"type": "string"},
                    "hint": {"type": ["string", "null"]},
                    "param": {"type": ["string", "null"]},
                },
                "required": ["type", "code", "message"],
            }
        },
        "required": ["error"],
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Uma Engine", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
