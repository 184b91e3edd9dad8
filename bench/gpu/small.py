"""The small ops of a decoder layer, its heads and sampling on a GPU, beside torch: parts of `bench.gpu.gemm`.

Knows what each op has to move; does not know the engine. Every cell is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from bench.gpu.cells import DEVICE, Call, close, normal, race, report, small_op
from bench.gpu.harness import guarded, num_copies
from uma_kernels import activation, kv_cache, norm, rope
from uma_kernels.dispatch import use_backend
from uma_kernels.label_head import label_head, token_logprobs
from uma_kernels.linear import gather_rows, pack
from uma_kernels.sampling import SamplingBatch, sample

__all__ = ["bench_head", "bench_sampling", "bench_small"]


def bench_small(quick: bool) -> None:
    for tokens in (64, 4096) if quick else (1, 64, 1024, 4096, 16384):
        for width in (1024, 4096):

            def norms(tokens: int = tokens, width: int = width) -> tuple[Call, Call, Call]:
                x, w, out = normal(tokens, width), normal(width), torch.empty_like(normal(tokens, width))
                return (
                    lambda: norm.rms_norm(x, w, 1e-6, out),
                    lambda: F.rms_norm(x, (width,), w, 1e-6),
                    lambda: close(norm.rms_norm(x, w, 1e-6), F.rms_norm(x, (width,), w, 1e-6)),
                )

            def add_norms(tokens: int = tokens, width: int = width) -> tuple[Call, Call, Call]:
                x, residual, w = normal(tokens, width), normal(tokens, width), normal(width)
                out = torch.empty_like(x)
                return (
                    lambda: norm.add_rms_norm(x, residual, w, 1e-6, out),
                    lambda: F.rms_norm(residual.add_(x), (width,), w, 1e-6),
                    lambda: close(
                        norm.add_rms_norm(x, residual.clone(), w, 1e-6), F.rms_norm(x + residual, (width,), w, 1e-6)
                    ),
                )

            small_op("rms_norm", f"T{tokens}-K{width}", 4 * tokens * width, norms)
            small_op("add_rms_norm", f"T{tokens}-K{width}", 8 * tokens * width, add_norms)

        def ropes(tokens: int = tokens) -> tuple[Call, Call, Call]:
            q, k = normal(tokens, 32, 128), normal(tokens, 8, 128)
            table = rope.rotary_table(10000.0 ** (-torch.arange(0, 128, 2, device=DEVICE).float() / 128), 4096)
            positions = torch.arange(tokens, device=DEVICE) % 4096

            def plain() -> tuple[torch.Tensor, torch.Tensor]:
                cos, sin = table[positions][:, None, :].to(q.dtype).chunk(2, -1)
                turned = []
                for x in (q, k):
                    a, b = x.chunk(2, -1)
                    turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
                return turned[0], turned[1]

            def right() -> None:
                expected = plain()
                ours = q.clone(), k.clone()
                rope.rope(*ours, positions, table)
                close(ours[0], expected[0])
                close(ours[1], expected[1])

            return lambda: rope.rope(q, k, positions, table), plain, right

        def gates(tokens: int = tokens) -> tuple[Call, Call, Call]:
            merged, out = normal(tokens, 2 * 12288), normal(tokens, 12288)
            gate, up = merged.chunk(2, -1)
            return (
                lambda: activation.swiglu(merged, out),
                lambda: F.silu(gate) * up,
                lambda: close(activation.swiglu(merged), F.silu(gate) * up),
            )

        def writes(tokens: int = tokens) -> tuple[Call, Call, Call]:
            k, v, k_cache, v_cache = (normal(n, 8, 128) for n in (tokens, tokens, 2 * tokens, 2 * tokens))
            slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
            narrow = slots.int()

            def right() -> None:
                kv_cache.write(k, v, k_cache, v_cache, narrow)
                assert torch.equal(k_cache[slots], k)
                assert torch.equal(v_cache[slots], v)

            return (
                lambda: kv_cache.write(k, v, k_cache, v_cache, narrow),
                lambda: (k_cache.index_copy_(0, slots, k), v_cache.index_copy_(0, slots, v)),
                right,
            )

        def turned(tokens: int = tokens) -> tuple[Call, Call, Call]:
            rows, kept = normal(tokens, 48, 128), normal(2, 2 * tokens, 8, 128)
            q, k, v = rows[:, :32], rows[:, 32:40], rows[:, 40:]
            table = rope.rotary_table(10000.0 ** (-torch.arange(0, 128, 2, device=DEVICE).float() / 128), 4096)
            positions, slots = (
                torch.arange(tokens, device=DEVICE) % 4096,
                torch.randperm(2 * tokens, device=DEVICE)[:tokens].int(),
            )
            weights = normal(128), normal(128)

            def parts() -> None:
                for x, weight in zip((q, k), weights, strict=True):
                    norm.rms_norm(x, weight, 1e-6, x)
                rope.rope(q, k, positions, table)
                kv_cache.write(k, v, kept[0], kept[1], slots)

            def ours() -> None:
                norms = (weights[0], 1e-6), (weights[1], 1e-6)
                rope.norm_rope_write(q, k, v, positions, table, kept[0], kept[1], slots, norms)

            def right() -> None:
                before = rows.clone()
                parts()
                expected = q.clone(), kept.clone()
                rows.copy_(before)
                ours()
                close(q, expected[0])
                close(kept, expected[1])

            return ours, parts, right

        small_op("rope", f"T{tokens}-H32-Hkv8-D128", 4 * tokens * 40 * 128, ropes)
        small_op("swiglu", f"T{tokens}-N12288", 6 * tokens * 12288, gates)
        small_op("kv_cache.write", f"T{tokens}-Hkv8-D128", 8 * tokens * 8 * 128, writes)
        small_op("norm_rope_write", f"T{tokens}-H32-Hkv8-D128", 4 * tokens * 48 * 128, turned, "four_ops")


def plain_label_head(hidden: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return hidden[rows].float() @ w[ids].float().T


def plain_logprobs(hidden: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.mm(hidden[rows], w.T).float().log_softmax(-1).gather(1, ids)


def head_cells(vocabulary: int, width: int, quick: bool) -> None:
    w = normal(vocabulary, width) * width**-0.5
    weight, hidden = pack(w), normal(8192, width)
    tables = [torch.randint(vocabulary, (4096,), device=DEVICE) for _ in range(4)]
    assert torch.equal(gather_rows(weight, tables[0]), w[tables[0]])
    contenders: dict[str, Sequence[Call]] = {
        "ours": [partial(gather_rows, weight, ids) for ids in tables],
        "torch": [partial(w.index_select, 0, ids) for ids in tables],
    }
    report("gather_rows", f"T4096-K{width}", race(contenders), moved=4 * 4096 * width)
    for count in (100, 500):
        rows, ids = torch.randint(8192, (count,), device=DEVICE), torch.randint(vocabulary, (2,), device=DEVICE)
        true = hidden[rows].double() @ w[ids].double().T
        assert (label_head(hidden, rows, weight, ids) - true).abs().max() <= 2.0**-18 * true.abs().max()
        contenders = {
            "ours": [partial(label_head, hidden, rows, weight, ids)] * 8,
            "torch": [partial(plain_label_head, hidden, rows, w, ids)] * 8,
        }
        report("label_head", f"R{count}-L2-K{width}", race(contenders), moved=2 * (count + 2) * width)
    for count in (16, 1024) if quick else (1, 16, 64, 1024, 4096):
        rows, ids = torch.arange(count, device=DEVICE), torch.randint(vocabulary, (count, 1), device=DEVICE)
        ours = token_logprobs(hidden, rows, weight, ids)
        some = hidden[: min(8, count)]
        true = F.linear(some.double(), w.double()).log_softmax(-1).gather(1, ids[:8])
        assert (ours[:8] - true).abs().max() <= 1e-4
        same = torch.equal(ours[-1:], token_logprobs(hidden, rows[-1:], weight, ids[-1:]))
        contenders = {
            "ours": [partial(token_logprobs, hidden, rows, weight, ids)] * 2,
            "torch": [partial(plain_logprobs, hidden, rows, w, ids)] * 2,
        }
        flops, moved = 2 * count * vocabulary * width, 2 * vocabulary * width
        case = f"R{count}-V{vocabulary}-K{width}"
        report("token_logprobs", case, race(contenders, 9), flops, moved, same_bits=same)


def bench_head(quick: bool) -> None:
    for width in (1024, 4096):
        with guarded(f"heads K{width}"):
            head_cells(151936, width, quick)


def plain_sample(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Temperature 0.8, then top_k, or top_p by a sort: what torch offers without a kernel of one's own."""
    if top_k:
        values, ids = (logits / 0.8).topk(top_k)
        return ids.gather(1, torch.multinomial(values.softmax(-1), 1))
    values, ids = (logits / 0.8).sort(dim=-1, descending=True)
    weights = values.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
    return ids.gather(1, torch.multinomial(weights, 1))


SAMPLING = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "plain": (0.8, 0, 1.0),
    "top_k-50": (0.8, 50, 1.0),
    "top_p-0.95": (0.8, 0, 0.95),
}


def bench_sampling(quick: bool) -> None:
    vocabulary = 151936
    for rows in (64,) if quick else (1, 64, 256):
        logits = [
            torch.randn(rows, vocabulary, device=DEVICE) * 3 for _ in range(num_copies(4 * rows * vocabulary, 16))
        ]
        ones = torch.ones(rows, device=DEVICE)
        for name, (temperature, top_k, top_p) in SAMPLING.items():
            with guarded(f"sampling {name} B{rows}"):
                settings = SamplingBatch(
                    ones * temperature, (ones * top_k).int(), ones * top_p, ones * 0, ones, ones * 0, ones * 0,
                    torch.arange(rows, device=DEVICE), torch.zeros(rows, device=DEVICE, dtype=torch.int64),
                )  # fmt: skip
                with use_backend("reference"):
                    expected = sample(
                        logits[0][:8], SamplingBatch(*(getattr(settings, f)[:8] for f in settings.__slots__))
                    )
                assert torch.equal(sample(logits[0], settings)[:8], expected), name
                peer = (
                    partial(plain_sample, top_k=top_k, top_p=top_p)
                    if name != "greedy"
                    else partial(torch.argmax, dim=-1)
                )
                contestants: dict[str, Sequence[Call]] = {
                    "ours": [partial(sample, x, settings) for x in logits], "torch": [partial(peer, x) for x in logits],
                }  # fmt: skip
                report("sampling", f"{name}-B{rows}-V{vocabulary}", race(contestants), moved=4 * rows * vocabulary)
