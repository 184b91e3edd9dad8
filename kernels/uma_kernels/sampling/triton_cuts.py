"""Where top_k and top_p cut a row on a GPU: first the few tokens among which the cut falls, then the cut.

Knows rows of scores and what may stay of one; does not know how a token is drawn, nor requests.

What stays is the front of the order (distance to the largest score up, index up). A token's position in it is the bits of its
distance, then its index. Two ways lead to a row's members, the tokens among which its cut falls:

- SHORT, a small top_k, whatever top_p: as many groups of neighbours hold them, those that come first by (least distance, index),
  for each group that comes before a token's own has a token that comes before it. No pass over the row is needed.
- WIDE: tokens are counted by distance, in BINS bins. Counts say in which bin the top_k-th lies, and bound what the tokens
  beyond a bin weigh, so they give a narrow range of bins in which top_p cuts. A second pass lists the tokens of that range and
  sums what comes before it.

Then a bisection over positions finds the cut among members that a program holds in registers. A list is in any order, as its
programs had none: what members weigh is summed in integers, which need none. Of more than LISTED members the bisection reads
the whole row at each step, which is right and slow: so many at almost one distance are no language model's.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096  # tokens of a program: the vocabulary is split by its size alone, so that a row's sums have one order
GROUP = 64  # tokens of a group, at least
GROUPS = 4096  # of a row, at most: a program holds them in registers
FEW = 64  # the largest top_k of a short list
LISTED = 16384  # members of a row, at most, that are listed
BINS = 256
FIELDS = 8  # of what is known of a row's members
RESIDENT = (
    528  # programs that gather at once on a large GPU: four a multiprocessor; of more, those without work take time
)
TOKEN_BITS = 20  # of a position: as large as a vocabulary may be
COUNTS = ["chunks", "num_groups", "programs"]  # arguments of which Triton makes no constants

GREEDY, PLAIN, SHORT, WIDE = (tl.constexpr(kind) for kind in range(4))  # GREEDY is also a row without a token
# Members lie in the bins from FIRST to before AFTER, and in SIZE places; BEFORE tokens come before them. TOP_K is 0 where it
# cuts nothing. An entry of the list stands for 2 ** SHIFT tokens. WHOLE_ROW: places are tokens, nothing is listed. CURSOR
# counts members as they are listed.
FIRST, AFTER, BEFORE, SIZE, TOP_K, SHIFT, WHOLE_ROW, CURSOR = (tl.constexpr(field) for field in range(FIELDS))
END = tl.constexpr(0x7F800000 << TOKEN_BITS)  # the position of no token: infinitely far
_BITS = tl.constexpr(TOKEN_BITS)
_TOKEN = tl.constexpr((1 << TOKEN_BITS) - 1)
_FEW = tl.constexpr(FEW)
_WEIGHTLESS = tl.constexpr(104.0)  # from this distance on weights are 0
_SLACK = tl.constexpr(1e-3)  # of bounds: more than rounding moves a token or its weight
_TILE = tl.constexpr(32)  # chunks whose counts are read at once


@triton.jit
def largest_of(peaks, row, chunks, CHUNKS: tl.constexpr):
    """The row's largest score: infinity where a logit is not finite, -infinity where no token is left."""
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peaks + row * chunks + chunk, chunk < chunks, float("-inf")), 0)


@triton.jit
def kind_of(largest, temperature, top_k, top_p, V):
    by_number = (top_k > 0) & (top_k < V)
    kind = tl.where(by_number | (top_p < 1.0), WIDE, PLAIN)
    kind = tl.where(by_number & (top_k <= _FEW), SHORT, kind)
    nothing = (temperature == 0.0) | (largest == float("inf")) | (largest == float("-inf"))
    return tl.where(nothing, GREEDY, kind)


@triton.jit
def distances(scores, mask, tokens, inside, largest, temperature, MASKED: tl.constexpr):
    """(largest - score) / temperature, infinite where there is no token: the same bits in every pass."""
    if MASKED:
        inside = inside & (tl.load(mask + tokens, inside, 0) != 0)
    apart = largest - tl.load(scores + tokens, inside, float("-inf"))
    finite = apart < float("inf")  # a GPU divides infinity slowly
    return tl.where(finite, tl.div_rn(tl.where(finite, apart, 1.0), temperature), float("inf"))


@triton.jit
def keys(distance):
    """Bits in the order of distances."""
    return tl.abs(distance).to(tl.int32, bitcast=True)  # -0.0 - 0.0 is -0.0


@triton.jit
def positions(distance, token):
    return (keys(distance).to(tl.int64) << _BITS) | token


@triton.jit
def bins(distance, scale, BINS: tl.constexpr):
    """Bin 0 holds the largest score; the last one has no end."""
    return tl.minimum(distance * scale, BINS - 1.0).to(tl.int32)


@triton.jit
def scale_of(lows, row, chunks, largest, temperature, top_k, top_p, V, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """How many bins a distance of 1 has, so that they reach as far as a cut can fall."""
    chunk = tl.arange(0, CHUNKS)
    low = tl.min(tl.load(lows + row * chunks + chunk, chunk < chunks, float("inf")), 0)
    reach = tl.minimum(tl.div_rn(largest - low, temperature), _WEIGHTLESS)
    # V tokens from here on weigh a small part of what top_p drops, which is its share of 1 or more.
    enough = tl.log(V * 64.0 / tl.maximum(1.0 - top_p, 1e-8))
    reach = tl.where((top_k <= 0) | (top_k >= V), tl.minimum(reach, enough), reach)
    return BINS / tl.maximum(reach, 1e-30)


@triton.jit(do_not_specialize=COUNTS)
def narrow_kernel(
    peaks, groups, scales, sums, wholes, counts, lists, members, temperatures, top_ks, top_ps, V, chunks, num_groups,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SHIFT: tl.constexpr, BINS: tl.constexpr, FIELDS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Which tokens are a row's members: lists the groups of a SHORT row, finds the bins of a WIDE one."""
    row = tl.program_id(0).to(tl.int64)
    largest = largest_of(peaks, row, chunks, CHUNKS)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    kind = kind_of(largest, temperature, top_k, top_p, V)
    lists += row * FIELDS
    if kind == SHORT:
        wanted = tl.minimum(num_groups, _FEW)
        _list_groups(
            groups + row * num_groups, members + row * LISTED, largest, temperature, wanted, num_groups, GROUPS
        )
        tl.store(lists + FIRST, 0)
        tl.store(lists + AFTER, BINS)
        tl.store(lists + BEFORE, 0)
        tl.store(lists + SIZE, wanted << GROUP_SHIFT)
        tl.store(lists + TOP_K, top_k)
        tl.store(lists + SHIFT, GROUP_SHIFT)
        tl.store(lists + WHOLE_ROW, 0)
    if kind == WIDE:
        bin = tl.arange(0, BINS)
        number = tl.zeros((BINS,), tl.int32)
        for begin in range(0, chunks, _TILE):
            of = begin + tl.arange(0, _TILE)
            at = counts + row * chunks * BINS + of[:, None] * BINS + bin[None, :]
            number += tl.sum(tl.load(at, (of < chunks)[:, None], 0).to(tl.int32), 0)
        chunk = tl.arange(0, CHUNKS)
        whole = tl.sum(tl.load(sums + row * chunks + chunk, chunk < chunks, 0.0), 0)
        first, after, top_k = _range(number, whole, tl.load(scales + row), top_k, top_p, BINS)
        size = tl.sum(tl.where((bin >= first) & (bin < after), number, 0), 0)
        tl.store(wholes + row, whole)
        tl.store(lists + FIRST, first)
        tl.store(lists + AFTER, after)
        tl.store(lists + BEFORE, tl.sum(tl.where(bin < first, number, 0), 0))
        tl.store(lists + SIZE, tl.where(size > LISTED, V, size))
        tl.store(lists + TOP_K, top_k)
        tl.store(lists + SHIFT, 0)
        tl.store(lists + WHOLE_ROW, (size > LISTED).to(tl.int32))
        tl.store(lists + CURSOR, 0)


@triton.jit
def _list_groups(groups, members, largest, temperature, wanted, num_groups, GROUPS: tl.constexpr):
    """The `wanted` groups that come first by (least distance, index)."""
    group = tl.arange(0, GROUPS)
    peaks = tl.load(groups + group, group < num_groups, float("-inf"))
    position = positions(tl.div_rn(largest - peaks, temperature), group)
    low = tl.full((), -1, tl.int64)
    high = num_groups + tl.full((), END - 1, tl.int64)
    number_high = num_groups + tl.zeros((), tl.int32)
    while number_high > wanted:
        middle = low + ((high - low) >> 1)
        number = tl.sum((position <= middle).to(tl.int32), 0)
        enough = number >= wanted
        high = tl.where(enough, middle, high)
        number_high = tl.where(enough, number, number_high)
        low = tl.where(enough, low, middle)
    listed = position <= high
    tl.store(members + tl.cumsum(listed.to(tl.int32), 0) - 1, group, listed)


@triton.jit
def _range(number, whole, scale, top_k, top_p, BINS: tl.constexpr):
    """The bins in which the cut falls, as [first, after), and top_k, 0 where it cuts nothing; `number` tokens lie in each bin,
    `whole` is what all weigh. Without a cut the range is empty, and all tokens come before it."""
    bin = tl.arange(0, BINS)
    upto = tl.cumsum(number, 0)
    top_k = tl.where((top_k > 0) & (top_k < tl.sum(number, 0)), top_k, 0)
    by_number = top_k > 0
    end = tl.sum((upto < top_k).to(tl.int32), 0)  # the bin of the top_k-th
    staying = tl.where(by_number, tl.minimum(tl.maximum(top_k - (upto - number), 0), number), number).to(tl.float64)
    heaviest = tl.exp(-(bin.to(tl.float32) / scale)) * (1.0 + _SLACK)
    lightest = tl.where(bin < BINS - 1, tl.exp(-((bin + 1).to(tl.float32) / scale)) * (1.0 - _SLACK), 0.0)
    most, least = staying * heaviest.to(tl.float64), staying * lightest.to(tl.float64)  # what a bin may weigh
    all_most, all_least = tl.sum(most, 0), tl.sum(least, 0)
    # top_p cuts in the first bin beyond which no more weight lies than it drops of what top_k keeps.
    dropped = 1.0 - top_p.to(tl.float64)
    dropped_most = dropped * tl.where(by_number, all_most, whole)
    dropped_least = dropped * tl.where(by_number, all_least, whole)
    first = tl.sum((all_least - tl.cumsum(least, 0) > dropped_most).to(tl.int32), 0)
    after = tl.sum((all_most - tl.cumsum(most, 0) > dropped_least).to(tl.int32), 0) + 1
    by_weight = top_p < 1.0
    first = tl.where(by_weight, first, BINS)
    after = tl.where(by_weight, after, BINS)
    # What top_k keeps has to be summed: members reach to its end.
    return tl.where(by_number, tl.minimum(first, end), first), tl.where(by_number, end + 1, after), top_k


@triton.jit(do_not_specialize=COUNTS)
def gather_kernel(
    scores, mask, peaks, scales, sums, fronts, lists, members, temperatures, top_ks, top_ps, min_ps, V, chunks, programs,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BINS: tl.constexpr, FIELDS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Lists the members of a row, and sums what comes before them by chunks: all of it, and what min_p leaves. `programs` share
    a row."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    largest = largest_of(peaks, row, chunks, CHUNKS)
    temperature = tl.load(temperatures + row)
    if kind_of(largest, temperature, tl.load(top_ks + row), tl.load(top_ps + row), V) == WIDE:
        if MASKED:
            mask += row * V
        lists += row * FIELDS
        first, after, scale = tl.load(lists + FIRST), tl.load(lists + AFTER), tl.load(scales + row)
        least, is_listed = tl.load(min_ps + row), tl.load(lists + WHOLE_ROW) == 0
        for chunk in tl.range(tl.program_id(0) % programs, chunks, programs, disable_licm=True):
            tokens = chunk * CHUNK + tl.arange(0, CHUNK)
            distance = distances(scores + row * V, mask, tokens, tokens < V, largest, temperature, MASKED)
            weight = tl.exp(-distance)
            bin = bins(distance, scale, BINS)
            front = tl.where(bin < first, weight, 0.0)
            at = row * chunks + chunk
            tl.store(fronts + at, tl.sum(front.to(tl.float64), 0))
            tl.store(sums + at, tl.sum(tl.where(front >= least, front, 0.0).to(tl.float64), 0))
            inside = (bin >= first) & (bin < after) & (weight > 0.0) & is_listed
            place = tl.atomic_add(lists + CURSOR + tl.zeros_like(tokens), 1, inside, sem="relaxed")
            tl.store(members + row * LISTED + place, tokens, inside)


@triton.jit
def _power_of_two(exponent):
    return ((1023 + exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _fraction_bits(size):
    """Of weights in integers, such that those of `size` members add up to one."""
    return 61 - ((size.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127)


# Below, `row` is (V, scores, mask, largest, temperature) and `among` is (size, members, scale, first, after, shift, whole_row);
# `block` is the first block of members, as `members_at` gives it: it stays in registers.
@triton.jit
def members_at(begin, least, row, among, MASKED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Positions and weights of a block of places: END where no member is, a weight of 0 below `least`."""
    V, scores, mask, largest, temperature = row
    size, members, scale, first, after, shift, whole_row = among
    place = begin + tl.arange(0, BLOCK)
    inside = place < size
    entry = tl.load(members + (place >> shift), inside & (whole_row == 0), 0)
    token = tl.where(whole_row == 0, (entry << shift) + (place & ((1 << shift) - 1)), place)
    distance = distances(scores, mask, token, inside & (token < V), largest, temperature, MASKED)
    weight = tl.exp(-distance)
    bin = bins(distance, scale, BINS)
    inside = (bin >= first) & (bin < after) & (weight > 0.0)
    weight = tl.where(inside & (weight >= least), weight, 0.0)
    weight = weight.to(tl.float64) * _power_of_two(_fraction_bits(size))
    return tl.where(inside, positions(distance, token), END), (weight + 0.5).to(tl.int64)


@triton.jit
def lighten(block, least):
    """The block with a weight of 0 below `least`."""
    position, weight = block
    distance = (position >> _BITS).to(tl.int32).to(tl.float32, bitcast=True)
    return position, tl.where(tl.exp(-distance) >= least, weight, 0)


@triton.jit
def kept(cut, end, least, block, row, among, MASKED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many members lie at `cut` or before it and are tokens before `end`, and what those of `least` and more weigh; in
    `block` the others weigh 0 already."""
    number, whole = _summed(cut, end, block)
    for begin in range(BLOCK, among[0], BLOCK):
        more, weight = _summed(cut, end, members_at(begin, least, row, among, MASKED, BINS, BLOCK))
        number += more
        whole += weight
    return number, whole.to(tl.float64) * _power_of_two(-_fraction_bits(among[0]))


@triton.jit
def _summed(cut, end, block):
    position, weight = block
    inside = (position <= cut) & ((position & _TOKEN) < end)
    return tl.sum(inside.to(tl.int32), 0), tl.sum(tl.where(inside, weight, 0), 0)


@triton.jit
def _last(cut, block, row, among, MASKED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """The position of the last member at `cut` or before it."""
    last = tl.max(tl.where(block[0] <= cut, block[0], -1), 0)
    for begin in range(BLOCK, among[0], BLOCK):
        position, _ = members_at(begin, 0.0, row, among, MASKED, BINS, BLOCK)
        last = tl.maximum(last, tl.max(tl.where(position <= cut, position, -1), 0))
    return last


@triton.jit
def cut_of(
    before, before_weight, whole, top_k, top_p, block, row, among,
    MASKED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last position that stays. `before` tokens come before the members; without a top_k tokens come after them too, and
    `whole` is what all weigh."""
    V, scale, first, after = row[0], among[2], among[3], among[4]
    nearest = first.to(tl.float32) / scale * (1.0 - _SLACK)
    farthest = tl.where(after < BINS, after.to(tl.float32) / scale * (1.0 + _SLACK), float("inf"))
    begin, high = positions(nearest, 0) - 1, positions(farthest, 0) - 1  # no member before, none after
    number, weight = kept(high, V, 0.0, block, row, among, MASKED, BINS, BLOCK)
    number_high, weight_high = before + number, before_weight + weight
    for turn in range(2):  # top_k, then top_p of what it keeps
        # Those up to `high` reach what is wanted, those up to `low` do not.
        cuts = tl.where(turn == 0, (top_k > 0) & (top_k < number_high), top_p < 1.0)
        wanted = tl.where(turn == 0, top_k, 0)
        target = tl.where(turn == 0, 0.0, top_p.to(tl.float64) * tl.where(top_k > 0, weight_high, whole))
        low, number_low = begin, before
        while cuts & (number_high - number_low > 1) & (high - low > 1):
            middle = low + ((high - low) >> 1)
            number, weight = kept(middle, V, 0.0, block, row, among, MASKED, BINS, BLOCK)
            number, weight = before + number, before_weight + weight
            enough = (number >= wanted) & (weight >= target)
            high = tl.where(enough, middle, high)
            number_high = tl.where(enough, number, number_high)
            weight_high = tl.where(enough, weight, weight_high)
            low = tl.where(enough, low, middle)
            number_low = tl.where(enough, number_low, number)
    return _last(high, block, row, among, MASKED, BINS, BLOCK)
