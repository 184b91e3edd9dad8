"""Requests made from the server's own OpenAPI document, right ones and wrong ones: each is answered, none makes the server fail.

What the document says holds: statuses are those it lists, and an error looks as it describes. A load beside it is answered right.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.test_chaos import ADMIN, Load, Truth, home, keep, server, times, truth  # noqa: F401

pytest.importorskip("httpx")
schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytestmark = [pytest.mark.slow, pytest.mark.reliability, pytest.mark.timeout(7200)]

LEFT_OUT = {"/admin/swap", "/admin/swap/finish", "/admin/swap/rollback"}  # what these do has suites of its own
UNAVAILABLE = {503, 504}


def test_requests_from_the_document(home: Path, truth: Truth) -> None:  # noqa: F811
    each = times(25, 4000)
    statuses: Counter[int] = Counter()
    listed: set[str] = set()
    settings = hypothesis.settings(
        max_examples=each, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    with server(home) as (_, address), Load(address, truth, threads=1) as load:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path in LEFT_OUT:
                continue
            listed.add(f"{operation.method.upper()} {operation.path}")
            settings(hypothesis.given(data=hypothesis.strategies.data())(_asker(operation, statuses)))()
    assert len(listed) > 15, listed
    assert statuses[200] > 0
    assert statuses[400] > 0
    assert set(load.statuses) == {200}
    keep(
        "schema",
        requests=sum(statuses.values()),
        operations=len(listed),
        statuses={str(k): v for k, v in statuses.items()},
    )


def _asker(operation: Any, statuses: Counter[int]) -> Any:
    """Draws a request of an operation, right or wrong, and looks at its answer."""

    def ask(data: Any) -> None:
        mode = data.draw(hypothesis.strategies.sampled_from(list(schemathesis.GenerationMode)))
        drawn = data.draw(operation.as_strategy(generation_mode=mode))
        answer = drawn.call(headers={"authorization": f"Bearer {ADMIN}"}, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500 or answer.status_code in UNAVAILABLE, answer.text[:500]
        if answer.status_code >= 400 and answer.status_code not in (404, 405):  # those of paths that are none
            assert answer.json()["error"]["type"], answer.text[:200]

    return ask
