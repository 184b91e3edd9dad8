"""The web console: three files of the package, which work without any other host.

Knows names of files and headers; what the page asks for goes through the same paths and keys as everybody's requests.
"""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["routes"]

FILES = {"/": ("index.html", "text/html"), "/console.css": ("console.css", "text/css")}
FILES["/console.js"] = ("console.js", "text/javascript")
HEADERS = {
    # Nothing inline, nothing from elsewhere, in nobody's frame: a candidate's text cannot become a script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    return [_route(path, *file) for path, file in FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    content = (resources.files("uma_engine.serve") / "static" / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route(path, endpoint)
