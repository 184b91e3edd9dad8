"""Attention on a GPU: plain causal, ranking trees, paged decode, each beside torch's own, and a race of tile sizes.

    python -m bench.gpu.attention [--quick] [--only plain ranking short decode] [--tune]

Knows shapes, anchors and how to count tiles; does not know how kernels work. Results are checked before anything is timed.
Contexts lie in shuffled blocks of 16 cache rows, candidates' own keys in the step.
"""
# mypy: disable-error-code="arg-type, call-arg, misc, assignment"

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.harness import ceilings, compare, end, environment, guarded, num_copies, require_gpu, save, table
from uma_kernels.attention import AttentionBatch
from uma_kernels.attention.plan import build
from uma_kernels.attention.triton_kernel import (
    Config,
    DecodeConfig,
    decode_config,
    paged_decode,
    tree_attention,
    tree_config,
)
from uma_kernels.testing import assert_reduction

BLOCK = 16
DTYPE = torch.bfloat16
Row = dict[str, Any]
Call = Callable[[], object]
kept: list[Row] = []

TREE_VARIANTS = {
    64: [
        Config(128, 64, 8, 3), Config(128, 64, 8, 5), Config(64, 64, 4, 3), Config(64, 64, 4, 5), Config(128, 128, 8, 3),
        Config(64, 128, 4, 3), Config(128, 64, 4, 3),
    ],
    128: [
        Config(128, 64, 8, 3), Config(128, 64, 8, 5), Config(64, 64, 4, 3), Config(128, 128, 8, 3), Config(64, 128, 4, 3),
        Config(128, 32, 8, 5),
    ],
    256: [Config(64, 32, 8, 3), Config(64, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 4, 3)],
}  # fmt: skip
DECODE_VARIANTS = {
    head_dim: [
        DecodeConfig(split, block_n, warps, stages)
        for split in (256, 512)
        for block_n, warps, stages in (
            (64, 4, 3),
            (64, 4, 4),
            (64, 4, 5),
            (64, 2, 4),
            (128, 4, 4),
            (32, 2, 5),
            (32, 4, 6),
        )
    ]
    for head_dim in (64, 128)
}


@dataclass(frozen=True)
class Shape:
    """`chunks`: (tokens above that lie in the cache, own tokens), candidates of one request share what lies above."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    chunks: tuple[tuple[int, int], ...]
    shared: bool  # one prefix for all

    @property
    def pairs(self) -> int:
        return sum(own * above + own * (own + 1) // 2 for above, own in self.chunks)

    @property
    def flops(self) -> int:
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return sum(own for _, own in self.chunks)

    @property
    def nbytes(self) -> int:
        return 2 * self.head_dim * self.tokens * (2 * self.heads + 2 * self.kv_heads)


def plain(sequences: int, length: int, heads: int, head_dim: int) -> Shape:
    return Shape(f"{sequences}x{length}", heads, 8, head_dim, ((0, length),) * sequences, False)


def ranking(job: int, candidate: int, count: int, name: str = "", heads: int = 16, head_dim: int = 128) -> Shape:
    label = name or f"{job}/{candidate}/{count}"
    return Shape(label, heads, 8, head_dim, ((job, candidate),) * count, True)


def batch_of(shape: Shape) -> AttentionBatch:
    """Prefixes in shuffled blocks of the cache; own tokens in the step."""
    prefixes = 1 if shape.shared else len(shape.chunks)
    longest = max(above for above, _ in shape.chunks)
    blocks = np.random.default_rng(0).permutation(prefixes * -(-longest // BLOCK) or 1).astype(np.int32)
    rows = (blocks[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(prefixes, -1)
    slots, row = [], 0
    for n, (above, own) in enumerate(shape.chunks):
        slots += [rows[0 if shape.shared else n, :above], -1 - np.arange(row, row + own, dtype=np.int32)]
        row += own
    offsets = [torch.tensor([0, *np.cumsum(x)], dtype=torch.int32)
               for x in ([own for _, own in shape.chunks], [sum(c) for c in shape.chunks])]  # fmt: skip
    return AttentionBatch(offsets[0], torch.from_numpy(np.concatenate(slots)), offsets[1])


def tensors(shape: Shape) -> tuple[torch.Tensor, ...]:
    """q, k, v as columns of one merged buffer, k_cache, v_cache."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    merged = torch.randn(shape.tokens, width, device="cuda", dtype=DTYPE)
    q, k, v = (
        part.view(shape.tokens, -1, shape.head_dim)
        for part in merged.split([n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)], dim=1)
    )
    prefixes = 1 if shape.shared else len(shape.chunks)
    rows = max(BLOCK, prefixes * -(-max(above for above, _ in shape.chunks) // BLOCK) * BLOCK)
    k_cache, v_cache = torch.randn(2, rows, shape.kv_heads, shape.head_dim, device="cuda", dtype=DTYPE)
    return q, k, v, k_cache, v_cache


def ours(shape: Shape, inputs: Sequence[torch.Tensor], batch: AttentionBatch, config: Config | None) -> torch.Tensor:
    q = inputs[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tree_attention(*inputs, batch, shape.head_dim**-0.5, None, out, config)
    return out


def chunk_tensors(
    shape: Shape, inputs: Sequence[torch.Tensor], batch: AttentionBatch, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [H, own, D], k and v [Hkv, above + own, D] of chunk n."""
    q, k, v, k_cache, v_cache = inputs
    begin = sum(own for _, own in shape.chunks[:n])
    starts = batch.cu_seqlens_k.tolist()
    slots = batch.context_slots[starts[n] : starts[n + 1]].long().cuda()
    context = [
        torch.where((slots < 0)[:, None, None], step[(-slots - 1).clamp(min=0)], cache[slots.clamp(min=0)])
        for step, cache in ((k, k_cache), (v, v_cache))
    ]
    own = shape.chunks[n][1]
    return q[begin : begin + own].transpose(0, 1), context[0].transpose(0, 1), context[1].transpose(0, 1)


def right_causal(own: int, total: int) -> torch.Tensor:
    return torch.ones(own, total, dtype=torch.bool, device="cuda").tril(total - own)


def check_tree(shape: Shape, config: Config | None = None) -> None:
    """The first and the last chunk against fp64; raises where the op is wrong."""
    inputs, batch = tensors(shape), batch_of(shape)
    out = ours(shape, inputs, batch, config)
    row = 0
    for n, (above, own) in enumerate(shape.chunks):
        if n in (0, len(shape.chunks) - 1):
            q, k, v = (x[:, None].transpose(0, 1) for x in chunk_tensors(shape, inputs, batch, n))
            mask = right_causal(own, above + own)
            group = shape.heads // shape.kv_heads
            for head in (0, shape.heads - 1):
                parts = q[:, head : head + 1], k[:, head // group, None], v[:, head // group, None]
                true = F.scaled_dot_product_attention(*(x.double() for x in parts), attn_mask=mask)
                theirs = F.scaled_dot_product_attention(*parts, attn_mask=mask)
                assert_reduction(out[row : row + own, head], theirs[0, 0], true[0, 0], DTYPE)
        row += own


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def usable(name: str, call: Call) -> bool:
    """Whether an anchor runs here; says why not."""
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"  {name} left out: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        torch.cuda.empty_cache()
        return False
    return True


def tiles_of(shape: Shape, batch: AttentionBatch, config: Config) -> tuple[int, int]:
    """(programs, tiles), of all key-value heads."""
    plan = batch.plan(torch.device("cuda", torch.cuda.current_device()), *plan_key(shape, config))
    p, pieces = plan.programs.long(), plan.pieces.long()
    tiles = int((p[:, 4] - p[:, 3]).sum() + (pieces[:, 2] - pieces[:, 1]).sum())
    return plan.num_programs * shape.kv_heads, tiles * shape.kv_heads


def plan_key(shape: Shape, config: Config) -> tuple[int, int, None]:
    return config.block_m // (shape.heads // shape.kv_heads), config.block_n, None


def keep(rows: Sequence[Row]) -> None:
    """Written at once: what comes later may not end in time."""
    kept.extend(rows)
    save("attention", rows)


def rows_of(shape: Shape, part: str, timings: dict[str, Any], tiles: tuple[int, int]) -> list[Row]:
    base = {"part": part, "case": shape.name, "H": shape.heads, "Hkv": shape.kv_heads, "D": shape.head_dim}
    rows = []
    peak = ceilings().bf16_tflop_s
    for name, timing in timings.items():
        tflops = shape.flops / timing.median / 1e6
        row = base | {
            "what": name,
            **timing.as_row(),
            "tflop_s": round(tflops, 1),
            "of_matmul": round(tflops / peak, 3),
        }
        row["vs_ours"] = round(timings["ours"].median / timing.median, 3)  # above 1: the anchor is faster
        if name.startswith("ours"):
            row |= {"programs": tiles[0], "tiles": tiles[1], "ns_per_tile": round(timing.median * 1e3 / tiles[1], 3)}
        rows.append(row)
    return rows


def bench_plain(quick: bool) -> None:
    shapes = [
        plain(16384 // length, length, heads, head_dim)
        for head_dim in (64, 128)
        for heads in ((16,) if quick else (16, 32))
        for length in ((2048, 8192) if quick else (2048, 4096, 8192))
    ]
    shapes += [plain(4, 4096, 16, 256)]
    for shape in shapes:
        with guarded(f"plain {shape.name} H{shape.heads} D{shape.head_dim}"):
            check_tree(Shape("check", shape.heads, 8, shape.head_dim, ((0, 300), (0, 131)), False))
            batch = batch_of(shape)
            sets = [tensors(shape) for _ in range(num_copies(shape.nbytes))]
            calls: dict[str, list[Call]] = {"ours": [partial(ours, shape, s, batch, None) for s in sets]}
            length = shape.chunks[0][1]
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                listed = []
                for s in sets:
                    q, k, v = (
                        x.reshape(-1, length, x.shape[1], shape.head_dim).transpose(1, 2).contiguous() for x in s[:3]
                    )
                    listed.append(partial(flash, q, k, v, backend))
                if usable(f"{name} {shape.name} H{shape.heads} D{shape.head_dim}", listed[0]):
                    calls[name] = listed
            timings = compare(calls, rounds=8 if quick else 20)
            keep(rows_of(shape, "plain", timings, tiles_of(shape, batch, tree_config(shape.head_dim, DTYPE))))


def dense_anchor(shape: Shape, inputs: Sequence[torch.Tensor]) -> Call:
    """All tokens of the step behind the job's, with the mask written out."""
    allowed = step_mask(shape)
    q, k, v = step_tensors(shape, inputs)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)


def step_tensors(shape: Shape, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """q [1, H, T, D] and k, v [1, Hkv, job + T, D], contiguous."""
    q, k, v, k_cache, v_cache = inputs
    job = shape.chunks[0][0]
    keys, values = torch.cat((k_cache[:job], k)), torch.cat((v_cache[:job], v))
    return tuple(x.transpose(0, 1).contiguous()[None] for x in (q, keys, values))


def owners(shape: Shape) -> torch.Tensor:
    """Chunk of each token of the step."""
    return torch.repeat_interleave(torch.arange(len(shape.chunks)), torch.tensor([c[1] for c in shape.chunks])).cuda()


def step_mask(shape: Shape) -> torch.Tensor:
    job, owner = shape.chunks[0][0], owners(shape)
    own = (owner[:, None] == owner[None, :]).tril_()
    return torch.cat((torch.ones(shape.tokens, job, dtype=torch.bool, device="cuda"), own), dim=1)


def flex_anchor(shape: Shape, inputs: Sequence[torch.Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    job, owner = shape.chunks[0][0], owners(shape)

    def allowed(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key - job).clamp(min=0)
        return (key < job) | ((owner[query] == owner[own]) & (own <= query))

    q, k, v = step_tensors(shape, inputs)
    mask = torch.compile(create_block_mask)(allowed, None, None, shape.tokens, shape.tokens + job, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def expanded_anchor(shape: Shape, inputs: Sequence[torch.Tensor], whole: bool) -> Call:
    """FlashAttention with a batch row a candidate and the job's keys copied into each; `whole`: its queries too."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v, k_cache, v_cache = inputs
    (job, own), count, group = shape.chunks[0], len(shape.chunks), shape.heads // shape.kv_heads

    def context(step: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        above = cache[:job].expand(count, *cache[:job].shape)
        both = torch.cat((above, step.reshape(count, own, *step.shape[1:])), dim=1)
        return both.repeat_interleave(group, dim=2).transpose(1, 2).contiguous()

    keys, values = context(k, k_cache), context(v, v_cache)
    if whole:
        queries = torch.randn_like(keys)
        return partial(flash, queries, keys, values, SDPBackend.FLASH_ATTENTION)
    queries = q.reshape(count, own, shape.heads, -1).transpose(1, 2).contiguous()
    bias = causal_lower_right(own, job + own)

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)

    return call


def bench_ranking(quick: bool) -> None:
    ours_rows: list[Row] = []
    for job, candidate, count in ((120, 180, 10), (600, 250, 100), (600, 250, 500)):
        with guarded(f"ranking {job}/{candidate}/{count}"):
            shape = ranking(job, candidate, count)
            check_tree(ranking(job, candidate, 3))
            batch = batch_of(shape)
            sets = [tensors(shape) for _ in range(min(8, num_copies(shape.nbytes)))]
            calls: dict[str, list[Call]] = {"ours": [partial(ours, shape, s, batch, None) for s in sets]}
            anchors: dict[str, Callable[[], Call]] = {
                "flash, keys copied": partial(expanded_anchor, shape, sets[0], False),
                "flash, job again": partial(expanded_anchor, shape, sets[0], True),
            }
            if shape.tokens <= 30_000:
                anchors["sdpa, dense mask"] = partial(dense_anchor, shape, sets[0])
            else:
                print(
                    f"  dense mask {shape.name} left out: {shape.tokens * (shape.tokens + job) / 2**30:.0f} GiB of mask"
                )
            if not quick or count == 100:
                anchors["flex_attention"] = partial(flex_anchor, shape, sets[0])
            for name, make in anchors.items():
                made: list[Call] = []
                if usable(f"{name} {shape.name}", lambda make=make, made=made: made.append(make()) or made[0]()):
                    calls[name] = made
            timings = compare(calls, inner=8 if count < 500 else 2, rounds=8)
            found = rows_of(shape, "ranking", timings, tiles_of(shape, batch, tree_config(shape.head_dim, DTYPE)))
            ours_rows.append(found[0])
            keep(found)
            del sets, calls, anchors
            torch.cuda.empty_cache()
    per_tile = [r["ns_per_tile"] for r in ours_rows]
    print("  ns per unmasked tile over the ranking shapes:", ", ".join(f"{x:.2f}" for x in per_tile))


def bench_short(quick: bool) -> None:
    """Short leaves and the last layer's single queries: programs that hold several chunks against one chunk a program."""
    for shape in (
        ranking(600, 10, 500, "short 600/10/500"),
        ranking(600, 32, 500, "short 600/32/500"),
        Shape("last layer 100", 16, 8, 128, ((849, 1),) * 100, True),
        Shape("probes 850/1/500", 16, 8, 128, ((850, 1),) * 500, True),
    ):
        with guarded(f"short {shape.name}"):
            check_tree(shape)
            config = tree_config(shape.head_dim, DTYPE)
            together, apart = batch_of(shape), batch_of(shape)
            device = torch.device("cuda", torch.cuda.current_device())
            key = plan_key(shape, config)
            parts = [x.numpy() for x in (apart.cu_seqlens_q, apart.cu_seqlens_k, apart.context_slots)]
            apart.plans[(device, *key)] = build(*parts, *key, device, share=False)
            sets = [tensors(shape) for _ in range(num_copies(shape.nbytes, 8))]
            timings = compare(
                {
                    "ours": [partial(ours, shape, s, together, None) for s in sets],
                    "ours, apart": [partial(ours, shape, s, apart, None) for s in sets],
                },
                rounds=8 if quick else 20,
            )
            found = rows_of(shape, "short", timings, tiles_of(shape, together, config))
            programs, tiles = tiles_of(shape, apart, config)
            found[1] |= {
                "programs": programs,
                "tiles": tiles,
                "ns_per_tile": timings["ours, apart"].median * 1e3 / tiles,
            }
            keep(found)


@dataclass(frozen=True)
class Decode:
    sequences: int
    context: int
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    table: int = 0  # blocks in the table where more than the context needs

    @property
    def nbytes(self) -> int:
        return 2 * self.head_dim * self.sequences * (2 * self.context * self.kv_heads + 2 * self.heads)


def decode_inputs(case: Decode) -> tuple[torch.Tensor, ...]:
    """q, k_cache, v_cache, block_table, context_lens; blocks shuffled."""
    per = -(-case.context // BLOCK)
    blocks = torch.randperm(case.sequences * per, dtype=torch.int32, device="cuda").view(case.sequences, per)
    block_table = torch.zeros(case.sequences, max(per, case.table), dtype=torch.int32, device="cuda")
    block_table[:, :per] = blocks
    slots = case.sequences * per * BLOCK
    k_cache, v_cache = torch.randn(2, slots, case.kv_heads, case.head_dim, dtype=DTYPE, device="cuda")
    q = torch.randn(case.sequences, case.heads, case.head_dim, dtype=DTYPE, device="cuda")
    return (
        q,
        k_cache,
        v_cache,
        block_table,
        torch.full((case.sequences,), case.context, dtype=torch.int32, device="cuda"),
    )


def our_decode(case: Decode, inputs: Sequence[torch.Tensor], config: DecodeConfig | None) -> torch.Tensor:
    out = torch.empty_like(inputs[0])
    paged_decode(*inputs, BLOCK, case.head_dim**-0.5, None, out, config)
    return out


def gathered(case: Decode, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    q, k_cache, v_cache, table, _ = inputs
    rows = (table[:, : -(-case.context // BLOCK), None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten(1)
    rows = rows[:, : case.context].long()
    return q[:, :, None], *(cache[rows].transpose(1, 2).contiguous() for cache in (k_cache, v_cache))


def check_decode(case: Decode, config: DecodeConfig | None = None) -> None:
    inputs = decode_inputs(case)
    out = our_decode(case, inputs, config)
    parts = gathered(case, inputs)
    theirs = F.scaled_dot_product_attention(*parts, enable_gqa=True)[:, :, 0]
    true = F.scaled_dot_product_attention(*(x.double() for x in parts), enable_gqa=True)[:, :, 0]
    assert_reduction(out, theirs, true, DTYPE)


def bench_decode(quick: bool) -> None:
    heads = (16,) if quick else (16, 32)
    cases = [Decode(b, n, h) for h in heads for b in (1, 16, 64, 256) for n in (512, 2048, 8192)]
    cases += [Decode(256, 512, table=512), Decode(64, 2048, head_dim=64)]
    for case in cases:
        with guarded(f"decode B{case.sequences} ctx{case.context} H{case.heads} D{case.head_dim}"):
            check_decode(Decode(3, case.context + 5, case.heads, case.kv_heads, case.head_dim))
            sets = [decode_inputs(case) for _ in range(num_copies(case.nbytes, 32))]
            calls: dict[str, list[Call]] = {"ours": [partial(our_decode, case, s, None) for s in sets]}
            if not quick or case.table == 0:
                wide = [gathered(case, s) for s in sets]
                calls["sdpa, gathered"] = [partial(F.scaled_dot_product_attention, *w, enable_gqa=True) for w in wide]
            timings = compare(calls, rounds=8 if quick else 20)
            rows: list[Row] = []
            for name, timing in timings.items():
                rate = case.nbytes / timing.median / 1e3
                rows.append({
                    "part": "decode", "case": f"B{case.sequences} ctx{case.context}" + (" wide table" if case.table else ""),
                    "H": case.heads, "Hkv": case.kv_heads, "D": case.head_dim, "what": name, **timing.as_row(),
                    "gb_s": round(rate, 1), "of_copy": round(rate / ceilings().copy_gb_s, 3),
                    "of_read": round(rate / ceilings().read_gb_s, 3),
                    "vs_ours": round(timings["ours"].median / timing.median, 3),
                })  # fmt: skip
            keep(rows)
            del sets, calls
            torch.cuda.empty_cache()


def tune() -> list[Row]:
    """Every variant on a causal, a ranking and a decode shape; the geometric mean of the times decides."""
    rows: list[Row] = []
    for head_dim, variants in TREE_VARIANTS.items():
        shapes = [plain(4, 4096, 16, head_dim), ranking(600, 250, 100, head_dim=head_dim)]
        usual = tree_config(head_dim, DTYPE)
        rows += race(
            f"tree D{head_dim}", dict.fromkeys([usual, *variants]), shapes, batch_of,
            lambda shape, config: check_tree(Shape("check", 16, 8, shape.head_dim, ((70, 300), (70, 131)), True), config),
            lambda shape, config, extra: [
                partial(ours, shape, s, extra, config) for s in [tensors(shape) for _ in range(2)]
            ],
        )  # fmt: skip
    for head_dim, listed in DECODE_VARIANTS.items():
        cases = [Decode(b, n, h, head_dim=head_dim) for b, n, h in ((1, 8192, 16), (16, 2048, 16), (64, 2048, 32))]
        rows += race(
            f"decode D{head_dim}", dict.fromkeys([decode_config(head_dim, DTYPE), *listed]), cases,
            lambda case: [decode_inputs(case) for _ in range(num_copies(case.nbytes, 16))],
            lambda case, config: check_decode(Decode(3, case.context + 5, case.heads, 8, case.head_dim), config),
            lambda case, config, sets: [partial(our_decode, case, s, config) for s in sets],
        )  # fmt: skip
    return rows


def race(
    name: str,
    configs: dict[Any, None],
    cases: Sequence[Any],
    prepare: Callable[[Any], Any],
    check: Callable[[Any, Any], None],
    make: Callable[[Any, Any, Any], list[Call]],
) -> list[Row]:
    good = [c for c in configs if usable(f"{name} {c}", partial(check, cases[0], c))]
    times: dict[Any, list[float]] = {c: [] for c in good}
    for case in cases:
        extra = prepare(case)
        timings = compare({str(c): make(case, c, extra) for c in good}, rounds=5)
        for c in good:
            times[c].append(timings[str(c)].median)
        del extra
        torch.cuda.empty_cache()
    mean = {c: math.exp(sum(map(math.log, t)) / len(t)) for c, t in times.items()}
    first = mean[good[0]]
    found = [
        {"part": "tune", "case": name, "what": str(c), "us": round(mean[c], 2), "times": [round(x, 1) for x in times[c]],
         "vs_first": round(mean[c] / first, 3)}
        for c in sorted(good, key=mean.__getitem__)
    ]  # fmt: skip
    print(f"  {name}: best {found[0]['what']}, {found[0]['vs_first']} of the time of {good[0]}")
    return found


PARTS: dict[str, Callable[[bool], None]] = {
    "plain": bench_plain,
    "ranking": bench_ranking,
    "short": bench_short,
    "decode": bench_decode,
}
COLUMNS = ("part", "case", "H", "D", "what", "us", "us_p10", "us_p90", "tflop_s", "of_matmul", "tiles", "ns_per_tile",
           "gb_s", "of_copy", "of_read", "vs_ours")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tune", action="store_true", help="race tile sizes in place of the bench")
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    print(environment()["device"], ceilings())
    if args.tune:
        found = tune()
        save("attention-tune", found)
        print(table(found, ("case", "what", "us", "vs_first", "times")))
        return
    for part in args.only:
        PARTS[part](args.quick)
        sys.stdout.flush()
    print(table(kept, COLUMNS))
    end()


if __name__ == "__main__":
    main()
