"""Drawing the next token on a GPU: one program a row, several passes over logits that stay in the L2 cache.

Knows logits and the parameters of a row; does not know requests. What top_k and top_p keep is the front of the order (score
down, index up): a bisection over the bits of the distance to the largest score finds where it ends, with no sort.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase

if TYPE_CHECKING:
    from uma_kernels.sampling import SamplingBatch, TokenCounts

NOT_FINITE, NOTHING_LEFT = -1, -2  # in place of a token
BLOCK = 8192
LEAST = 32  # Triton's scan fails on a block of one


@triton.jit
def penalise_kernel(scores, rows, ids, counts, repetition, presence, frequency, V, seen, BLOCK: tl.constexpr):
    """Each of `seen` entries changes one score of its row; an id out of range changes nothing."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < seen
    row, token, count = tl.load(rows + offs, keep, 0), tl.load(ids + offs, keep, -1), tl.load(counts + offs, keep, 0)
    keep = keep & (token >= 0) & (token < V)
    at = scores + row * V + token
    score, factor = tl.load(at, keep, 0.0), tl.load(repetition + row, keep, 1.0)
    score = tl.where(score > 0, tl.div_rn(score, factor), score * factor)
    number = count.to(tl.float32)
    charge = tl.load(frequency + row, keep, 0.0) * number + tl.load(presence + row, keep, 0.0) * (number > 0).to(
        tl.float32
    )
    tl.store(at, score - charge, keep)


@triton.jit
def _distances(scores, mask, offs, V, largest, temperature, MASKED: tl.constexpr):
    """(score - largest) / temperature, -inf where there is no token: the same bits in every pass."""
    keep = offs < V
    if MASKED:
        keep = keep & (tl.load(mask + offs, keep, 0) != 0)
    values = tl.load(scores + offs, keep, float("-inf"))
    return tl.where(keep, tl.div_rn(values - largest, temperature), float("-inf"))


@triton.jit
def _keys(distances):
    """The bits of |distance|: 0 for the largest score, more for each smaller one, those of infinity for no token."""
    return tl.abs(distances).to(tl.int32, bitcast=True)


@triton.jit
def _front(scores, mask, V, largest, temperature, last, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens have a key of at most `last`, and what they weigh. Threads meet once, at the end."""
    number = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, V, BLOCK):
        distances = _distances(scores, mask, first + tl.arange(0, BLOCK), V, largest, temperature, MASKED)
        inside = (_keys(distances) <= last) & (first + tl.arange(0, BLOCK) < V)
        number += inside.to(tl.int32)
        weight += tl.where(inside, tl.exp(distances), 0.0).to(tl.float64)
    return tl.sum(number, 0), tl.sum(weight, 0)


@triton.jit
def _mix(x):  # SplitMix64 (Steele, Lea and Flood 2014)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, step):
    """The number in [0, 1) of (seed, step): 53 bits."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    bits = _mix(_mix(seed.to(tl.uint64)) + golden * (step.to(tl.uint64) + tl.full((), 1, tl.uint64)))
    return (bits >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def sample_kernel(
    logits, mask, out, temperatures, top_ks, top_ps, min_ps, seeds, steps, V, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    if MASKED:
        mask += row * V
    temperature = tl.load(temperatures + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)  # of the first of each lane's largest
    odd = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        values = tl.load(logits + offs, offs < V, float("-inf"))
        odd |= ((values != values) | (values == float("inf"))).to(tl.int32)
        if MASKED:
            values = tl.where((offs < V) & (tl.load(mask + offs, offs < V, 0) != 0), values, float("-inf"))
        place = tl.where(values > best, offs, place)
        best = tl.where(values > best, values, best)
    largest = tl.max(best, 0)
    bad = tl.max(odd, 0)
    token = tl.full((), -1, tl.int64)
    if bad == 0:
        token -= 1
        if largest > float("-inf"):
            if temperature == 0.0:
                token = tl.min(tl.where(best == largest, place, V), 0).to(tl.int64)
            else:
                top_k = tl.load(top_ks + row)
                top_p = tl.load(top_ps + row)
                least = tl.load(min_ps + row)
                top_k = tl.where((top_k <= 0) | (top_k > V), V, top_k)
                cut = tl.full((), 0x7F800000, tl.int32)  # the last key that stays
                ties = top_k  # how many of those with that key stay: the first ones
                if top_k < V:
                    cut, before, _ = _bisect(logits, mask, V, largest, temperature, cut, top_k, 0.0, MASKED, BLOCK)
                    ties = top_k - before
                if top_p < 1.0:
                    whole = _whole(logits, mask, V, largest, temperature, cut, ties, MASKED, BLOCK)
                    target = top_p.to(tl.float64) * whole
                    end, _, before_weight = _bisect(
                        logits, mask, V, largest, temperature, cut, 0, target, MASKED, BLOCK
                    )
                    each = tl.exp(-end.to(tl.float32, bitcast=True)).to(tl.float64)
                    wanted = tl.where(each > 0.0, tl.ceil((target - before_weight) / each), 1.0)
                    wanted = tl.maximum(tl.minimum(wanted, V * 1.0), 1.0).to(tl.int32)
                    ties = tl.where(end == cut, tl.minimum(ties, wanted), wanted)
                    cut = end
                token = _draw(
                    logits, mask, V, largest, temperature, cut, ties, least, tl.load(seeds + row),
                    tl.load(steps + row), MASKED, BLOCK,
                )  # fmt: skip
    tl.store(out + row, token)


@triton.jit
def _bisect(scores, mask, V, largest, temperature, high, number, weight, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The least key, or one beyond it and before the next, up to which the front holds `number` tokens and weighs `weight`;
    and how many lie before it, and their weight. `high` is taken to suffice."""
    low = tl.full((), -1, tl.int32)
    number_low = tl.zeros((), tl.int32)
    number_high = V + number_low
    weight_low = tl.zeros((), tl.float64)
    while (high - low > 1) & (number_high - number_low > 1):
        middle = low + (high - low) // 2
        n, w = _front(scores, mask, V, largest, temperature, middle, MASKED, BLOCK)
        enough = (n >= number) & (w >= weight)
        high = tl.where(enough, middle, high)
        number_high = tl.where(enough, n, number_high)
        low = tl.where(enough, low, middle)
        number_low = tl.where(enough, number_low, n)
        weight_low = tl.where(enough, weight_low, w)
    return high, number_low, weight_low


@triton.jit
def _whole(scores, mask, V, largest, temperature, cut, ties, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of what stays."""
    before, above = _front(scores, mask, V, largest, temperature, cut - 1, MASKED, BLOCK)
    number, _ = _front(scores, mask, V, largest, temperature, cut, MASKED, BLOCK)
    each = tl.exp(-cut.to(tl.float32, bitcast=True)).to(tl.float64)
    return above + each * tl.minimum(ties, number - before).to(tl.float64)


@triton.jit
def _kept(
    scores, mask, V, first, largest, temperature, cut, ties, seen, least, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """The weights of a block in fp64, 0 for what is cut; and how many ties there were up to its end."""
    distances = _distances(scores, mask, first + tl.arange(0, BLOCK), V, largest, temperature, MASKED)
    keys = _keys(distances)
    tied = (keys == cut).to(tl.int32)
    rank = seen + tl.cumsum(tied, 0) - tied
    weights = tl.exp(distances)
    stays = ((keys < cut) | ((tied == 1) & (rank < ties))) & (weights >= least)
    return tl.where(stays, weights, 0.0).to(tl.float64), seen + tl.sum(tied, 0)


@triton.jit
def _draw(
    scores, mask, V, largest, temperature, cut, ties, least, seed, step, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first token, in index order, at which the cumulative weight exceeds u times the whole."""
    whole = tl.zeros((), tl.float64)
    seen = tl.zeros((), tl.int32)
    for first in range(0, V, BLOCK):
        weights, seen = _kept(scores, mask, V, first, largest, temperature, cut, ties, seen, least, MASKED, BLOCK)
        whole += tl.sum(weights, 0)
    target = _uniform(seed, step) * whole
    sum_before = tl.zeros((), tl.float64)
    seen = tl.zeros((), tl.int32)
    last = tl.full((), 0, tl.int64)  # rounding may leave the whole sum at the target: the last token with a weight
    token = tl.full((), -1, tl.int64)
    for first in range(0, V, BLOCK):
        weights, seen = _kept(scores, mask, V, first, largest, temperature, cut, ties, seen, least, MASKED, BLOCK)
        offs = (first + tl.arange(0, BLOCK)).to(tl.int64)
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, offs, 0), 0))
        here = (sum_before + tl.cumsum(weights, 0) > target) & (weights > 0.0)
        found = tl.min(tl.where(here, offs, V), 0)
        token = tl.where((token < 0) & (found < V), found, token)
        sum_before += tl.sum(weights, 0)
    return tl.where(token < 0, last, token)


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_counts: Sequence[TokenCounts | None] | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, vocabulary = logits.shape
    if not rows:
        return
    entries = [(row, entry) for row, entry in enumerate(token_counts or ()) if entry is not None and entry[0].numel()]
    if entries:
        logits = logits.clone()
        ids, counts = (torch.cat([entry[i] for _, entry in entries]) for i in (0, 1))
        lengths = torch.tensor([entry[0].numel() for _, entry in entries], device=ids.device)
        of_row = torch.tensor([row for row, _ in entries], device=ids.device).repeat_interleave(lengths)
        penalise_kernel[(triton.cdiv(ids.numel(), 256),)](
            logits, of_row, ids, counts, batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty,
            vocabulary, ids.numel(), BLOCK=256,
        )  # fmt: skip
    sample_kernel[(rows,)](
        logits, mask, out, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.steps,
        vocabulary, MASKED=mask is not None, BLOCK=min(BLOCK, max(LEAST, triton.next_power_of_2(vocabulary))), num_warps=16,
    )  # fmt: skip


_PENALTIES = {
    "scores": "*fp32", "rows": "*i64", "ids": "*i64", "counts": "*i32", "repetition": "*fp32", "presence": "*fp32",
    "frequency": "*fp32", "V": "i32", "seen": "i32",
}  # fmt: skip
_SAMPLE = {
    "logits": "*fp32", "mask": "*i1", "out": "*i64", "temperatures": "*fp32", "top_ks": "*i32", "top_ps": "*fp32",
    "min_ps": "*fp32", "seeds": "*i64", "steps": "*i64", "V": "i32:16",
}  # fmt: skip
AOT_CASES = [
    AotCase("penalise", penalise_kernel, _PENALTIES, {"BLOCK": 256}),
    AotCase("sample", sample_kernel, _SAMPLE, {"mask": None, "MASKED": False, "BLOCK": BLOCK}, 16),
    AotCase("sample-masked", sample_kernel, _SAMPLE, {"MASKED": True, "BLOCK": BLOCK}, 16),
]
