"""What a server writes to standard error: one JSON object a line; and spans for OpenTelemetry, if it is asked for.

Knows lines and spans; does not know requests. Neither jobs nor candidates nor keys are ever in a line or a span.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from uma_engine.errors import MissingPackage

__all__ = ["answered", "configure", "span", "trace_to"]

access = logging.getLogger("uma_engine.access")
_tracer: Any = None


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str) -> None:
    """Log to standard error from `level` on: `info` has a line for every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("uma_engine")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def answered(**fields: Any) -> None:
    """One request has been answered."""
    access.info("%s %s", fields.get("path"), fields.get("status"), extra={"fields": fields})


def trace_to(endpoint: str) -> None:
    """Send spans to an OTLP collector over HTTP, in the background. Errors: MissingPackage without the extra `otel`"""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[otel]'`"
        ) from None
    from opentelemetry.sdk.resources import Resource

    provider = TracerProvider(resource=Resource.create({"service.name": "uma-engine"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace_with(provider.get_tracer("uma_engine.serve"))


def trace_with(tracer: Any) -> None:
    """Open spans with this tracer of OpenTelemetry's; None: no more."""
    global _tracer
    _tracer = tracer


@contextlib.contextmanager
def span(name: str, parent: str | None) -> Iterator[dict[str, Any]]:
    """A span, if spans are wanted; what is put into the dictionary becomes its attributes. `parent`: a W3C `traceparent` header."""
    fields: dict[str, Any] = {}
    if _tracer is None:
        yield fields
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
    with _tracer.start_as_current_span(name, context=context, kind=SpanKind.SERVER) as current:
        try:
            yield fields
        finally:
            for key, value in fields.items():
                if value is not None:
                    current.set_attribute(f"uma.{key}", value)
