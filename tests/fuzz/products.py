"""Cases of products with weights: `linear` in its precisions and formats, embedding rows, label logits, adapters.

Knows what these ops are specified to compute; does not know how a case came to be drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.fuzz.draw import Draw
from uma_kernels.label_head import label_head, token_logprobs
from uma_kernels.linear import PRECISIONS, BlockQuantized, PackedLinear, gather_rows, linear, pack
from uma_kernels.linear.cases import FORMATS, WeightFormat
from uma_kernels.linear.reference import linear_fast, linear_near, quantize_rows, split_outliers
from uma_kernels.lora import LoraRouting, LoraSlice, PackedLora, lora, lora_merged, pack_lora
from uma_kernels.testing import assert_exact, assert_fast, assert_invariant, assert_near, assert_reduction

Weight = torch.Tensor | BlockQuantized
ENOUGH = 64  # results whose largest says what their size is, as NEAR needs it


def draw_weight(draw: Draw, rows: int, most: int) -> tuple[Weight, torch.Tensor]:
    """A weight of any format, its width at most `most`, and its values in fp64, rounded nowhere."""
    weight_format: WeightFormat = draw.pick("format", FORMATS)
    unit = 1 if weight_format.bits == 32 else weight_format.block_size
    width = unit * draw.size("K", 1, max(1, most // unit))
    draw.keep("K", width)
    weight = weight_format.random(rows, width)
    if isinstance(weight, torch.Tensor):
        return weight, weight.double()
    # Files hold negative scales, and zeros where a block is empty.
    weight.scales.mul_(torch.where(torch.rand(weight.scales.shape) < 0.3, -1.0, 1.0))
    weight.scales[torch.rand(weight.scales.shape) < 0.05] = 0.0
    return weight, exact_values(weight)


def exact_values(weight: BlockQuantized, of_terms: bool = False) -> torch.Tensor:
    """The weight in fp64; `of_terms`: the magnitudes of its two terms, added."""
    rows, width = weight.shape
    values = weight.unpacked().reshape(rows, -1, weight.block_size).double() * weight.scales.double()[:, :, None]
    mins = torch.zeros(1, 1) if weight.mins is None else weight.mins
    if of_terms:
        return (values.abs() + mins.double().abs()[:, :, None]).reshape(rows, width)
    return (values + mins.double()[:, :, None]).reshape(rows, width)


def draw_rows(draw: Draw, tokens: int, width: int) -> torch.Tensor:
    """Rows as models have them, or stranger: with outliers, of any size, with zeros, too small to count."""
    x = torch.randn(tokens, width)
    kind = draw.pick("values", ("normal", "spiky", "sizes", "zeros", "tiny"))
    if kind == "spiky":
        x = torch.where(torch.rand(tokens, width) < 0.03, x * torch.randn(tokens, width).mul(3).exp2() * 4, x)
    elif kind == "sizes":
        x *= torch.randint(-40, 40, (tokens, 1)).float().exp2()
    elif kind == "zeros":
        x *= (torch.rand(tokens, 1) < 0.7) * (torch.rand(1, width) < 0.5)
    elif kind == "tiny":
        x *= torch.where(torch.rand(tokens, width) < 0.5, 2.0**-100, 1.0)
    return x


def check_linear(draw: Draw) -> None:
    tokens, rows = draw.size("T", 0, 80), draw.size("N", 1, 150)
    weight, values = draw_weight(draw, rows, min(1400, 1_000_000 // (max(1, tokens) * rows)))
    precision = draw.pick("precision", PRECISIONS)
    x = draw.place(draw_rows(draw, tokens, values.shape[1]))
    bias = draw.place(torch.randn(rows)) if draw.flag("bias") else None
    packed = pack(weight)
    with draw.out((tokens, rows), rows_apart=True) as out:
        linear(x, packed, bias, out, precision)
        _check_product(draw, out, x, weight, values, bias, precision)
        some = draw.some_of(tokens)
        assert_invariant(linear(x[some], packed, bias, precision=precision), out[some])
    if tokens and draw.flag("bad", 0.2):
        _check_a_bad_row(draw, x, packed, bias, precision)


def _check_product(
    draw: Draw,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: Weight,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    precision: str,
) -> None:
    wide_bias = None if bias is None else bias.double()
    if isinstance(weight, torch.Tensor) or precision == "exact":
        plain = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        terms = F.linear(x.double().abs(), plain.double().abs(), None if wide_bias is None else wide_bias.abs())
        assert_reduction(out, F.linear(x, plain, bias), F.linear(x.double(), plain.double(), wide_bias), terms=terms)
        return
    block = weight.block_size
    specified = torch.empty(out.shape)
    (linear_near if precision == "near" else linear_fast)(x, weight, bias, specified)
    rest, outliers = (x, torch.zeros_like(x)) if precision == "near" else split_outliers(x, block)
    quants, scales, _ = quantize_rows(rest, block, 32767.0 if precision == "near" else 127.0)
    rounded = (quants * scales.double()[:, :, None]).reshape(x.shape) + outliers
    terms = F.linear(rounded.abs(), exact_values(weight, of_terms=True), None if bias is None else bias.double().abs())
    assert_reduction(out, specified, F.linear(rounded, values, wide_bias), terms=terms)
    if bias is None and draw.drawn["values"] in ("normal", "spiky"):
        if precision == "fast":
            assert_fast(out, x, values, block)
        elif out.numel() >= ENOUGH and draw.drawn["values"] == "normal":
            assert_near(out, F.linear(x.double(), values))


def _check_a_bad_row(
    draw: Draw, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, precision: str
) -> None:
    """A value that is not finite stays in its row, and with blocks fills it."""
    before = linear(x, packed, bias, precision=precision)
    bad = draw.random.randrange(len(x))
    x[bad, draw.random.randrange(x.shape[1])] = draw.random.choice((float("nan"), float("inf"), -float("inf")))
    after = linear(x, packed, bias, precision=precision)
    others = torch.arange(len(x)) != bad
    assert_invariant(after[others], before[others])
    if precision != "exact" and packed.handle[3] != 32:
        assert bool(after[bad].isnan().all()), "a row with a bad value is not NaN"


def check_gather_rows(draw: Draw) -> None:
    rows, count = draw.size("N", 1, 150), draw.size("M", 0, 90)
    weight, _ = draw_weight(draw, rows, 700)
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    ids = draw.place(torch.randint(rows, (count,)))
    scale = draw.pick("scale", (1.0, 1.0, 24.0))
    with draw.out((count, dense.shape[1])) as out:
        gather_rows(pack(weight), ids, out, scale)
        assert_exact(out, dense[ids] * scale)


def check_label_head(draw: Draw) -> None:
    tokens, vocabulary = draw.size("T", 1, 40), draw.size("V", 1, 150)
    count, labels = draw.size("R", 0, 40), draw.size("L", 0, 70)
    weight, _ = draw_weight(draw, vocabulary, 700)
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    packed = pack(weight)
    hidden = draw.place(torch.randn(tokens, dense.shape[1]))
    rows, ids = draw.place(torch.randint(tokens, (count,))), draw.place(torch.randint(vocabulary, (labels,)))
    x, w = hidden[rows], dense[ids]
    logits = label_head(hidden, rows, packed, ids)
    terms = x.double().abs() @ w.double().abs().T
    assert_reduction(logits, x @ w.T, x.double() @ w.double().T, terms=terms)
    some_rows, some_ids = draw.some_of(count), draw.some_of(labels)
    assert_invariant(label_head(hidden, rows[some_rows], packed, ids[some_ids]), logits[some_rows][:, some_ids])
    chosen = torch.randint(vocabulary, (count, draw.size("C", 0, 5)))
    true = (x.double() @ dense.double().T).log_softmax(dim=1).gather(1, chosen)
    plain = (x @ dense.T).log_softmax(dim=1).gather(1, chosen)
    terms = (x.double().abs() @ dense.double().abs().T).amax(dim=1, keepdim=True) - true
    assert_reduction(token_logprobs(hidden, rows, packed, chosen), plain, true, terms=terms)


Factors = tuple[torch.Tensor, torch.Tensor, float]


def check_lora(draw: Draw) -> None:
    tokens, width = draw.size("T", 0, 70), draw.size("K", 1, 700)
    columns = [draw.size(f"N{i}", 1, 150) for i in range(draw.size("slices", 1, 3))]
    num_slots = draw.size("slots", 0, 6)
    mapping = [draw.random.randrange(-1, num_slots) for _ in range(tokens)]
    factors: list[list[Factors | None]] = [
        [_draw_factors(draw, width, n, f"R{i}.{slot}") for slot in range(num_slots)] for i, n in enumerate(columns)
    ]
    slices = [LoraSlice(n, [_pack(f) for f in own]) for n, own in zip(columns, factors, strict=True)]
    x, base = draw.place(torch.randn(tokens, width)), torch.randn(tokens, sum(columns))
    with draw.out(base.shape, rows_apart=True) as out:
        out.copy_(base)
        lora_merged(x, out, slices, LoraRouting.build(mapping, num_slots))
        first = 0
        for part, own in zip(slices, factors, strict=True):
            end = first + part.num_columns
            narrow = base[:, first:end]
            single, plain = (_row_by_row(x, narrow, own, mapping, t) for t in (torch.float64, torch.float32))
            magnitudes = [f and (f[0].abs(), f[1].abs(), abs(f[2])) for f in own]
            terms = _row_by_row(x.abs(), narrow.abs(), magnitudes, mapping, torch.float64)
            assert_reduction(out[:, first:end], plain, single, terms=terms)
            untouched = [t for t, slot in enumerate(mapping) if slot < 0 or own[slot] is None]
            assert_exact(out[untouched, first:end], narrow[untouched])
            alone = narrow.clone()
            lora(x, alone, part.adapters, LoraRouting.build(mapping, num_slots))
            assert_invariant(alone, out[:, first:end])
            first = end
        some = draw.some_of(tokens)
        again = base[some]
        lora_merged(x[some], again, slices, LoraRouting.build([mapping[t] for t in some.tolist()], num_slots))
        assert_invariant(again, out[some])


def _draw_factors(draw: Draw, width: int, rows: int, name: str) -> Factors | None:
    rank = draw.size(name, 0, 80)
    if not rank:
        return None
    scaling = draw.random.choice((1.0, 0.25, -2.0))
    dtype = draw.pick(f"{name} type", (torch.float32, torch.float16, torch.bfloat16))
    lora_a, lora_b = torch.randn(rank, width) * width**-0.5, torch.randn(rows, rank) * rank**-0.5
    return lora_a.to(dtype), lora_b.to(dtype), scaling


def _pack(factors: Factors | None) -> PackedLora | None:
    return None if factors is None else pack_lora(*factors)


def _row_by_row(
    x: torch.Tensor, out: torch.Tensor, factors: list[Factors | None], mapping: list[int], dtype: torch.dtype
) -> torch.Tensor:
    result = out.to(dtype, copy=True)
    for t, slot in enumerate(mapping):
        chosen = factors[slot] if slot >= 0 else None
        if chosen is not None:
            lora_a, lora_b, scaling = chosen
            result[t] += scaling * (x[t].to(dtype) @ lora_a.to(dtype).T) @ lora_b.to(dtype).T
    return result
