"""What a server is configured with: limits and keys.

Knows numbers and digests of keys; does not know requests.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from uma_engine.errors import InvalidRequest

__all__ = ["Key", "Scope", "ServeSettings", "read_keys"]

Scope = Literal["rank", "admin"]
SCOPES = ("rank", "admin")


@dataclass(frozen=True, slots=True)
class Key:
    """A key by its digest; `name` stands in metrics and is the tenant of what it asks."""

    name: str
    scope: Scope
    digest: bytes

    @classmethod
    def of(cls, name: str, scope: Scope, secret: str) -> Key:
        return cls(name, scope, hashlib.sha256(secret.encode()).digest())


@dataclass(frozen=True)
class ServeSettings:
    """`keys` empty: everybody may ask, which `uma serve` allows on the loopback device alone. A key of scope `admin` may do all."""

    keys: tuple[Key, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_documents: int = 4096
    max_tokens: int = 4096
    deadline_s: float = 120.0  # of a request that names none
    max_waiting: int = 256  # requests of one key; more are told to come back
    max_admitted_tokens: int | None = None  # inside the engine together, by estimate; None: four of its steps
    adapter_root: Path | None = None  # adapters are loaded from below it; None: none over HTTP
    model_aliases: tuple[str, ...] = field(default=())
    state_file: Path | None = None  # keeps which base answers, over restarts
    exclusive_swaps: bool = False
    behind_front_end: bool = False  # requests come from this server's own front ends

    def find(self, secret: str) -> Key | None:
        """The key of a secret. Every key is compared, so that time tells nothing."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: str | Path | None, environment: str = "UMA_API_KEYS") -> tuple[Key, ...]:
    """Keys from a file or an environment variable: lines (or entries parted by commas) `NAME SCOPE SECRET`, where the secret may be
    `sha256:` and its hex digest. `#` begins a comment.

    Errors:  InvalidRequest, which never holds a secret
    """
    if path is not None:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeError) as error:
            raise InvalidRequest(f"the keys `{path}` cannot be read: {error}") from None
        return tuple(_keys(text.splitlines(), f"`{path}`"))
    return tuple(_keys(os.environ.get(environment, "").split(","), f"`{environment}`"))


def _keys(lines: Iterable[str], where: str) -> Iterable[Key]:
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        if len(parts) != 3 or parts[1] not in SCOPES or parts[0] in seen:
            raise InvalidRequest(
                f"line {number} of {where} is no key", hint="write NAME, `rank` or `admin`, and the secret; names once"
            )
        name, scope, secret = parts
        seen.add(name)
        if secret.startswith("sha256:"):
            try:
                yield Key(name, scope, bytes.fromhex(secret.removeprefix("sha256:")))  # type: ignore[arg-type]
            except ValueError:
                raise InvalidRequest(f"line {number} of {where} has a digest that is not hex") from None
        elif len(secret) < 16:
            raise InvalidRequest(f"the secret in line {number} of {where} is shorter than 16 characters")
        else:
            yield Key.of(name, scope, secret)  # type: ignore[arg-type]
