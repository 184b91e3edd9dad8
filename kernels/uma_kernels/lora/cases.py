"""Batches with mixed adapters that tests and benches share: awkward ones first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraCase:
    """`ranks[a]` is the rank of the adapter in slot a, 0 for an empty slot; rows take the slots and -1 in turn."""

    tokens: int
    width: int
    rows: int
    ranks: tuple[int, ...]
    stride: int = 1

    @property
    def id(self) -> str:
        ranks = "_".join(map(str, self.ranks)) or "none"
        return f"T{self.tokens}-K{self.width}-N{self.rows}-r{ranks}" + (f"-s{self.stride}" if self.stride != 1 else "")

    @property
    def token_lora_mapping(self) -> list[int]:
        return [t * self.stride % (len(self.ranks) + 1) - 1 for t in range(self.tokens)]

    @property
    def flops(self) -> int:
        return sum(2 * self.ranks[a] * (self.width + self.rows) for a in self.token_lora_mapping if a >= 0)


CASES = [
    LoraCase(*shape)
    for shape in (
        (0, 32, 5, (4,)),
        (3, 7, 5, ()),
        (1, 1, 1, (1,), 2),
        (2, 7, 33, (3,)),
        (5, 33, 31, (1, 16), 5),
        (17, 96, 65, (0, 8)),
        (40, 64, 32, (1, 3, 8, 16, 64, 256)),
        (129, 70, 97, (17, 33, 0, 48), 3),
        (64, 576, 192, (8, 16)),
        (1, 576, 1536, (64,), 2),
    )
]

BENCH_CASES = [
    LoraCase(tokens, width, rows, ranks)
    for tokens in (512, 8)
    for width, rows in ((576, 1536), (1536, 576))
    for ranks in ((16,) * 8, (4, 8, 16, 64))
]
