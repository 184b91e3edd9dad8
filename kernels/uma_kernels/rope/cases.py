"""Shapes of the rotary embedding that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeCase:
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def id(self) -> str:
        return f"T{self.tokens}-H{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}"

    @property
    def bytes(self) -> int:
        return 2 * 4 * self.tokens * (self.heads + self.kv_heads) * self.head_dim

    @property
    def flops(self) -> int:
        return 3 * self.tokens * (self.heads + self.kv_heads) * self.head_dim


CASES = [
    RopeCase(*s)
    for s in ((0, 2, 1, 8), (1, 1, 1, 2), (3, 2, 1, 6), (1, 9, 3, 64), (5, 4, 4, 80), (2, 4, 1, 256), (450, 9, 3, 64))
]
