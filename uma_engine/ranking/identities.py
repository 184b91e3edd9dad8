"""Twins for an audit: the same profile under two names, two pronouns or two schools.

Knows texts and tables of names; does not know engines or scores. A name is a stimulus, as in the audit studies that it comes from; no
group is ever guessed from a candidate's own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from uma_engine.errors import InvalidRequest
from uma_engine.ranking.redaction import redact

__all__ = ["AXES", "Identity", "draw", "dress"]

AXES = ("names", "pronouns", "schools")
_SHE_TO_HE = {"she": "he", "her": "his", "hers": "his", "herself": "himself"}
_HE_TO_SHE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
_PRONOUNS = re.compile(r"\b(?:he|him|his|himself|she|her|hers|herself)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Identity:
    """One side of a pair: `value` is put on, `group` is what the pair contrasts."""

    axis: str
    value: str
    group: str


@cache
def _tables() -> dict[str, Any]:
    return json.loads((files("uma_engine.ranking") / "data" / "identities.json").read_text(encoding="utf-8"))


def draw(axis: str, text: str, rng: random.Random) -> tuple[Identity, Identity] | None:
    """Two identities that differ in one thing: a first name's group or gender, the pronouns, or the school.

    None where the text holds all the words that names could be drawn from: a swap must change nothing else. Errors:
    InvalidRequest for an unknown axis
    """
    tables = _tables()
    if axis == "names":
        pairs = (
            ("female, white-sounding", "female, black-sounding"),
            ("male, white-sounding", "male, black-sounding"),
            ("female, white-sounding", "male, white-sounding"),
            ("female, black-sounding", "male, black-sounding"),
        )
        groups = rng.choice(pairs)
        words = {w.lower() for w in re.findall(r"\w+", text)}
        firsts = [[name for name in tables["names"][group] if name.lower() not in words] for group in groups]
        surnames = [name for name in tables["surnames"] if name.lower() not in words]
        if not all(firsts) or not surnames:
            return None
        surname = rng.choice(surnames)
        a, b = (Identity(axis, f"{rng.choice(f)} {surname}", g) for f, g in zip(firsts, groups, strict=True))
        return a, b
    if axis == "pronouns":
        first, second = sorted(rng.sample(tables["pronouns"], 2), reverse=True)
        return Identity(axis, first, first), Identity(axis, second, second)
    if axis == "schools":
        first, second = sorted(rng.sample(tables["schools"], 2))
        return Identity(axis, first, first), Identity(axis, second, second)
    raise InvalidRequest(
        f"`axes` holds `{axis}`", hint="the axes are " + ", ".join(f"`{a}`" for a in AXES), param="axes"
    )


def dress(
    text: str, facts: Mapping[str, Any], identity: Identity, name_fields: Sequence[str] = ("name",)
) -> tuple[str, dict[str, Any]]:
    """The text and facts of somebody with this name, these pronouns or this school, said in a line of its own and wherever the
    text says it already.
    """
    facts = dict(facts)
    if identity.axis == "names":
        for key in name_fields:
            if facts.get(key):
                text = _renamed(text, str(facts[key]), identity.value)
        facts[name_fields[0] if name_fields else "name"] = identity.value
        return f"Name: {identity.value}\n\n{text}", facts
    if identity.axis == "pronouns":
        if identity.value.startswith("he"):
            text = _PRONOUNS.sub(lambda m: _swapped(m, _SHE_TO_HE), text)
        elif identity.value.startswith("she"):
            text = _PRONOUNS.sub(lambda m: _swapped(m, _HE_TO_SHE), text)
        return f"Pronouns: {identity.value}\n\n{text}", facts
    _, spans = redact(text, ("school",))
    for span in reversed(spans):
        text = text[: span.start] + identity.value + text[span.end :]
    return f"Education: {identity.value}\n\n{text}", facts


def _renamed(text: str, old: str, new: str) -> str:
    """The whole name, then its first and last word, as names are written."""
    text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, text)
    words = old.split()
    if len(words) > 1:
        for word, by in ((words[0], new.split()[0]), (words[-1], new.split()[-1])):
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", by, text)
    return text


def _swapped(match: re.Match[str], table: Mapping[str, str]) -> str:
    word = match[0]
    other = table.get(word.lower())
    if other is None:
        return word
    if word.lower() == "her" and not re.match(r"\s+\w", match.string[match.end() :]):
        other = "him"
    if word.lower() == "his" and not re.match(r"\s+\w", match.string[match.end() :]):
        other = "hers"
    return other.capitalize() if word[0].isupper() else other
