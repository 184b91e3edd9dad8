"""Shapes of the cache moves that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KvCacheCase:
    tokens: int
    slots: int
    kv_heads: int
    head_dim: int

    @property
    def id(self) -> str:
        return f"T{self.tokens}-S{self.slots}-Hkv{self.kv_heads}-D{self.head_dim}"

    @property
    def bytes(self) -> int:
        return 2 * 2 * 4 * self.tokens * self.kv_heads * self.head_dim


CASES = [KvCacheCase(*s) for s in ((0, 3, 1, 8), (1, 1, 1, 1), (3, 7, 2, 5), (17, 40, 3, 64), (513, 2048, 3, 64))]
