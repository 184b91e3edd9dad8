"""Shapes of the label head that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelHeadCase:
    tokens: int
    width: int
    vocabulary: int
    rows: int  # at which logits are wanted
    labels: int

    @property
    def id(self) -> str:
        return f"T{self.tokens}-K{self.width}-V{self.vocabulary}-R{self.rows}-L{self.labels}"


CASES = [
    LabelHeadCase(*shape)
    for shape in (
        (4, 32, 5, 0, 2),
        (4, 32, 5, 3, 0),
        (1, 32, 1, 1, 1),
        (9, 96, 33, 5, 2),
        (64, 576, 100, 33, 3),
        (20, 96, 70, 17, 65),
    )
]
