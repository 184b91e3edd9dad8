"""A record taken apart: what it says of each candidate in a part of its own, and the rest, which names nobody.

Knows where in a record people are: an object whose `id` is a candidate's id is about that candidate, as a whole; so is the value in a
mapping whose keys are all candidates' ids; and a string that equals a candidate's id names them. Whoever adds something about a
candidate to a record says it in one of these forms, and it can be exported and forgotten with everything else. Does not know files.
What was asked of everybody (`BODY_ONLY`) is not looked through: an option may equal somebody's id by chance. Who was not read and is
only named (`NAMED`) has a part too, after the candidates, which holds the id alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uma_engine.errors import InvalidRequest

__all__ = ["FORGOTTEN", "join", "split", "strings_of"]

FORGOTTEN = "[forgotten]"  # stands in place of an id
BODY_ONLY = frozenset({"format", "created_at", "query", "options", "stack", "adapters", "usage", "warnings"})
NAMED = ("left_out", "not_looked_at")  # lists of ids beside the candidates: whom a cascade did not read
# In the body, where something of a candidate was: {PART: [place, number]} an object, {ID: place} an id, {MAP: [[key, value]]} a mapping.
PART, ID, MAP = "$part", "$id", "$map"


def split(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The body and, for each candidate in order and then for each who is only named, `{"id": ..., "items": [...]}`.

    Errors: InvalidRequest where the record has no list of candidates with distinct ids, or uses the marks of this module
    """
    candidates = record.get("candidates")
    ids = [c.get("id") for c in candidates if isinstance(c, Mapping)] if isinstance(candidates, Sequence) else []
    if not isinstance(candidates, Sequence) or len(ids) != len(candidates) or not all(isinstance(i, str) for i in ids):
        raise InvalidRequest("the record's `candidates` is not a list of objects with an `id`", param="record")
    if len(set(ids)) != len(ids):
        raise InvalidRequest("two of the record's candidates have one id", param="record")
    named = [i for key in NAMED for i in record.get(key) or () if isinstance(i, str)]
    ids = list(dict.fromkeys([*ids, *named]))
    parts: list[dict[str, Any]] = [{"id": i, "items": []} for i in ids]
    places = {i: place for place, i in enumerate(ids)}

    def of(place: int, value: Any) -> dict[str, Any]:
        parts[place]["items"].append(value)
        return {PART: [place, len(parts[place]["items"]) - 1]}

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return {ID: places[value]} if value in places else value
        if isinstance(value, Mapping):
            who = value.get("id")
            if isinstance(who, str) and who in places:
                return of(places[who], value)
            if value and all(key in places for key in value):
                return {MAP: [[{ID: places[key]}, of(places[key], item)] for key, item in value.items()]}
            if not value.keys().isdisjoint((PART, ID, MAP)):
                raise InvalidRequest(f"the record has a key among `{PART}`, `{ID}`, `{MAP}`", param="record")
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    return {key: value if key in BODY_ONLY else walk(value) for key, value in record.items()}, parts


def join(body: Mapping[str, Any], parts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The record again. Of a candidate without a part nothing is left but `{"id": FORGOTTEN}`."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            if PART in value:
                place, number = value[PART]
                return parts[place]["items"][number] if place in parts else {"id": FORGOTTEN}
            if ID in value:
                return parts[value[ID]]["id"] if value[ID] in parts else FORGOTTEN
            if MAP in value:
                return {walk(key): walk(item) for key, item in value[MAP]}
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value

    return {key: value if key in BODY_ONLY else walk(value) for key, value in body.items()}


def strings_of(value: Any) -> list[str]:
    """All strings among the values of plain data."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in strings_of(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings_of(item)]
    return []
