"""The engine over HTTP: shapes of requests and answers, keys, limits and metrics.

Knows HTTP and JSON; does not know how anything is computed.
"""

from __future__ import annotations

from uma_engine.serve.app import make_app
from uma_engine.serve.settings import ServeSettings

__all__ = ["ServeSettings", "make_app"]
