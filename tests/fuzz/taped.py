"""Cases of recorded decode steps: one layer's ops at random shapes, recorded, then played over other inputs.

Knows which ops a decode step makes; does not know models.
"""

from __future__ import annotations

import torch

from tests.fuzz.draw import Draw
from tests.fuzz.products import draw_weight
from uma_kernels import kv_cache
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.attention import paged_decode
from uma_kernels.linear import PRECISIONS, PackedLinear, gather_rows, linear, pack
from uma_kernels.linear.cases import FORMATS
from uma_kernels.lora import LoraRouting, LoraSlice, lora_merged, pack_lora
from uma_kernels.norm import add_rms_norm, rms_norm
from uma_kernels.rope import rope, rotary_table
from uma_kernels.tape import Tape, TapeMemory
from uma_kernels.testing import assert_invariant

BLOCK = 4  # of the cache


def check_tape(draw: Draw) -> None:
    kv_heads, group, head_dim = draw.size("Hkv", 1, 2), draw.size("group", 1, 3), 8 * draw.size("D/8", 1, 4)
    heads = kv_heads * group
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    embedding = pack(draw_weight(draw, draw.size("V", 1, 40), 96)[0])
    width = embedding.shape[1]
    qkv = pack(torch.randn(q_width + 2 * kv_width, width) * width**-0.5)
    mlp_width, precision = draw.size("N", 1, 100), draw.pick("precision", PRECISIONS)
    gate_up, down = (pack(torch.randn(n, k) * k**-0.5) for n, k in ((2 * mlp_width, q_width), (width, mlp_width)))
    quantised = _square(draw, q_width)
    batch, context = draw.size("B", 1, 5), draw.size("context", 1, 50)
    blocks = -(-context // BLOCK)
    caches = torch.randn(2, batch * blocks * BLOCK, kv_heads, head_dim)
    block_table = torch.randperm(batch * blocks).int().view(batch, blocks)
    table, norm = rotary_table(torch.rand(head_dim // 2), context), torch.randn(width)
    adapters = [
        pack_lora(torch.randn(rank, width), torch.randn(q_width, rank), 0.5)
        for rank in (draw.size("R0", 1, 20), draw.size("R1", 1, 20))
    ]
    slices = [LoraSlice(q_width, [adapters[0], None, adapters[1]]), LoraSlice(2 * kv_width, [None] * 3)]
    routing = LoraRouting.build([draw.random.randrange(-1, 3) for _ in range(batch)], 3)
    activation = draw.pick("activation", (swiglu, geglu_tanh))
    draw.keep("activation", activation.__name__)
    ids, positions = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    slots, lengths = torch.zeros(batch, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)

    def feed() -> None:
        """Inputs of another step, where a recorded one finds them."""
        ids.random_(0, embedding.shape[0])
        positions.random_(0, context)
        lengths.copy_(positions + 1)
        slots.copy_(block_table.gather(1, positions[:, None] // BLOCK)[:, 0] * BLOCK + positions % BLOCK)

    def step() -> torch.Tensor:
        stream = gather_rows(embedding, ids)
        hidden = rms_norm(stream, norm, 1e-5)
        merged = linear(hidden, qkv, precision=precision)
        if not routing.is_empty:
            lora_merged(hidden, merged, slices, routing)
        q = merged[:, :q_width].view(batch, heads, head_dim)
        k, v = (part.view(batch, kv_heads, head_dim) for part in merged[:, q_width:].split(kv_width, dim=1))
        rope(q, k, positions, table)
        kv_cache.write(k, v, *caches, slots)
        seen = paged_decode(q, *caches, block_table, lengths, BLOCK, head_dim**-0.5).view(batch, q_width)
        mixed = linear(seen, quantised, precision=precision)
        out = linear(activation(linear(mixed, gate_up, precision=precision)), down, precision=precision)
        return add_rms_norm(out, stream, norm, 1e-5)

    feed()
    tape = Tape(step, TapeMemory())
    for _ in range(3):
        feed()
        before = caches.clone()
        expected, expected_caches = step(), caches.clone()
        caches.copy_(before)
        assert tape.play(), "a step that its ops took was refused when played"
        assert_invariant(tape.result, expected)
        assert_invariant(caches, expected_caches)


def _square(draw: Draw, width: int) -> PackedLinear:
    """A weight of any format that the width takes."""
    chosen = draw.pick("square", FORMATS if width % 32 == 0 else FORMATS[:1])
    return pack(chosen.random(width, width))
