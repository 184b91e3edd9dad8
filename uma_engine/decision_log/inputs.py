"""Inputs by digest: a record without the words of job and candidates, and the words put back by who has them.

Knows salted digests; does not know files. A digest is of a salt of its own with the content, for a short text could be guessed from a
bare one. Facts are digested together: a ledger says the numbers that it was made of, and nothing else of them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from uma_engine.decision_log import chain
from uma_engine.errors import InvalidRequest

__all__ = ["as_digests", "needs_inputs", "with_inputs"]

PREFIX = "sha256:"


def as_digests(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with digests in place of the job's and the candidates' words."""
    people = [
        {**c, "text": _digest(c["text"]), "facts": {"$digest": _digest(_facts(c["facts"]))}}
        for c in record["candidates"]
    ]
    return {**record, "query": _digest(record["query"]), "candidates": people}


def needs_inputs(record: Mapping[str, Any]) -> bool:
    """Whether the record holds digests instead of words."""
    people = record.get("candidates") or [{}]
    return any(isinstance(c.get("facts"), Mapping) and "$digest" in c["facts"] for c in people) or (
        not record.get("candidates") and str(record.get("query")).startswith(PREFIX)
    )


def with_inputs(record: Mapping[str, Any], query: str, candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record with its words again: `candidates` have `id`, `text` and `facts`, in any order.

    Errors: InvalidRequest, naming it, where something is not what was ranked
    """
    given = {c["id"]: c for c in candidates}
    query = query.strip()  # as `rank` does
    if not _is(record["query"], query):
        raise InvalidRequest("the job is not the one that was recorded: its digest differs", param="query")
    people = []
    for c in record["candidates"]:
        if "text" not in c:  # forgotten
            people.append(c)
            continue
        found = given.get(c["id"])
        if found is None:
            raise InvalidRequest(f"candidate `{c['id']}` was recorded but is not given", param="candidates")
        if not _is(c["text"], found["text"]) or not _is(c["facts"]["$digest"], _facts(found["facts"])):
            raise InvalidRequest(
                f"candidate `{c['id']}` is not as recorded: the digest of text or facts differs", param="candidates"
            )
        people.append({**c, "text": found["text"], "facts": dict(found["facts"])})
    return {**record, "query": query, "candidates": people}


def _facts(facts: Mapping[str, Any]) -> bytes:
    return chain.encode(dict(sorted(facts.items())))


def _digest(content: str | bytes, salt: bytes | None = None) -> str:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    salt = secrets.token_bytes(chain.SALT_BYTES) if salt is None else salt
    return f"{PREFIX}{salt.hex()}:{hashlib.sha256(salt + data).hexdigest()}"


def _is(digest: str, content: str | bytes) -> bool:
    return _digest(content, bytes.fromhex(digest.removeprefix(PREFIX).partition(":")[0])) == digest
