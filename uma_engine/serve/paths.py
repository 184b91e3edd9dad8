"""Paths that requests name: below the server's adapter root, or refused.

Knows directories; does not know what is in them.
"""

from __future__ import annotations

from pathlib import Path

from uma_engine.errors import InvalidRequest
from uma_engine.serve.settings import ServeSettings

__all__ = ["below"]


def below(settings: ServeSettings, path: str) -> Path:
    """A directory below the adapter root: no path leads out of it. Errors: InvalidRequest"""
    root = settings.adapter_root
    if root is None:
        raise InvalidRequest("this server loads no adapters", hint="start it with `--adapter-root DIR`")
    try:
        found = (root / path).resolve()
        fits = found.is_relative_to(root.resolve()) and found.is_dir()
    except (OSError, ValueError):
        fits = False
    if not fits:
        raise InvalidRequest(f"`{path}` is no adapter below the server's root", param="path")
    return found
