"""Which engine is asked: the one that has the adapter, always the same for the same beginning, and few requests move."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("msgspec")

from uma_engine.scale.routing import Route, preferred, route_of

ENGINES = {f"engine-{n}": frozenset() for n in range(5)}


def routes(count: int, adapter: str = "") -> list[Route]:
    return [route_of(json.dumps({"query": f"job {n}", "adapter": adapter or None}).encode()) for n in range(count)]


def test_the_same_beginning_goes_to_the_same_engine_and_beginnings_are_spread():
    places = Counter(preferred(r, ENGINES)[0] for r in routes(1000))
    assert len(places) == 5
    assert max(places.values()) < 2 * min(places.values())
    for route in routes(20):
        assert preferred(route, ENGINES) == preferred(route, dict(reversed(ENGINES.items())))
        assert sorted(preferred(route, ENGINES)) == sorted(ENGINES)


def test_an_engine_that_goes_moves_its_own_requests_alone():
    left = {k: v for k, v in ENGINES.items() if k != "engine-2"}
    for route in routes(300):
        before = preferred(route, ENGINES)
        expected = [e for e in before if e != "engine-2"]
        assert preferred(route, left) == expected


def test_engines_that_have_the_adapter_come_first_and_a_cold_one_has_one_place():
    engines = dict(ENGINES) | {"engine-1": frozenset({"match"}), "engine-3": frozenset({"match", "other"})}
    firsts = Counter(preferred(r, engines)[0] for r in routes(400, "match"))
    assert set(firsts) == {"engine-1", "engine-3"}
    assert min(firsts.values()) > 100
    assert len({preferred(r, engines)[0] for r in routes(50, "cold")}) == 1


@pytest.mark.parametrize(
    ("body", "route"),
    [
        (b"", Route()),
        (b"\xff\x00", Route()),
        (b"[" * 5000, Route()),
        (b'{"query": 5}', Route()),
    ],
)
def test_what_is_no_request_has_a_route_too(body, route):
    assert route_of(body) == route


def test_shapes_have_their_beginnings():
    bodies = [
        {"query": "a"},
        {"prompt": "b"},
        {"messages": [{"role": "user", "content": "c"}]},
        {"text_1": "d"},
        {"prompt": [1, 2]},
    ]
    found = {route_of(json.dumps(b).encode()).prefix for b in bodies}
    assert len(found) == len(bodies)
    assert route_of(b'{"query": "a", "model": "m"}').adapter == "m"
    assert route_of(b'{"query": "a", "candidates": [1]}') == route_of(b'{"candidates": [2, 3], "query": "a"}')
