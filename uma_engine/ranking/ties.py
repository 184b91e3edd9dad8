"""Order and ties: who comes where, and whose difference says nothing.

Knows scores and ids; does not know where they come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Place", "arrange", "lot"]


@dataclass(frozen=True, slots=True)
class Place:
    """Candidate `index` shares `place` (1 for the best) with `tied_with` others; `group` numbers ties and singles from 0."""

    index: int
    place: int
    tied_with: int
    group: int


def lot(seed: str, candidate_id: str) -> bytes:
    """A draw that is the same for the same question and candidate, and knows nothing else about them."""
    return hashlib.blake2b(
        f"{len(seed)}:{seed}{candidate_id}".encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


def arrange(scores: Sequence[float], resolution: float, draws: Sequence[bytes] | None = None) -> list[Place]:
    """Everybody in order, best first.

    A tie begins at the best who is left and holds everybody whose score is the same or less than `resolution` below: ties do not
    chain, so nobody is tied with somebody further off than that. Within a tie the smaller of `draws` comes first, then the
    smaller index; without draws the index alone decides.
    """
    by_score = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ordered: list[Place] = []
    group = 0
    while len(ordered) < len(by_score):
        start = end = len(ordered)
        best = scores[by_score[start]]
        while end < len(by_score) and (scores[by_score[end]] == best or best - scores[by_score[end]] < resolution):
            end += 1
        tie = by_score[start:end]
        tie.sort(key=lambda i: (draws[i] if draws is not None else b"", i))
        ordered += [Place(i, start + 1, len(tie) - 1, group) for i in tie]
        group += 1
    return ordered
