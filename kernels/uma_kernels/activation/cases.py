"""Shapes of the gated activations that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationCase:
    tokens: int
    width: int

    @property
    def id(self) -> str:
        return f"T{self.tokens}-N{self.width}"

    @property
    def bytes(self) -> int:
        return 3 * 4 * self.tokens * self.width


CASES = [
    ActivationCase(*s)
    for s in ((0, 8), (1, 1), (1, 7), (3, 17), (5, 33), (2, 8193), (0, 0), (3, 0), (16, 1536), (512, 1536))
]
