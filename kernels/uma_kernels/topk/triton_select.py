"""The k largest of many values on a GPU, in one total order: by value down, of equal ones the first.

Knows levels of maxima, candidates and their places; does not know what a value is the score of.

For few queries each entry counts the entries before it: its place, found by many programs at once that wait for nothing. That
is work by the square of the entries; where it is too much, one program a query finds the k-th largest value bit by bit, and
only what reaches it is counted. Both follow the same order, so which one it was decides speed, never a bit of the result.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted

FAN = 8  # entries of a level under one of the next
TOP = 8192  # entries of the topmost level, at most
TOP_COUNTED = 1024  # the same where entries are counted
COUNTED = 2**26  # comparisons of a launch that counts, at most: 15 to 25 us of an H200, by its integer rate
ORDERED = 16  # entries that a program puts in their places
OTHERS = 1024  # entries that it compares them with at once: its loads, which depend on each other, are waited for once
CHUNK = 8192  # entries that a program which selects holds in registers
SCAN = 4096  # entries that it numbers at once


@triton.jit
def fold_kernel(level, above, count, above_count, FAN: tl.constexpr, BLOCK: tl.constexpr):
    """above[q, i]: the largest of the FAN entries of level [Q, count] that lie under it."""
    q = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    child = i[:, None] * FAN + tl.arange(0, FAN)[None, :]
    values = tl.load(level + q * count + child, child < count, float("-inf"))
    tl.store(above + q * above_count + i, tl.max(values, 1), i < above_count)


@triton.jit
def _key(value):
    """An integer in the order of floats, 0 and -0 alike; the least one for -inf: an entry that does not exist."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value == float("-inf"), -(2**31), key)


@triton.jit
def _load_keys(values, parents, start, count, size, FAN: tl.constexpr, CHUNK: tl.constexpr):
    """Keys of the entries start .. start + CHUNK - 1 and their places in `values` [size]; under `parents` where there are any."""
    i = start + tl.arange(0, CHUNK)
    if parents is None:
        place = i
        exists = i < count
    else:
        parent = tl.load(parents + i // FAN, i < count, -1)
        place = parent * FAN + i % FAN
        exists = (parent >= 0) & (place < size)
    return _key(tl.load(values + place, exists, float("-inf"))), place


@triton.jit
def _threshold(values, parents, count, size, k, FAN: tl.constexpr, CHUNK: tl.constexpr, ONE: tl.constexpr):
    """The k-th largest key (the least one where there are fewer), and how many are larger. Two bits at a step: how many keys
    reach each of the three thresholds is one sum, of 21 bits for each."""
    threshold = tl.full((), 0, tl.uint32)  # in the order of unsigned numbers
    held = _unsigned(_load_keys(values, parents, 0, count, size, FAN, CHUNK)[0])
    for step in range(16):
        shift = 30 - 2 * step
        reached = _reached(held, threshold, shift)
        if not ONE:
            for start in range(CHUNK, count, CHUNK):
                keys = _unsigned(_load_keys(values, parents, start, count, size, FAN, CHUNK)[0])
                reached += _reached(keys, threshold, shift)
        counts = tl.sum(reached, 0)
        more = ((counts & 0x1FFFFF) >= k).to(tl.uint32) + (((counts >> 21) & 0x1FFFFF) >= k).to(tl.uint32)
        threshold += (more + ((counts >> 42) >= k).to(tl.uint32)) << shift
    larger = (held > threshold).to(tl.int32)
    if not ONE:
        for start in range(CHUNK, count, CHUNK):
            keys = _unsigned(_load_keys(values, parents, start, count, size, FAN, CHUNK)[0])
            larger += (keys > threshold).to(tl.int32)
    return (threshold ^ 0x80000000).to(tl.int32, bitcast=True), tl.sum(larger, 0)


@triton.jit
def _unsigned(keys):
    return keys.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _reached(keys, threshold, shift):
    """Which of threshold + 1, 2, 3 << shift each key reaches, as one number whose parts can be added up."""
    one = tl.full((), 1, tl.uint32) << shift
    first = (keys >= threshold + one).to(tl.int64)
    second = (keys >= threshold + 2 * one).to(tl.int64)
    third = (keys >= threshold + 3 * one).to(tl.int64)
    return first + (second << 21) + (third << 42)


@triton.jit
def _select(
    values, parents, chosen, count, size, k, FAN: tl.constexpr, CHUNK: tl.constexpr, ONE: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """chosen [k]: places of the k largest entries, in ascending order, then -1; of equal ones the first."""
    threshold, larger = _threshold(values, parents, count, size, k, FAN, CHUNK, ONE)
    equal_before, before = 0, 0
    for start in range(0, count, PART):
        keys, place = _load_keys(values, parents, start, count, size, FAN, PART)
        equal = (keys == threshold) & (keys != -(2**31))
        rank = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        take = (keys > threshold) | (equal & (rank <= k - larger))
        tl.store(chosen + before + tl.cumsum(take.to(tl.int32), 0) - 1, place, take)
        equal_before += tl.sum(equal.to(tl.int32), 0)
        before += tl.sum(take.to(tl.int32), 0)
    for start in range(0, k, PART):
        i = start + tl.arange(0, PART)
        tl.store(chosen + i, tl.full((PART,), -1, tl.int32), (i >= before) & (i < k))


@triton.jit
def descend_kernel(
    values, parents, chosen, count, size, k, HAS_PARENTS: tl.constexpr, FAN: tl.constexpr, CHUNK: tl.constexpr,
    ONE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`_select` for each query: of the `count` = `size` entries of its level, or of those under parents [Q, k] (k * FAN)."""
    q = tl.program_id(0).to(tl.int64)
    if HAS_PARENTS:
        parents += q * k
    _select(values + q * size, parents, chosen + q * k, count, size, k, FAN, CHUNK, ONE, PART)


@triton.jit
def _packed(values, parents, chosen, slot, count, size, FAN: tl.constexpr, DENSE: tl.constexpr):
    """Value and index of the entry in each slot as one number in the order (value down, index up). Slots without an entry come
    last, and all are different."""
    entry = slot
    exists = slot < count
    if chosen is not None:
        entry = tl.load(chosen + slot, exists, -1)
        exists &= entry >= 0
    index = entry.to(tl.int64)
    if parents is not None:
        parent = tl.load(parents + entry // FAN, exists, -1).to(tl.int64)
        index = parent * FAN + entry % FAN
        exists &= parent >= 0
    at = entry if DENSE else index
    keys = _key(tl.load(values + at, exists & (at < size), float("-inf")))
    return (keys.to(tl.int64) << 32) | (0xFFFFFFFF - tl.where(keys == -(2**31), slot, index))


@triton.jit
def order_kernel(
    values, parents, chosen, scores, indices, count, size, parents_size, k, slots, FAN: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """indices, scores [Q, k]: the first k of `count` entries in order, then -1 and -inf. Each entry counts those before it.

    Entry i is chosen[q, i] where there is `chosen` [Q, k], else i. Its index is that, or under parents [Q, parents_size]
    parents[q, i // FAN] * FAN + i % FAN. Its value is values[q, index], DENSE: values[q, i], of `size`. slots: max(count, k).
    """
    q = tl.program_id(1).to(tl.int64)
    values += q * size
    if parents is not None:
        parents += q * parents_size
    if chosen is not None:
        chosen += q * k
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = _packed(values, parents, chosen, slot, count, size, FAN, DENSE)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, slots, OTHERS):
        other = _packed(values, parents, chosen, start + tl.arange(0, OTHERS), count, size, FAN, DENSE)
        place += tl.sum((other[None, :] > own[:, None]).to(tl.int32), 1)
    exists = own >= -(2**63) + 2**32  # a key above the least one
    to = q * k + place
    kept = place < k  # a slot from `slots` on has all others before it
    tl.store(indices + to, tl.where(exists, 0xFFFFFFFF - (own & 0xFFFFFFFF), -1), kept)
    if scores is not None:
        key = (own >> 32).to(tl.int32)
        score = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
        tl.store(scores + to, tl.where(exists, score, float("-inf")), kept)


def counted(num_queries: int, entries: int) -> bool:
    """Whether selections from up to `entries` count. All of a call do or none: the other kind takes the first of equal entries,
    so it needs parents by place, and what counts leaves them by value."""
    return num_queries * entries**2 <= COUNTED


def best_groups(groups: torch.Tensor, tiles: torch.Tensor, k: int, by_count: bool) -> torch.Tensor:
    """Places [Q, k] of the k largest of groups [Q, n], of which tiles [Q, ceil(n / FAN)] are maxima; -1 where there are fewer."""
    levels = [groups, tiles]
    while (count := levels[-1].shape[1]) > (TOP_COUNTED if by_count else TOP):
        above = torch.empty(groups.shape[0], triton.cdiv(count, FAN), dtype=torch.float32, device=groups.device)
        fold_kernel[(triton.cdiv(above.shape[1], 256), above.shape[0])](
            levels[-1], above, count, above.shape[1], FAN=FAN, BLOCK=256
        )
        levels.append(above)
    chosen = None
    for level in reversed(levels):
        parents, chosen = chosen, torch.empty(groups.shape[0], k, dtype=torch.int32, device=groups.device)
        count = level.shape[1] if parents is None else k * FAN
        if by_count:
            _order(level, parents, None, None, chosen, count, FAN, dense=False)
        else:
            _descend(level, parents, chosen, count)
    assert chosen is not None
    return chosen


def best_candidates(
    candidates: torch.Tensor,
    parents: torch.Tensor,
    fan: int,
    scores: torch.Tensor,
    indices: torch.Tensor,
    by_count: bool,
) -> None:
    """scores, indices [Q, k]: the best of candidates [Q, m] in order; candidate i is row parents[q, i // fan] * fan + i % fan."""
    chosen, count = None, candidates.shape[1]
    if not by_count:
        chosen = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
        _descend(candidates, None, chosen, count)
        count = chosen.shape[1]
    _order(candidates, parents, chosen, scores, indices, count, fan, dense=True)


def _descend(values: torch.Tensor, parents: torch.Tensor | None, chosen: torch.Tensor, count: int) -> None:
    descend_kernel[(values.shape[0],)](
        values, parents, chosen, count, values.shape[1], chosen.shape[1],
        HAS_PARENTS=parents is not None, FAN=FAN, **_registers(count),
    )  # fmt: skip


def _order(
    values: torch.Tensor,
    parents: torch.Tensor | None,
    chosen: torch.Tensor | None,
    scores: torch.Tensor | None,
    indices: torch.Tensor,
    count: int,
    fan: int,
    dense: bool,
) -> None:
    num_queries, k = indices.shape
    slots = max(count, k)
    block = 256 if interpreted() else ORDERED  # the interpreter takes its time by programs
    order_kernel[(triton.cdiv(slots, block), num_queries)](
        values, parents, chosen, scores, indices, count, values.shape[1], 0 if parents is None else parents.shape[1], k, slots,
        FAN=fan, DENSE=dense, BLOCK=block, OTHERS=_others(slots),
    )  # fmt: skip


def _others(slots: int) -> int:
    return min(OTHERS, max(ORDERED, triton.next_power_of_2(slots)))


def _registers(count: int) -> dict[str, Any]:
    """How a program that selects from `count` entries holds them: at once where they fit."""
    chunk = min(CHUNK, max(64, triton.next_power_of_2(count)))
    warps = 1 if chunk <= 1024 else min(16, chunk // 512)  # warps that share a sum wait for each other
    return {"CHUNK": chunk, "ONE": count <= chunk, "PART": min(chunk, SCAN), "num_warps": warps}


def _aot_cases() -> list[AotCase]:
    cases = [
        AotCase(
            "fold", fold_kernel, {"level": "*fp32", "above": "*fp32", "count": "i32", "above_count": "i32"},
            {"FAN": FAN, "BLOCK": 256},
        )
    ]  # fmt: skip
    common = {"values": "*fp32", "parents": "*i32", "chosen": "*i32", "count": "i32", "size": "i32", "k": "i32"}
    for parents, entries in ((False, TOP), (False, 4096 * 16), (True, 100 * FAN), (True, 4096 * FAN)):
        held = _registers(entries)
        warps = held.pop("num_warps")
        cases.append(AotCase(
            f"descend-{entries}", descend_kernel, common,
            held | {"HAS_PARENTS": parents, "FAN": FAN} | ({} if parents else {"parents": None}), warps,
        ))  # fmt: skip
    common |= {"scores": "*fp32", "indices": "*i32", "parents_size": "i32", "slots": "i32"}
    for name, absent, slots, fan in (
        ("top", ("parents", "chosen", "scores"), TOP_COUNTED, FAN),
        ("level", ("chosen", "scores"), 100 * FAN, FAN),
        ("candidates", ("chosen",), 100 * 16, 16),
        ("chosen", (), 4096, 16),
    ):
        dense = "scores" not in absent
        cases.append(AotCase(
            f"order-{name}", order_kernel, common | {"indices": "*i64" if dense else "*i32"},
            dict.fromkeys(absent) | {"FAN": fan, "DENSE": dense, "BLOCK": ORDERED, "OTHERS": _others(slots)},
        ))  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
