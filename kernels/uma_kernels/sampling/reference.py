"""Sampling in plain torch, row by row with full sorts: the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from uma_kernels.sampling import SamplingBatch, TokenCounts

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) of (seed, step): SplitMix64's mixing (Steele, Lea and Flood 2014), 53 bits."""
    bits = _mix((_mix(seed & _MASK64) + _GOLDEN * (step + 1)) & _MASK64)
    return (bits >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_counts: Sequence[TokenCounts | None] | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    for row in range(logits.shape[0]):
        counts = token_counts[row] if token_counts is not None else None
        out[row] = _sample_row(logits[row], batch, row, counts, mask[row] if mask is not None else None)


def _sample_row(
    logits: torch.Tensor, batch: SamplingBatch, row: int, counts: TokenCounts | None, mask: torch.Tensor | None
) -> int:
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise ValueError(f"`logits[{row}]` holds a NaN or +inf")
    scores = logits.clone() if mask is None else logits.masked_fill(~mask, float("-inf"))
    if counts is not None:
        _penalise(scores, batch, row, *counts)
    largest = scores.max() if scores.numel() else torch.tensor(float("-inf"))
    if bool(largest.isneginf()):
        raise ValueError(f"`logits[{row}]` has no token left: all are masked or -inf")
    temperature = batch.temperature[row]
    if temperature == 0:
        return int((scores == largest).nonzero()[0, 0])

    distance = (scores - largest) / temperature
    order = distance.sort(descending=True, stable=True).indices  # of equals the lowest index first
    top_k = int(batch.top_k[row])
    if top_k > 0:
        order = order[:top_k]
    weights = distance[order].exp().double()
    if batch.top_p[row] < 1:
        before = weights.cumsum(0) - weights
        weights, order = (x[before < batch.top_p[row].double() * weights.sum()] for x in (weights, order))
    enough = weights >= batch.min_p[row]
    order, by_index = order[enough].sort()
    cumulative = weights[enough][by_index].cumsum(0)
    target = uniform(int(batch.seeds[row]), int(batch.steps[row])) * cumulative[-1]
    drawn = int((cumulative <= target).sum())
    return int(order[min(drawn, order.numel() - 1)])  # rounding may leave the whole sum at the target


def _penalise(scores: torch.Tensor, batch: SamplingBatch, row: int, ids: torch.Tensor, counts: torch.Tensor) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= scores.numel()):
        raise IndexError(f"`token_counts[{row}]` names ids outside 0 .. {scores.numel() - 1}")
    seen, repetition = scores[ids], batch.repetition_penalty[row]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= batch.frequency_penalty[row] * counts + batch.presence_penalty[row] * (counts > 0)
    scores[ids] = seen
