"""Drawing the next token on a GPU: many programs share each pass over a row, one draws.

Knows logits and the parameters of a row; does not know requests. Largest scores first, then weights relative to the row's, by
chunks of the vocabulary, then the chunk in which the draw falls, then its token. A row that top_k or top_p cuts takes passes of
its own in between (triton_cuts.py). The host knows no row's parameters: it always launches the same five kernels, and a program
whose row does not need it ends at once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.sampling import triton_cuts as cuts
from uma_kernels.sampling.triton_cuts import (
    AFTER,
    BEFORE,
    COUNTS,
    END,
    FIRST,
    GREEDY,
    PLAIN,
    SHIFT,
    SHORT,
    SIZE,
    TOP_K,
    WHOLE_ROW,
    WIDE,
    bins,
    cut_of,
    distances,
    kept,
    kind_of,
    largest_of,
    lighten,
    members_at,
    positions,
    scale_of,
)

if TYPE_CHECKING:
    from uma_kernels.sampling import SamplingBatch, TokenCounts

NOT_FINITE, NOTHING_LEFT = -1, -2  # in place of a token
LEAST = 32  # elements of a block: Triton fails on some of one


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


@triton.jit(do_not_specialize=COUNTS)
def peaks_kernel(
    scores, mask, peaks, lows, groups, V, chunks, num_groups,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest score of a chunk and of each group in it, infinity where one is NaN or infinity, and the chunk's smallest."""
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    tokens = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    score = tl.load(scores + row * V + tokens, tokens < V, float("-inf"))
    score = tl.where(score == score, score, float("inf"))
    if MASKED:
        inside = tl.load(mask + row * V + tokens, tokens < V, 0) != 0
        score = tl.where(inside | (score == float("inf")), score, float("-inf"))
    peak = tl.max(score, 1)
    tl.store(groups + row * num_groups + group, peak, group < num_groups)
    tl.store(peaks + row * chunks + chunk, tl.max(peak, 0))
    low = tl.min(tl.where(score > float("-inf"), score, float("inf")), 1)
    tl.store(lows + row * chunks + chunk, tl.min(low, 0))


@triton.jit(do_not_specialize=COUNTS)
def weigh_kernel(
    scores, mask, peaks, lows, scales, sums, counts, temperatures, top_ks, top_ps, min_ps, V, chunks,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """What those of a chunk's tokens weigh that min_p leaves; in a WIDE row, what all weigh, and how many lie in each bin."""
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    at = row * chunks + chunk
    largest = largest_of(peaks, row, chunks, CHUNKS)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    kind = kind_of(largest, temperature, top_k, top_p, V)
    if kind == SHORT:
        tl.store(sums + at, 0.0)  # only members may stay
    if (kind == PLAIN) | (kind == WIDE):
        if MASKED:
            mask += row * V
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        distance = distances(scores + row * V, mask, tokens, tokens < V, largest, temperature, MASKED)
        weight = tl.exp(-distance)
        least = tl.where(kind == WIDE, 0.0, tl.load(min_ps + row))
        tl.store(sums + at, tl.sum(tl.where(weight >= least, weight, 0.0).to(tl.float64), 0))
        if kind == WIDE:
            scale = scale_of(lows, row, chunks, largest, temperature, top_k, top_p, V, CHUNKS, BINS)
            number = tl.histogram(bins(distance, scale, BINS), BINS, mask=weight > 0.0)
            tl.store(counts + at * BINS + tl.arange(0, BINS), number.to(tl.int16))
            if chunk == 0:
                tl.store(scales + row, scale)


@triton.jit(do_not_specialize=COUNTS)
def draw_kernel(
    scores, mask, out, peaks, scales, sums, fronts, wholes, lists, members, temperatures, top_ks, top_ps, min_ps, seeds, steps,
    V, chunks,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, FIELDS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """The first token, in index order, at which the cumulative weight exceeds u times the whole; or the largest; one a row."""
    row = tl.program_id(0).to(tl.int64)
    V += tl.zeros((), tl.int32)  # no constant, which Triton makes of 1
    scores += row * V
    if MASKED:
        mask += row * V
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    chunk_at = row * chunks + chunk
    largest = largest_of(peaks, row, chunks, CHUNKS)
    temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
    kind = kind_of(largest, temperature, tl.load(top_ks + row), top_p, V)
    if kind == GREEDY:
        token = tl.where(largest == float("inf"), -1, -2)
        if (largest < float("inf")) & (largest > float("-inf")):
            peak = tl.load(peaks + chunk_at, inside, float("-inf"))
            tokens = tl.min(tl.where(peak == largest, chunk, CHUNKS), 0) * CHUNK + tl.arange(0, CHUNK)
            distance = distances(scores, mask, tokens, tokens < V, largest, 1.0, MASKED)
            token = tl.min(tl.where(distance == 0.0, tokens, V), 0)
        tl.store(out + row, token.to(tl.int64))
    else:
        lists += row * FIELDS
        is_cut = kind >= SHORT
        size = tl.load(lists + SIZE, is_cut, 0)
        here = (V, scores, mask, largest, temperature)
        among = (
            size, members + row * LISTED, tl.load(scales + row, kind == WIDE, 1.0), tl.load(lists + FIRST, is_cut, 0),
            tl.load(lists + AFTER, is_cut, 0), tl.load(lists + SHIFT, is_cut, 0), tl.load(lists + WHOLE_ROW, is_cut, 0),
        )  # fmt: skip
        block = members_at(0, 0.0, here, among, MASKED, BINS, CHUNK)
        cut = tl.full((), END - 1, tl.int64)
        if size > 0:
            front = tl.sum(tl.load(fronts + chunk_at, inside & (kind == WIDE), 0.0), 0)
            cut = cut_of(
                tl.load(lists + BEFORE), front, tl.load(wholes + row, kind == WIDE, 0.0), tl.load(lists + TOP_K), top_p, block,
                here, among, MASKED, BINS, CHUNK,
            )  # fmt: skip
        least = tl.load(min_ps + row)
        block = lighten(block, least)
        others = tl.load(sums + chunk_at, inside, 0.0)  # what stays of a chunk beside members
        _, whole = kept(cut, V, least, block, here, among, MASKED, BINS, CHUNK)
        target = _uniform(tl.load(seeds + row), tl.load(steps + row)) * (tl.sum(others, 0) + whole)
        low, high = tl.zeros((), tl.int32), chunks  # no more than the target lies before `low`, and more before `high`
        before = tl.zeros((), tl.float64)
        while high - low > 1:
            middle = (low + high) // 2
            _, weight = kept(cut, middle * CHUNK, least, block, here, among, MASKED, BINS, CHUNK)
            weight += tl.sum(tl.where(chunk < middle, others, 0.0), 0)
            high = tl.where(weight > target, middle, high)
            low = tl.where(weight > target, low, middle)
            before = tl.where(weight > target, before, weight)
        tokens = low * CHUNK + tl.arange(0, CHUNK)
        distance = distances(scores, mask, tokens, tokens < V, largest, temperature, MASKED)
        weight = tl.exp(-distance)
        weight = tl.where((positions(distance, tokens) <= cut) & (weight >= least), weight, 0.0).to(tl.float64)
        found = (before + tl.cumsum(weight, 0) > target) & (weight > 0.0)
        last = tl.max(tl.where(weight > 0.0, tokens, 0), 0)  # where rounding leaves the sum at the target
        tl.store(out + row, tl.min(tl.where(found, tokens, last), 0).to(tl.int64))


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
    chunk, group = _split(vocabulary)
    chunks, groups = triton.cdiv(vocabulary, chunk), triton.cdiv(vocabulary, group)

    def scratch(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    f32, f64, i32 = torch.float32, torch.float64, torch.int32
    arguments = _constants(vocabulary, mask is not None) | {
        "scores": logits, "mask": mask, "out": out, "temperatures": batch.temperature, "top_ks": batch.top_k,
        "top_ps": batch.top_p, "min_ps": batch.min_p, "seeds": batch.seeds, "steps": batch.steps,
        "V": vocabulary, "chunks": chunks, "programs": max(1, min(chunks, cuts.RESIDENT // rows)), "num_groups": groups,
        "peaks": scratch(f32, chunks), "lows": scratch(f32, chunks), "groups": scratch(f32, groups), "scales": scratch(f32),
        "sums": scratch(f64, chunks), "fronts": scratch(f64, chunks), "wholes": scratch(f64),
        "counts": scratch(torch.int16, chunks, cuts.BINS), "lists": scratch(i32, cuts.FIELDS),
        "members": scratch(i32, min(cuts.LISTED, chunks * chunk)),
    }  # fmt: skip
    for kernel, shared, tokens in _PASSES:
        programs = arguments[shared] if shared else 1
        kernel[(rows * programs,)](
            **{name: arguments[name] for name in kernel.arg_names}, num_warps=max(1, chunk // tokens)
        )


_PASSES = (  # which argument says how many programs share a row, and how many tokens of a chunk a warp takes
    (peaks_kernel, "chunks", 512),
    (weigh_kernel, "chunks", 512),
    (cuts.narrow_kernel, None, 512),
    (cuts.gather_kernel, "programs", 256),
    (draw_kernel, None, 512),
)


def _split(vocabulary: int) -> tuple[int, int]:
    """Tokens of a chunk and of a group: powers of two, and functions of the vocabulary alone."""
    assert vocabulary <= 1 << cuts.TOKEN_BITS
    group = cuts.GROUP * triton.next_power_of_2(triton.cdiv(vocabulary, cuts.GROUP * cuts.GROUPS))
    chunk = min(cuts.CHUNK, _block(vocabulary))
    return chunk, min(group, chunk)


def _block(size: int) -> int:
    return max(LEAST, triton.next_power_of_2(size))


def _constants(vocabulary: int, masked: bool) -> dict[str, Any]:
    chunk, group = _split(vocabulary)
    chunks = triton.cdiv(vocabulary, chunk)
    return {
        "MASKED": masked, "CHUNK": chunk, "CHUNKS": _block(chunks), "GROUP": group, "GROUP_SHIFT": group.bit_length() - 1,
        "GROUPS": _block(triton.cdiv(vocabulary, group)), "BINS": cuts.BINS, "FIELDS": cuts.FIELDS,
        "LISTED": min(cuts.LISTED, chunks * chunk),
    }  # fmt: skip


_PENALTIES = {
    "scores": "*fp32", "rows": "*i64", "ids": "*i64", "counts": "*i32", "repetition": "*fp32", "presence": "*fp32",
    "frequency": "*fp32", "V": "i32", "seen": "i32",
}  # fmt: skip
_ROWS = {
    "scores": "*fp32", "mask": "*i1", "out": "*i64", "temperatures": "*fp32", "top_ks": "*i32", "top_ps": "*fp32",
    "min_ps": "*fp32", "seeds": "*i64", "steps": "*i64", "peaks": "*fp32", "lows": "*fp32", "groups": "*fp32",
    "scales": "*fp32", "sums": "*fp64", "fronts": "*fp64", "wholes": "*fp64", "counts": "*i16", "lists": "*i32",
    "members": "*i32", "V": "i32:16", "chunks": "i32", "programs": "i32", "num_groups": "i32",
}  # fmt: skip


def _cases(name: str, vocabulary: int, masked: bool) -> list[AotCase]:
    constants = _constants(vocabulary, masked) | ({} if masked else {"mask": None})
    if vocabulary == 1:
        constants["V"] = 1  # as Triton has it
    return [
        AotCase(
            f"{name}-{kernel.__name__.removesuffix('_kernel')}", kernel, _ROWS,
            {argument: value for argument, value in constants.items() if argument in kernel.arg_names},
            max(1, constants["CHUNK"] // tokens),
        )
        for kernel, _, tokens in _PASSES
    ]  # fmt: skip


AOT_CASES = [
    AotCase("penalise", penalise_kernel, _PENALTIES, {"BLOCK": 256}),
    *_cases("sample", 151936, False),
    *_cases("sample-masked", 151936, True),
    *_cases("sample-one", 1, False),
]
