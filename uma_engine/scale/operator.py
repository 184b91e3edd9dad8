"""What all engines of a cluster should answer with, and whose turn it is to change: one at a time.

Knows stacks as data and engines by name; does not know Ray or how an engine changes. It is asked every half second by each engine, so it
forgets nothing that it cannot be told again: after a restart it knows no stack until the entry tells it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["Operator"]

SEEN_S = 6.0  # an engine that has not asked for so long is gone


class Operator:
    """The single owner of a cluster's stack."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stack: dict[str, Any] | None = None
        self._number = 0
        self._engines: dict[str, dict[str, Any]] = {}
        self._turn: str | None = None
        self._failed: str | None = None

    def change(self, stack: dict[str, Any]) -> int:
        """From now on this is what engines should answer with; its number."""
        self._stack, self._failed, self._turn = stack, None, None
        self._number = max(self._number + 1, time.time_ns())  # also after a restart none that was there before
        return self._number

    def ask(self, engine: str, number: int, about: dict[str, Any]) -> tuple[int, dict[str, Any] | None, bool]:
        """An engine that answers with stack `number` says so and what it is; the current number and stack, and whether it may change."""
        now = self._clock()
        self._engines[engine] = {"number": number, "seen": now, **about}
        for name in [n for n, e in self._engines.items() if now - e["seen"] > SEEN_S]:
            del self._engines[name]
        if self._turn is not None and (self._turn not in self._engines or self._done(self._turn)):
            self._turn = None
        may = False
        if self._stack is not None and number != self._number and self._failed is None:
            if number == 0:
                return self._number, self._stack, True  # it begins: nobody waits for it
            if self._turn is None:
                self._turn = engine
            may = self._turn == engine
        return self._number, self._stack, may

    def failed(self, engine: str, number: int, why: str) -> None:
        """A change that failed on one engine is tried on no other."""
        if number == self._number:
            self._failed, self._turn = f"{engine}: {why}", None

    def status(self) -> dict[str, Any]:
        now = self._clock()
        engines = {
            name: {k: v for k, v in e.items() if k != "seen"}
            for name, e in self._engines.items()
            if now - e["seen"] <= SEEN_S
        }
        return {"number": self._number, "stack": self._stack, "failed": self._failed, "engines": engines}

    def _done(self, engine: str) -> bool:
        return bool(self._engines[engine]["number"] == self._number)
