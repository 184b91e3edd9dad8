"""Counters of a server in Prometheus' text format, under vLLM's names where it has them.

Knows numbers and labels; does not know requests. The format is three lines a number: no library is needed to write it.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uma_engine.serve.admission import Admission
    from uma_engine.serve.generations import Generations
    from uma_engine.tasks.results import Usage

__all__ = ["Metrics"]

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What happened since the server began. Any thread may count."""

    def __init__(self, generations: Generations, admission: Admission) -> None:
        self._generations = generations
        self._admission = admission
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, list[float]] = {}  # of each path: counts by bucket, then sum and count
        self._tokens: Counter[str] = Counter()

    def done(self, path: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        with self._lock:
            self._requests[path, status] += 1
            row = self._seconds.setdefault(path, [0.0] * (len(BUCKETS) + 2))
            for i, most in enumerate(BUCKETS):
                row[i] += seconds <= most
            row[-2] += seconds
            row[-1] += 1

    def used(self, usage: Usage) -> None:
        """What an answer cost."""
        with self._lock:
            self._tokens["prompt"] += usage.prompt_tokens
            self._tokens["computed"] += usage.computed_tokens
            self._tokens["cached"] += usage.cached_tokens
            self._tokens["generation"] += usage.output_tokens

    def render(self) -> str:
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, values: list[tuple[str, float]]) -> None:
            lines.append(f"# HELP {name} {text}")
            lines.append(f"# TYPE {name} {kind}")
            lines.extend(f"{name}{labels} {value:g}" for labels, value in values)

        counters = self._generations.current.engine.counters()
        for name, text in (
            ("num_requests_running", "Requests that have begun."),
            ("num_requests_waiting", "Requests that have not begun."),
            ("kv_cache_usage_perc", "Share of the KV blocks in use."),
        ):
            metric(f"uma:{name}", "gauge", text, [("", counters[name])])
        for name, kind, text in (
            ("num_adapters", "gauge", "Adapters in slots."),
            ("adapter_misses", "counter", "Requests whose adapter had to be loaded."),
            ("adapter_evictions", "counter", "Idle adapters that made room."),
            ("num_steps", "counter", "Steps of the engine."),
        ):
            metric(f"uma:{name}{'_total' if kind == 'counter' else ''}", kind, text, [("", counters[name])])
        door = self._admission
        metric(
            "uma:num_requests_queued", "gauge", "Requests that wait for their tenant's turn.", [("", door.num_waiting)]
        )
        metric("uma:fairness_lag_tokens", "gauge", "Between the most and the least served who wait.", [("", door.lag)])
        metric("uma:requests_refused_total", "counter", "Requests told to come back later.", [("", door.refused)])
        metric("uma:drain_tokens_per_second", "gauge", "What Retry-After is computed from.", [("", door.rate() or 0.0)])
        current = self._generations.current
        labels = f'{{model="{current.engine.model}",digest="{current.engine.stack_info().base_digest[:12]}"}}'
        metric("uma:generation", "gauge", "The base that answers.", [(labels, current.number)])
        metric("uma:swaps_total", "counter", "Swaps and rollbacks.", [("", self._generations.num_swaps)])
        with self._lock:
            metric(
                "uma:request_total",
                "counter",
                "Requests by path and status.",
                [(f'{{path="{p}",status="{s}"}}', n) for (p, s), n in sorted(self._requests.items())],
            )
            for kind in ("prompt", "computed", "cached", "generation"):
                metric(f"uma:{kind}_tokens_total", "counter", f"Tokens: {kind}.", [("", self._tokens[kind])])
            values = []
            for path, row in sorted(self._seconds.items()):
                for most, count in zip(BUCKETS, row, strict=False):
                    values.append((f'_bucket{{path="{path}",le="{most:g}"}}', count))
                values.append((f'_bucket{{path="{path}",le="+Inf"}}', row[-1]))
                values += [(f'_sum{{path="{path}"}}', row[-2]), (f'_count{{path="{path}"}}', row[-1])]
            metric("uma:e2e_request_latency_seconds", "histogram", "From the request's head to its answer.", values)
        return "\n".join(lines) + "\n"
