"""Shapes and settings of sampling that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingCase:
    name: str
    rows: int
    vocab: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.name}-B{self.rows}-V{self.vocab}"

    @property
    def bytes(self) -> int:
        return 4 * self.rows * self.vocab


CASES = [
    SamplingCase("no_rows", 0, 5),
    SamplingCase("one_token", 1, 1),
    SamplingCase("plain", 3, 17),
    SamplingCase("greedy", 3, 257, temperature=0.0),
    SamplingCase("top_k", 4, 1000, 0.8, top_k=7),
    SamplingCase("top_k_beyond_vocab", 2, 33, 0.8, top_k=100),
    SamplingCase("top_p", 4, 1000, 0.7, top_p=0.9),
    SamplingCase("min_p", 4, 1000, 1.3, min_p=0.05),
    SamplingCase("all", 4, 4099, 1.1, top_k=200, top_p=0.95, min_p=0.01),
    SamplingCase("greedy", 8, 49152, temperature=0.0),
    SamplingCase("plain", 8, 49152),
    SamplingCase("top_k", 8, 49152, 0.8, top_k=50),
    SamplingCase("top_p", 8, 49152, 0.8, top_p=0.95),
]
