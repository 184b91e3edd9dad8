"""The schedule of attention on a GPU, against plain loops: every row once, every tile that a row may see, no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uma_kernels.attention.plan import PIECE_FIELDS, PROGRAM_FIELDS, Ints, schedule

BLOCK_Q, BLOCK_N = 8, 4


def step(prefixes: list[list[int]], leaves: list[tuple[int, int]]) -> tuple[Ints, Ints, Ints]:
    """Offsets and slots of chunks (which prefix lies above, own length); own tokens are rows of the step."""
    contexts, rows = [], 0
    for prefix, own in leaves:
        contexts.append([*prefixes[prefix], *(-row - 1 for row in range(rows, rows + own))])
        rows += own
    starts_q = np.cumsum([0, *(own for _, own in leaves)]).astype(np.int32)
    starts_k = np.cumsum([0, *map(len, contexts)]).astype(np.int32)
    return starts_q, starts_k, np.array([s for c in contexts for s in c], np.int32)


def walked(starts_q: Ints, starts_k: Ints, slots: Ints, window: int | None) -> tuple[dict[int, list[int]], int]:
    """For each query row the slots its program's tiles give it, in order; and the tiles of all programs."""
    programs, pieces, positions = schedule(starts_q, starts_k, slots, BLOCK_Q, BLOCK_N, window)
    seen: dict[int, list[int]] = {}
    tiles = 0
    for values in programs:
        p = dict(zip(PROGRAM_FIELDS, values.tolist(), strict=True))
        mine: list[list[int]] = [[] for _ in range(p["rows"])]
        numbered = [dict(zip(PIECE_FIELDS, x.tolist(), strict=True)) for x in pieces[p["piece_begin"] : p["piece_end"]]]
        full = {
            "context": p["context"], "tile_begin": p["full_begin"], "tile_end": p["full_end"],
            "keys": p["full_end"] * BLOCK_N, "row_begin": 0, "row_end": p["rows"],
        }  # fmt: skip
        for piece in (numbered[0], full, *numbered[1:]):
            tiles += piece["tile_end"] - piece["tile_begin"]
            for key in range(piece["tile_begin"] * BLOCK_N, min(piece["tile_end"] * BLOCK_N, piece["keys"])):
                for r in range(piece["row_begin"], piece["row_end"]):
                    at = positions[p["row"] + r]
                    visible = key <= at and (window is None or key > at - window)
                    assert visible or piece is not full, "a tile taken unmasked is not seen whole"
                    if visible:
                        mine[r].append(int(slots[piece["context"] + key]))
        for r, keys in enumerate(mine):
            assert p["row"] + r not in seen
            seen[p["row"] + r] = keys
    return seen, tiles


def expected(starts_q: Ints, starts_k: Ints, slots: Ints, window: int | None) -> dict[int, list[int]]:
    keys = {}
    for n in range(len(starts_q) - 1):
        context = slots[starts_k[n] : starts_k[n + 1]].tolist()
        for row in range(starts_q[n], starts_q[n + 1]):
            end = len(context) - int(starts_q[n + 1]) + row + 1
            keys[row] = context[max(0, end - window) if window else 0 : end]
    return keys


leaf = st.tuples(st.integers(0, 2), st.one_of(st.integers(0, 3), st.integers(0, 30)))


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*(st.integers(0, 25),) * 3),
    st.booleans(),
    st.lists(leaf, max_size=12),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_every_row_sees_its_keys_in_order_and_once(
    lengths: tuple[int, ...], common: bool, leaves: list[tuple[int, int]], window: int | None
) -> None:
    # with `common` the prefixes begin alike: a tree of three levels
    prefixes = [[s if common and s < 9 else 100 * n + s for s in range(length)] for n, length in enumerate(lengths)]
    parts = step(prefixes, leaves)
    seen, _ = walked(*parts, window)
    assert seen == expected(*parts, window)


@pytest.mark.parametrize(("leaves", "own"), [(5, 1), (12, 2), (1, 3), (3, 20)])
def test_masked_tiles_cost_nothing_and_short_siblings_share_their_ancestors(leaves: int, own: int) -> None:
    parts = step([list(range(64))], [(0, own)] * leaves)
    _, tiles = walked(*parts, None)
    apart = leaves * sum(16 + -(-min(own, end) // BLOCK_N) for end in range(BLOCK_Q, own + BLOCK_Q, BLOCK_Q))
    together = -(-leaves // (BLOCK_Q // own)) * 16 + leaves if own <= BLOCK_Q // 2 else apart
    assert tiles == together


def test_nothing_to_do_is_a_plan_without_programs() -> None:
    programs, pieces, positions = schedule(*step([[1, 2]], []), BLOCK_Q, BLOCK_N, None)
    assert len(programs) == len(pieces) == len(positions) == 0
