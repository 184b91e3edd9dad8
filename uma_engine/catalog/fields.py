"""Typed look-ups in a model's own description of itself, config.json or GGUF metadata.

Knows how to refuse a value of the wrong kind or an absurd size; does not know what any key means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uma_engine.errors import CorruptFile

__all__ = ["Fields"]

MISSING: Any = object()
MAX_SIZE = 1 << 24  # above any width, depth, vocabulary or context in use


class Fields:
    """Reads `values` under `prefix`, falling back to defaults for absent (or null) keys.

    Errors:  CorruptFile, naming `where` and the key, for a value of the wrong kind or out of range, and for an absent
             key without a default
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    def get(self, key: str, default: Any = MISSING) -> Any:
        value = self.values.get(self.prefix + key)
        if value is not None:
            return value
        if default is MISSING:
            raise CorruptFile(f"{self.where} has no `{self.prefix}{key}`", hint="fetch the whole model again")
        return default

    def fail(self, key: str, value: Any, rule: str) -> CorruptFile:
        return CorruptFile(f"{self.where}: `{self.prefix}{key}` is `{value!r}` but must be {rule}")

    def size(self, key: str, default: Any = MISSING) -> Any:
        """A positive integer of believable size."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
            raise self.fail(key, value, f"an integer from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, default: Any = MISSING) -> Any:
        """A positive finite number, as float."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(key, value, "a positive finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = MISSING) -> Any:
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value

    def token_ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.get(key, default)
        ids = value if isinstance(value, list | tuple) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < MAX_SIZE:
                raise self.fail(key, value, "a token id or a list of them")
        return tuple(ids)

    def inside(self, key: str) -> Fields:
        """The object under `key`, empty when absent."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.fail(key, value, "an object")
        return Fields(value, f"{self.where}, `{key}`")
