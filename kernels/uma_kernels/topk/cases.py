"""Shapes of `topk` and `maxsim` that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TopkCase:
    queries: int
    rows: int
    width: int
    k: int

    @property
    def id(self) -> str:
        return f"Q{self.queries}-N{self.rows}-D{self.width}-k{self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.queries * self.rows * self.width


@dataclass(frozen=True)
class MaxsimCase:
    query_tokens: tuple[int, ...]
    doc_tokens: tuple[int, ...]
    width: int

    @property
    def id(self) -> str:
        return f"Q{len(self.query_tokens)}x{sum(self.query_tokens)}-D{len(self.doc_tokens)}x{sum(self.doc_tokens)}-W{self.width}"


CASES = [
    TopkCase(*shape)
    for shape in (
        (0, 5, 8, 1),
        (1, 0, 8, 3),
        (1, 1, 1, 1),
        (1, 5, 7, 9),
        (2, 31, 16, 31),
        (3, 129, 65, 10),
        (4, 257, 100, 257),
        (7, 1000, 33, 40),
        (5, 300, 384, 17),
    )
]
LARGE_CASES = [
    TopkCase(*shape) for shape in ((1, 20011, 48, 1000), (100, 3001, 96, 50), (33, 5000, 600, 129), (2, 9001, 24, 4096))
]

MAXSIM_CASES = [
    MaxsimCase((), (3,), 4),
    MaxsimCase((2,), (), 4),
    MaxsimCase((1,), (1,), 1),
    MaxsimCase((3, 0, 5), (2, 0, 7, 1), 9),
    MaxsimCase((17, 1), (33, 64, 5), 33),
    MaxsimCase((32,), (20, 181, 64, 65), 128),
]
