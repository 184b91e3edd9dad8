"""Refuses regular expressions of an adapter that could keep the process busy: `re` tries alternatives one by one.

Knows how many ways a pattern can match a module's name, from above; does not know adapters or modules.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from uma_engine.errors import AdapterError

__all__ = ["refuse_slow_pattern"]

NAME_CHARS = 100  # longer than any module's name
MAX_STEPS = 3_600_000  # about 40 ms of `re`, at the worst name of that length
MAX_WIDE = 5  # repeats of open length on one way through a pattern
NARROW = 8  # a repeat with fewer counts than this is so many alternatives; one with more is of open length
LEAF_STEPS = 0.125  # comparing one character, beside taking up a way again
GROUP_STEPS = 3.0  # a repeat of more than one character class, beside one of a single one
HINT = "name the modules in a list, or write the pattern with few `.*` and no repeat within a repeat"
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
LEAVES = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "CATEGORY")

# Ways to match, as a polynomial: (repeats of open length, least characters beside them) -> number of such ways.
Ways = Counter[tuple[int, int]]
Steps = Counter[Any]  # the same, with fractions


class _TooSlow(Exception):
    pass


def refuse_slow_pattern(pattern: str, matched_as: str, where: str) -> None:
    """Accept a sound pattern only if it decides every name of up to 100 characters within about 50 ms.

    `matched_as` is the pattern with what is put around it when it is matched.

    Errors:  AdapterError for a repeat within a repeat, alternatives within a repeat, too many ways to match; for any
             pattern beyond a plain name when this Python does not show how it reads patterns
    """
    if re.fullmatch(r"[\w.]*", pattern):
        return
    try:
        parse = importlib.import_module("re._parser").parse
    except (ImportError, AttributeError):
        raise AdapterError(
            f"{where} holds the pattern `{pattern}`, which this Python cannot check", hint="name the modules in a list"
        ) from None
    try:
        _sequence(parse(matched_as))
    except (_TooSlow, RecursionError) as error:
        reason = str(error) if isinstance(error, _TooSlow) else "it is nested too deeply"
        raise AdapterError(
            f"{where} holds `{pattern}`, which could take too long to match: {reason}", hint=HINT
        ) from None


def _placed(ways: Ways) -> float:
    """How many ways there are in a name: k repeats share the characters that nothing else takes."""
    return sum(n * math.comb(max(0, NAME_CHARS - width) + wide, wide) for (wide, width), n in ways.items())


def _times(a: Ways, b: Ways) -> Ways:
    product: Ways = Counter()
    for (wide_a, width_a), n in a.items():
        for (wide_b, width_b), m in b.items():
            if wide_a + wide_b > MAX_WIDE:
                raise _TooSlow(f"it has more than {MAX_WIDE} repeats of open length")
            product[wide_a + wide_b, min(width_a + width_b, NAME_CHARS)] += n * m
    return product


def _once(width: int = 0) -> Ways:
    return Counter({(0, width): 1})


def _sequence(nodes: Iterable[Any]) -> tuple[Ways, Steps]:
    """(ways through the nodes one after another, steps that trying them all takes)"""
    ways, steps = _once(), Steps()
    for op, value in nodes:
        node_ways, node_steps = _node(str(op), value)
        steps.update(_times(ways, node_steps))
        ways = _times(ways, node_ways)
        if _placed(steps) > MAX_STEPS:
            raise _TooSlow("there are too many ways to match it")
    return ways, steps


def _node(op: str, value: Any) -> tuple[Ways, Steps]:
    leaf = Steps({(0, 0): LEAF_STEPS})
    if op in LEAVES:
        return _once(1), leaf
    if op in ("AT", "GROUPREF"):
        return _once(), leaf
    if op in REPEATS:
        return _repeat(op, *value)
    if op == "SUBPATTERN":
        ways, steps = _sequence(value[-1])
        return ways, steps + leaf + leaf  # it notes where the group begins and ends
    if op == "BRANCH":
        return _branch([list(nodes) for nodes in value[1]])
    if op == "ATOMIC_GROUP":
        ways, steps = _sequence(value)
        return _once(min((width for _, width in ways), default=0)), steps
    if op in ("ASSERT", "ASSERT_NOT"):  # taken or not, never tried in another way
        return _once(), _sequence(value[1])[1]
    raise _TooSlow(f"it uses `{op.lower()}`")


def _repeat(op: str, least: int, most: int, nodes: Any) -> tuple[Ways, Steps]:
    nodes = list(nodes)
    if most > 1 and (inner := next((name for name in _operators(nodes) if name in (*REPEATS, "BRANCH")), None)):
        raise _TooSlow(f"a repeat holds {'alternatives' if inner == 'BRANCH' else 'another repeat'}")
    ways, steps = _sequence(nodes)
    weight = 1.0 if len(nodes) == 1 and str(nodes[0][0]) in LEAVES else GROUP_STEPS
    if most == 1:
        return (ways + _once(), steps + Steps({(0, 0): weight})) if least == 0 else (ways, steps)
    width = least * min(width for _, width in ways)
    each = sum(steps.values()) / LEAF_STEPS * weight
    counts = most - least + 1
    if counts > NARROW:
        found, tried = Counter({(1, width): 1}), Steps({(1, min(width, NAME_CHARS)): each})
    else:
        found = Counter({(0, width): counts})
        tried = Steps({(0, 0): counts - 1 + each * min(most, NAME_CHARS) * LEAF_STEPS})
    return (_once(width) if op == "POSSESSIVE_REPEAT" else found), tried


def _branch(alternatives: list[list[Any]]) -> tuple[Ways, Steps]:
    words = ["".join(chr(value) for _, value in nodes).casefold() for nodes in alternatives if _is_word(nodes)]
    if len(words) == len(alternatives):
        # Only words that begin alike can match at the same place: most lists of names leave one way.
        chain = max(sum(word.startswith(other) for other in words) for word in words)
        compared = len(words) + max(sum(_num_shared(word, other) for other in words) for word in words)
        return Counter({(0, min(map(len, words))): chain}), Counter({(0, 0): chain - 1 + compared * LEAF_STEPS})
    ways, steps = Ways(), Steps({(0, 0): len(alternatives) - 1.0})
    for nodes in alternatives:
        node_ways, node_steps = _sequence(nodes)
        ways.update(node_ways)
        steps.update(node_steps)
    return ways, steps


def _num_shared(a: str, b: str) -> int:
    """How many characters two words begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_word(nodes: Iterable[Any]) -> bool:
    return all(str(op) == "LITERAL" for op, _ in nodes)


def _operators(nodes: Iterable[Any]) -> Iterator[str]:
    """All operators at any depth. A character class has alternatives too, but never more than one that fits."""
    for op, value in nodes:
        yield str(op)
        if str(op) in REPEATS:
            yield from _operators(value[2])
        elif str(op) in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            yield from _operators(value[-1])
        elif str(op) == "ATOMIC_GROUP":
            yield from _operators(value)
        elif str(op) == "BRANCH":
            for alternative in value[1]:
                yield from _operators(alternative)
