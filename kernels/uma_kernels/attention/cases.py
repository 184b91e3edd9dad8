"""Trees of segments and paged sequences that tests and benches share, with their tensors: awkward ones first.

Knows how a tree becomes slots and offsets; does not know any back end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from uma_kernels.attention import AttentionBatch


@dataclass(frozen=True)
class Segment:
    """`length` tokens below segment `parent` (None: a root); `cached`: in the cache, without queries in this step."""

    parent: int | None
    length: int
    cached: bool = False


@dataclass(frozen=True)
class TreeCase:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    segments: tuple[Segment, ...]
    window: int | None = None

    @property
    def id(self) -> str:
        window = f"-W{self.window}" if self.window else ""
        return f"{self.name}-H{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}{window}"

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Token numbers of each segment: tokens are numbered in the order of the segments."""
        starts = [sum(s.length for s in self.segments[:n]) for n in range(len(self.segments))]
        return [list(range(start, start + s.length)) for start, s in zip(starts, self.segments, strict=True)]

    @property
    def num_tokens(self) -> int:
        return sum(s.length for s in self.segments)

    def path(self, n: int) -> list[int]:
        """Token numbers from the root to the end of segment n."""
        parent = self.segments[n].parent
        return ([] if parent is None else self.path(parent)) + self.tokens[n]

    @property
    def pairs(self) -> int:
        """Query-key pairs that the mask admits, for one head."""
        total = 0
        for n, segment in enumerate(self.segments):
            if not segment.cached:
                end = len(self.path(n))
                total += sum(min(p + 1, self.window or p + 1) for p in range(end - segment.length, end))
        return total

    @property
    def flops(self) -> int:
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Queries and results once, the keys and values of each chunk's path once."""
        asked = [n for n, s in enumerate(self.segments) if not s.cached]
        queries = sum(self.segments[n].length for n in asked) * self.heads
        keys = sum(len(self.path(n)) for n in asked) * self.kv_heads
        return 2 * 4 * self.head_dim * (queries + keys)


@dataclass(frozen=True)
class TreeInputs:
    """What tree_attention takes, and `rows`: the token number of each query row."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: AttentionBatch
    rows: torch.Tensor


def tree_tokens(case: TreeCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q [tokens, H, D], k and v [tokens, Hkv, D] for every token of the tree, cached or not."""
    q = torch.randn(case.num_tokens, case.heads, case.head_dim)
    k, v = torch.randn(2, case.num_tokens, case.kv_heads, case.head_dim)
    return q, k, v


def tree_inputs(case: TreeCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spare_slots: int = 7) -> TreeInputs:
    """One step over the tree: cached tokens in shuffled slots among NaN ones, the others as rows of the step."""
    cached = [t for s, tokens in zip(case.segments, case.tokens, strict=True) if s.cached for t in tokens]
    asked = [n for n, s in enumerate(case.segments) if not s.cached]
    rows = [t for n in asked for t in case.tokens[n]]
    order = torch.randperm(len(cached) + spare_slots)[: len(cached)]
    slot = dict(zip(cached, order.tolist(), strict=True)) | {t: -row - 1 for row, t in enumerate(rows)}
    k_cache, v_cache = torch.full((2, len(cached) + spare_slots, *k.shape[1:]), float("nan"), dtype=k.dtype)
    k_cache[order], v_cache[order] = k[cached], v[cached]
    paths = [case.path(n) for n in asked]
    batch = AttentionBatch(
        _offsets([case.segments[n].length for n in asked]),
        torch.tensor([slot[t] for path in paths for t in path], dtype=torch.int32),
        _offsets([len(path) for path in paths]),
    )
    index = torch.tensor(rows, dtype=torch.int64)
    return TreeInputs(q[index], k[index], v[index], k_cache, v_cache, batch, index)


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _chain(*lengths: int, cached: int = 0) -> tuple[Segment, ...]:
    """Segments each below the one before; the first `cached` of them lie in the cache."""
    return tuple(Segment(n - 1 if n else None, length, n < cached) for n, length in enumerate(lengths))


def _leaves(prefix: int, count: int, length: int, cached: bool = True) -> tuple[Segment, ...]:
    return (Segment(None, prefix, cached), *(Segment(0, length) for _ in range(count)))


# instruction (cached) -> job (this step) -> two candidates, one of them with two probes; and another request
_REQUEST = (
    Segment(None, 70, True), Segment(0, 61), Segment(1, 17), Segment(1, 65), Segment(3, 3), Segment(3, 1),
    Segment(None, 40, True), Segment(6, 30),
)  # fmt: skip

TREE_CASES = [
    TreeCase("empty", 2, 1, 8, ()),
    TreeCase("all_cached", 2, 1, 8, (Segment(None, 5, True),)),
    TreeCase("one_token", 1, 1, 8, _chain(1)),
    TreeCase("empty_chunk", 3, 1, 16, (Segment(None, 3), Segment(0, 0), Segment(0, 2))),
    *(TreeCase(f"alone{n}", 3, 1, 16, _chain(n)) for n in (2, 17, 64, 65, 129)),
    *(TreeCase(f"behind{n}", 4, 1, 64, _chain(n, 17, cached=1)) for n in (1, 63, 64, 65, 129, 300)),
    *(TreeCase("groups", 8, 8 // g, 16, _leaves(63, 2, 9)) for g in (1, 4, 8)),
    *(TreeCase("dims", 3, 1, d, _leaves(60, 3, 7)) for d in (8, 24, 64, 80, 96, 128, 256)),
    *(TreeCase("window", 3, 1, 16, _REQUEST, w) for w in (1, 5, 64, 100)),
    *(TreeCase("request", h, hkv, d, _REQUEST) for h, hkv, d in ((9, 3, 64), (2, 2, 80), (16, 1, 8))),
]
# Short leaves below a prefix of more than a tile, of one request or of two in turns: GPU programs may hold several of them.
_TWINS = (
    Segment(None, 130, True), Segment(None, 70, True), Segment(0, 2), Segment(0, 1), Segment(1, 1), Segment(1, 3),
    Segment(0, 1), Segment(3, 1), Segment(3, 2),
)  # fmt: skip
TREE_CASES += [
    *(TreeCase("short_leaves", 4, 2, 16, _leaves(200, 9, 3), w) for w in (None, 3, 100)),
    TreeCase("short_leaves_of_this_step", 4, 2, 16, _leaves(150, 5, 1, cached=False)),
    *(TreeCase("twins", 4, 2, 16, _TWINS, w) for w in (None, 70)),
]
HALF_CASES = [
    TreeCase("half", 4, 2, 64, _chain(130, 70, cached=1)),
    TreeCase("half_wide", 2, 2, 128, _leaves(70, 2, 9)),
    TreeCase("half_short", 6, 2, 80, _leaves(130, 5, 2), 100),
]


@dataclass(frozen=True)
class PagedCase:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    window: int | None = None

    @property
    def id(self) -> str:
        window = f"-W{self.window}" if self.window else ""
        return f"{self.name}-H{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}-block{self.block_size}{window}"

    @property
    def seen(self) -> int:
        return sum(min(n, self.window or n) for n in self.context_lens)

    @property
    def flops(self) -> int:
        return 4 * self.seen * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        return 2 * 4 * self.head_dim * (self.seen * self.kv_heads + len(self.context_lens) * self.heads)


PAGED_CASES = [
    PagedCase("empty", 2, 1, 8, 16, ()),
    PagedCase("one_token", 2, 1, 8, 16, (1,)),
    PagedCase("lengths", 3, 1, 16, 16, (1, 15, 16, 17, 63, 64, 65, 129, 300)),
    PagedCase("block1", 4, 4, 80, 1, (1, 65)),
    PagedCase("block5", 8, 1, 24, 5, (4, 5, 6, 130)),
    *(PagedCase("window", 4, 1, 16, 16, (1, 64, 65, 300), w) for w in (1, 5, 64, 100)),
    PagedCase("decode16x450", 9, 3, 64, 16, (450,) * 16),
]
