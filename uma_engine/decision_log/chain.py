"""The chain: what seals an entry, and the head that says how long the log is.

Knows bytes and digests; does not know SQL. An entry's header holds the digest of its body and, for each candidate, a salted commitment
to the part that is about them. The entry's digest seals the header and the digest before it. So a part and its salt can be deleted and
every digest still follows from the one before; and what is left, the commitment, tells nothing, not even to who guesses the content.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uma_engine.errors import CorruptFile

__all__ = ["commitment", "decode", "encode", "read_head", "root", "seal", "who", "write_head"]

FORMAT = "uma-decision-log/1"
SALT_BYTES = 32


def encode(data: Any) -> bytes:
    """Plain data as bytes of JSON. Raises TypeError or ValueError for what JSON does not have."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def decode(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def root(log_id: bytes, key: bytes) -> bytes:
    """What the first entry follows."""
    return hashlib.sha256(FORMAT.encode() + b"\n" + log_id + key).digest()


def seal(previous: bytes, header: bytes) -> bytes:
    return hashlib.sha256(previous + header).digest()


def commitment(salt: bytes, content: bytes) -> str:
    return hashlib.sha256(salt + content).hexdigest()


def who(key: bytes, tenant: str, candidate_id: str) -> bytes:
    """What stands for a candidate: with the log's key one can ask for somebody by id, but not read ids out of it."""
    name = tenant.encode("utf-8", "surrogatepass")
    message = len(name).to_bytes(4, "little") + name + candidate_id.encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).digest()[:16]


def write_head(path: Path, count: int, digest: bytes) -> None:
    """Replace the head on disk; it is durable when this returns."""
    partial = path.with_name(f".{path.name[:200]}.part")
    data = json.dumps({"format": FORMAT, "entries": count, "digest": digest.hex()}).encode() + b"\n"
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_head(path: Path) -> tuple[int, bytes] | None:
    """Entries and digest; None where there is no head. Errors: CorruptFile"""
    try:
        head: Mapping[str, Any] = json.loads(path.read_bytes())
        return int(head["entries"]), bytes.fromhex(head["digest"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"the log's head `{path}` cannot be read: {error}") from None
