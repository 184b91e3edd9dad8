"""Shapes of the norms that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormCase:
    tokens: int
    width: int

    @property
    def id(self) -> str:
        return f"T{self.tokens}-K{self.width}"

    @property
    def bytes(self) -> int:
        return 2 * 4 * self.tokens * self.width

    @property
    def flops(self) -> int:
        return 4 * self.tokens * self.width


CASES = [
    NormCase(*s)
    for s in ((0, 8), (1, 1), (1, 7), (3, 17), (2, 64), (5, 65), (4, 129), (1, 576), (3, 8193), (33, 640), (512, 576))
]
