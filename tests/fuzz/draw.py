"""The random choices of one case, and tensors placed among memory that nobody may read or write.

Knows sizes that kernels find awkward and how tensors lie; does not know any op.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from uma_kernels.testing import SENTINEL

T = TypeVar("T")
# What kernels cut their work into: sizes around the multiples of these are where edges are treated apart.
TILES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
MOST_MARGIN = 24  # elements around a placed tensor


class Draw:
    """Random numbers named by a seed and the number of a case; what was drawn is kept by name, for the line of a failure."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.drawn: dict[str, object] = {}
        torch.manual_seed(self.random.getrandbits(60))

    def size(self, name: str, low: int, high: int) -> int:
        """low .. high: in turns near the low end, around a multiple of a tile, and anywhere."""
        kind = self.random.random()
        if kind < 0.3:
            value = low + self.random.randrange(9)
        elif kind < 0.7:
            tile = self.random.choice(TILES)
            value = tile * self.random.randint(1, max(1, high // tile)) + self.random.choice((-1, 0, 1))
        else:
            value = self.random.randint(low, max(low, high))
        return self.keep(name, max(low, min(value, high)))

    def pick(self, name: str, options: Sequence[T]) -> T:
        return self.keep(name, self.random.choice(options))

    def flag(self, name: str, share: float = 0.5) -> bool:
        return self.keep(name, self.random.random() < share)

    def keep(self, name: str, value: T) -> T:
        self.drawn[name] = value
        return value

    def some_of(self, count: int) -> torch.Tensor:
        """Some of `count` rows [M] int64, in any order, some of them more than once; none of none."""
        most = self.random.randint(1, 2 * count) if count else 0
        return torch.tensor([self.random.randrange(count) for _ in range(min(most, 40))], dtype=torch.int64)

    def place(self, values: torch.Tensor, rows_apart: bool = False) -> torch.Tensor:
        """`values` in memory of their very size, or somewhere in the midst of NaN (the largest integer, True): what is read
        there shows in a result. `rows_apart`: rows along the first dimension may lie further apart than their length."""
        if self.random.random() < 0.5:
            return values.clone()
        if values.dtype is torch.bool:
            poison: float = True
        else:
            poison = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
        gap = self.random.choice((0, 1, 3, 8, 64)) if rows_apart else 0
        before = self.random.randrange(MOST_MARGIN)
        view = _rows(values.shape, gap, before, poison, values.dtype)
        view.copy_(values)
        return view

    @contextlib.contextmanager
    def out(self, shape: Sequence[int], rows_apart: bool = False) -> Iterator[torch.Tensor]:
        """An output of NaN among sentinels; leaving checks that nobody wrote beside it."""
        gap = self.random.choice((0, 0, 1, 3, 8, 64)) if rows_apart else 0
        view = _rows(shape, gap, self.random.randrange(MOST_MARGIN), SENTINEL, torch.float32)
        view.fill_(float("nan"))
        yield view
        memory = torch.empty(0).set_(view.untyped_storage())
        inside = torch.zeros(memory.shape, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert bool((memory[~inside] == SENTINEL).all()), "memory beside the output was written"


def _rows(shape: Sequence[int], gap: int, before: int, filling: float, dtype: torch.dtype) -> torch.Tensor:
    """A view [shape] of memory full of `filling`, its rows `gap` elements apart, `before` elements behind the beginning."""
    width = math.prod(shape[1:])
    memory = torch.full((before + shape[0] * (width + gap) + MOST_MARGIN,), filling, dtype=dtype)
    strides, inner = [width + gap], width
    for size in shape[1:]:
        inner = inner // size if size else 0
        strides.append(inner)
    return memory.as_strided(tuple(shape), strides, before)
