"""Cases of ops that treat each row by itself: norms, gated activations, sampling.

Knows what these ops are specified to compute; does not know how a case came to be drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.fuzz.draw import Draw
from uma_kernels import dispatch
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.norm import add_rms_norm, rms_norm
from uma_kernels.sampling import SamplingBatch, TokenCounts, sample
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction


def check_rms_norm(draw: Draw) -> None:
    dimensions = draw.size("dimensions", 1, 4)
    width = draw.size("K", 1, 2000)
    shape = [draw.size(f"size{i}", 0, max(1, int((40_000 / width) ** (1 / dimensions)))) for i in range(dimensions - 1)]
    x = draw.place(torch.randn(*shape, width) * 3, rows_apart=dimensions > 1)
    weight, eps = draw.place(torch.randn(width)), draw.pick("eps", (1e-5, 1e-6))
    true, plain = (F.rms_norm(x.to(t), (width,), weight.to(t), eps) for t in (torch.float64, torch.float32))
    before = x.clone()
    with draw.out(x.shape, rows_apart=dimensions > 1) as out:
        rms_norm(x, weight, eps, out)
        assert_reduction(out, plain, true)
        assert_exact(x, before)
        rows = before.reshape(-1, width)
        some = draw.some_of(len(rows))
        assert_invariant(rms_norm(rows[some], weight, eps), out.reshape(-1, width)[some])
        assert_invariant(rms_norm(x, weight, eps, x), out)


def check_add_rms_norm(draw: Draw) -> None:
    tokens, width = draw.size("T", 0, 70), draw.size("K", 1, 700)
    x, residual = draw.place(torch.randn(tokens, width)), torch.randn(tokens, width)
    weight, eps = draw.place(torch.randn(width)), draw.pick("eps", (1e-5, 1e-6))
    summed = x + residual
    with draw.out(x.shape) as stream, draw.out(x.shape) as out:
        stream.copy_(residual)
        add_rms_norm(x, stream, weight, eps, out)
        assert_exact(stream, summed)
        assert_invariant(out, rms_norm(summed, weight, eps))
        add_rms_norm(x, residual, weight, eps, x)
        assert_exact(residual, summed)
        assert_invariant(x, out)


def check_activation(draw: Draw) -> None:
    tokens, width = draw.size("T", 0, 60), draw.size("N", 0, 700)
    op, activation = draw.pick("op", (("swiglu", F.silu), ("geglu_tanh", _gelu_tanh)))
    draw.keep("op", op)
    gate = torch.randn(tokens, width) * draw.pick("steep", (1.0, 4.0, 30.0))
    up = torch.randn(tokens, width)
    both = draw.place(torch.cat((gate, up), dim=1))
    run = swiglu if op == "swiglu" else geglu_tanh
    true = activation(gate.double()) * up.double()
    with draw.out(gate.shape) as out:
        run(both, out)
        assert_reduction(out, activation(gate) * up, true, terms=(gate * up).double())
        some = draw.some_of(tokens)
        assert_invariant(run(both[some]), out[some])


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def check_sampling(draw: Draw) -> None:
    rows, vocab = draw.size("B", 0, 6), draw.size("V", 1, 1200)
    logits = torch.randn(rows, vocab) * draw.pick("steep", (1.0, 3.0))
    if draw.flag("equals", 0.3):
        logits = logits.mul(4).round().div(4)  # many equal logits, and penalties that leave them equal
    logits[torch.rand(rows, vocab) < draw.pick("lost", (0.0, 0.0, 0.5))] = float("-inf")
    logits[:, vocab // 2] = 0.0  # a token is left
    mask = None
    if draw.flag("mask", 0.4):
        mask = torch.rand(rows, vocab) < 0.5
        mask[:, vocab // 2] = True
        mask = draw.place(mask)
    batch = _draw_batch(draw, rows)
    counts = [_draw_counts(draw, vocab) for _ in range(rows)] if draw.flag("counts", 0.5) else None
    placed = draw.place(logits)
    drawn = sample(placed, batch, counts, mask)
    with dispatch.use_backend("reference"):
        assert_exact(drawn, sample(logits, batch, counts, mask))
    assert_exact(placed, logits)
    some = draw.some_of(rows)
    picked = SamplingBatch(*(getattr(batch, name)[some] for name in SamplingBatch.__slots__))
    some_counts = None if counts is None else [counts[r] for r in some.tolist()]
    again = sample(logits[some], picked, some_counts, None if mask is None else mask[some])
    assert_exact(again, drawn[some])


def _draw_batch(draw: Draw, rows: int) -> SamplingBatch:
    """Every row has settings of its own."""

    def each(*options: float) -> torch.Tensor:
        return torch.tensor([draw.random.choice(options) for _ in range(rows)], dtype=torch.float32)

    return SamplingBatch(
        temperature=each(0.0, 0.5, 1.0, 1.0, 2.0),
        top_k=each(0, 0, -1, 1, 3, 40, 5000).int(),
        top_p=each(1.0, 1.0, 0.95, 0.5, 0.01),
        min_p=each(0.0, 0.0, 0.05, 0.5, 1.0),
        repetition_penalty=each(1.0, 1.0, 2.0, 0.5),
        presence_penalty=each(0.0, 0.25, -0.5),
        frequency_penalty=each(0.0, 0.25, -0.5),
        seeds=torch.tensor([draw.random.randrange(-(2**63), 2**63) for _ in range(rows)], dtype=torch.int64),
        steps=torch.tensor([draw.random.randrange(10_000) for _ in range(rows)], dtype=torch.int64),
    )


def _draw_counts(draw: Draw, vocab: int) -> TokenCounts | None:
    if draw.random.random() < 0.3:
        return None
    ids = torch.randperm(vocab)[: draw.random.randrange(min(vocab, 20) + 1)]
    return ids, torch.randint(0, 4, ids.shape, dtype=torch.int32)
