"""Checks of what callers pass, shared by the public calls.

Knows names and types; does not know what arguments mean.
"""

from __future__ import annotations

from typing import Any

from uma_engine.errors import InvalidRequest

__all__ = ["check_count", "check_list", "check_text"]


def check_text(name: str, value: object, *, blank: bool = False) -> str:
    """The text itself, with something but white space in it unless `blank`. Errors: InvalidRequest"""
    if not isinstance(value, str):
        raise InvalidRequest(f"`{name}` is a `{type(value).__name__}` but must be a string", param=name)
    if not blank and not value.strip():
        raise InvalidRequest(f"`{name}` is empty", hint="pass the text itself", param=name)
    return value


def check_list(name: str, value: Any) -> list[Any]:
    """The items of a list, tuple or other iterable; a single string is refused, for it would fall into its characters."""
    if isinstance(value, str | bytes):
        raise InvalidRequest(f"`{name}` is a single `{type(value).__name__}`", hint="pass a list", param=name)
    try:
        return list(value)
    except TypeError:
        raise InvalidRequest(f"`{name}` is a `{type(value).__name__}` but must be a list", param=name) from None


def check_count(name: str, value: int | None) -> None:
    """Errors: InvalidRequest unless it is a positive integer or None"""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(f"`{name}` is `{value!r}` but must be a positive integer or None", param=name)
