"""What a server writes and sends about its requests: whole, in JSON, and without anybody's words or secrets."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import tiny_dir  # noqa: F401
from tests.serve.test_server import ADMIN, QUERY, TEXTS, Client
from uma_engine.serve import logs
from uma_engine.serve.settings import Key

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(tiny_dir: Path) -> Iterator[Client]:  # noqa: F811
    made = Client(tiny_dir, keys=(Key.of("operator", "admin", ADMIN),))
    yield made
    made.close()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    logger = logging.getLogger("uma_engine")
    before = logger.handlers[:], logger.propagate, logger.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("info")
    yield stream
    logger.handlers[:], logger.propagate, _ = before
    logger.setLevel(before[2])


def test_a_line_for_every_request(client: Client, written: io.StringIO) -> None:
    body = {"query": QUERY, "candidates": TEXTS}
    answers = [
        client.post("/v1/rank", body, key=ADMIN),
        client.post("/v1/rank", {**body, "top_n": -1}, key=ADMIN),
        client.post("/v1/rank", body, key="wrong-secret-0123456789"),
        client.get("/metrics", key=ADMIN),
    ]
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 401, 200]
    assert [line["request"] for line in lines] == [a.headers["x-request-id"] for a in answers]
    assert [line.get("error") for line in lines] == [None, "InvalidRequest", "Unauthorised", None]
    assert lines[0]["tenant"] == "operator"
    assert lines[0]["base"] == answers[0].json()["stack"]["base_digest"][:12]
    assert all(line["seconds"] > 0 and line["path"] and line["time"].endswith("Z") for line in lines)
    for secret in (QUERY, TEXTS[0], ADMIN, "wrong-secret"):
        assert secret not in written.getvalue()


def test_a_failure_is_one_line_with_its_request(
    client: Client, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(client.engine, "rank", broken)
    answer = client.post("/v1/rank", {"query": QUERY, "candidates": TEXTS}, key=ADMIN)
    assert answer.status_code == 500
    first, second = (json.loads(line) for line in written.getvalue().splitlines())
    assert first["level"] == "error"
    assert "ZeroDivisionError" in first["exception"]
    assert first["request"] == second["request"] == answer.headers["x-request-id"]


def test_spans(client: Client) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    logs.trace_with(provider.get_tracer("test"))
    try:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        headers = {"authorization": f"Bearer {ADMIN}", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        body = {"query": QUERY, "candidates": TEXTS}
        answer = client.run(client.http.post("/v1/rank", json=body, headers=headers))
    finally:
        logs.trace_with(None)
    (span,) = exporter.get_finished_spans()
    assert span.name == "/v1/rank"
    assert format(span.context.trace_id, "032x") == trace
    assert span.attributes["uma.request"] == answer.headers["x-request-id"]
    assert span.attributes["uma.status"] == 200


def test_the_dashboard_asks_for_what_there_is(client: Client) -> None:
    client.post("/v1/rank", {"query": QUERY, "candidates": TEXTS}, key=ADMIN)
    there = set(re.findall(r"^# TYPE (uma:\w+) (\w+)$", client.get("/metrics", key=ADMIN).text, re.MULTILINE))
    names = {name for name, _ in there} | {f"{name}_bucket" for name, kind in there if kind == "histogram"}
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = {name for p in dashboard["panels"] for t in p["targets"] for name in re.findall(r"uma:\w+", t["expr"])}
    assert len(asked) > 10
    assert asked <= names
