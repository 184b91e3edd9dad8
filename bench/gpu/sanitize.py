"""Runs every GPU kernel once or twice on small tensors, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitize [OP...]

Knows the ops' public functions; does not know what their results should be: tests check that. The kernels that wait for each
other between programs (low-rank updates, matrix products that share K) run with several plans and shapes.
`PYTORCH_NO_CUDA_MEMORY_CACHING=1` makes each tensor an allocation of its own, so that a read past its end is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from bench.gpu.harness import require_gpu

BF16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def linear() -> None:
    from uma_kernels.activation import geglu_tanh, swiglu
    from uma_kernels.linear import FP8, gated_linear, gather_rows, pack
    from uma_kernels.linear import linear as product

    for dtype in (BF16, torch.float32):
        for rows, n, k in ((1, 96, 256), (37, 200, 136), (300, 256, 512)):
            weight = pack(randn(n, k, dtype=dtype))
            product(randn(rows, k, dtype=dtype), weight, randn(n, dtype=dtype))
            product(randn(rows, k, dtype=dtype), weight, out=randn(rows, n, dtype=dtype), add=True)
            for act in (swiglu, geglu_tanh):
                gated_linear(randn(rows, k, dtype=dtype), weight, act, randn(n, dtype=dtype))
            gather_rows(weight, torch.randint(n, (rows,)))
    eight_bit = pack(randn(128, 256), FP8)
    product(randn(33, 256), eight_bit)
    gated_linear(randn(33, 256), eight_bit, swiglu)


def lora() -> None:
    from uma_kernels.linear import pack
    from uma_kernels.lora import DeviceRouting, LoraPool, lora_linear, lora_merged

    k, slices, slots = 1024, (128, 64, 64), 5
    for storage in ("dense", "fp8", "int4"):
        pool = LoraPool(k, slices, slots, 16, max_rank=64, storage=storage)
        for slot, rank in enumerate((8, 16, 33)):
            pool.load(slot, [(randn(rank, k), randn(n, rank), 0.5) if n != 64 or slot else None for n in slices])
        routing = DeviceRouting(400, slots, [pool])
        weight, bias = randn(sum(slices), k), randn(sum(slices))
        sites = [pack(weight, mode=mode) for mode in ("audit", "fast")]  # one form for all rows; one launch for few
        for tokens in (1, 16, 63, 256, 400):
            routing.build(torch.randint(-1, slots, (tokens,), dtype=torch.int32))
            x, out = randn(tokens, k), randn(tokens, sum(slices))
            for _ in range(2):  # the second run meets the counters that the first left behind
                lora_merged(x, out, pool, routing)
                for site in sites:
                    lora_linear(x, site, bias, out, pool, routing)


def attention() -> None:
    from uma_kernels.attention import AttentionBatch, paged_decode, tree_attention, triton_kernel

    heads, kv_heads, slots = 4, 2, 2048
    for head_dim in (64, 128):
        cache = randn(2, slots, kv_heads, head_dim)
        lens_q, cached = (70, 1, 33, 40), (0, 150, 100, 100)
        rows, contexts = 0, []
        for n, above in zip(lens_q, cached, strict=True):
            own = -1 - torch.arange(rows, rows + n, dtype=torch.int32)
            contexts.append(torch.cat([torch.arange(above, dtype=torch.int32), own]))
            rows += n
        starts_q = torch.tensor([0, *lens_q], device="cpu").cumsum(0).to("cpu", torch.int32)
        starts_k = torch.tensor([0, *map(len, contexts)], device="cpu").cumsum(0).to("cpu", torch.int32)
        batch = AttentionBatch(starts_q, torch.cat(contexts).cpu(), starts_k)
        q, k, v = (randn(rows, h, head_dim) for h in (heads, kv_heads, kv_heads))
        for window in (None, 48):
            tree_attention(q, k, v, cache[0], cache[1], batch, head_dim**-0.5, window)
            table = torch.randperm(128, dtype=torch.int32)[:96].view(3, 32)
            lens = torch.tensor([1, 300, 512], dtype=torch.int32)
            many = triton_kernel.DECODE_PROGRAMS
            for programs in (many, 1):  # a program a split, and one for all of a sequence's
                triton_kernel.DECODE_PROGRAMS = programs
                paged_decode(q[:3].contiguous(), cache[0], cache[1], table, lens, 16, head_dim**-0.5, window)
            triton_kernel.DECODE_PROGRAMS = many


def small() -> None:
    """Norms, rotary positions, activations, cache writes, label logits."""
    from uma_kernels import kv_cache
    from uma_kernels.activation import geglu_tanh, swiglu
    from uma_kernels.label_head import label_head, token_logprobs
    from uma_kernels.linear import pack
    from uma_kernels.norm import add_rms_norm, rms_norm
    from uma_kernels.rope import norm_rope_write, rope, rotary_table

    tokens, width, heads, head_dim = 37, 320, 5, 64
    x, weight = randn(tokens, width), randn(width)
    rms_norm(x, weight, 1e-6)
    add_rms_norm(x, randn(tokens, width), weight, 1e-6)
    swiglu(x)
    geglu_tanh(x)
    q, k = randn(tokens, heads, head_dim), randn(tokens, 1, head_dim)
    table = rotary_table(torch.rand(head_dim // 2, dtype=torch.float32), 64)
    rope(q, k, torch.randint(64, (tokens,)), table)
    cache = randn(2, 64, 1, head_dim)
    slots = torch.cat([torch.randperm(64)[: tokens - 1], torch.tensor([-1])]).to(torch.int32)
    kv_cache.write(k, k, cache[0], cache[1], slots)
    kv_cache.gather(cache[0], slots[:5])
    norm = randn(head_dim), 1e-6
    norm_rope_write(q, k, k, torch.randint(64, (tokens,)), table, cache[0], cache[1], slots, (norm, norm))
    head = pack(randn(1000, width))
    rows, ids = torch.randint(tokens, (9,)), torch.randint(1000, (2,))
    label_head(x, rows, head, ids)
    token_logprobs(x, rows, head, torch.randint(1000, (9, 3)))


def topk() -> None:
    from uma_kernels.topk import maxsim, pack_corpus
    from uma_kernels.topk import topk as search

    rows = randn(5000, 384, dtype=torch.float32)
    for form in ("fp32", "bf16", "fp8", "int8"):
        corpus = pack_corpus(rows, form)
        for queries in (1, 20):
            search(randn(queries, 384, dtype=torch.float32), corpus, 17)
    ends = torch.tensor([0, 5, 37])
    maxsim(randn(37, 128), ends, randn(37, 128), ends)


def sampling() -> None:
    """Rows of every kind in one call: the largest, a draw from all, short and long cuts, what is masked, seen or not finite."""
    from uma_kernels.sampling import SamplingBatch, sample

    rows, vocabulary = 7, 20_000
    logits = 3 * randn(rows, vocabulary, dtype=torch.float32)
    logits[5, 11] = float("nan")
    mask = torch.rand(rows, vocabulary) < 0.5
    zeros, ones = torch.zeros(rows), torch.ones(rows)
    batch = SamplingBatch(
        temperature=torch.tensor([0.0, 1.0, 0.8, 0.8, 0.7, 1.0, 1.0]),
        top_k=torch.tensor([0, 0, 50, 0, 900, 0, 40], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.95, 0.9, 1.0, 0.5]),
        min_p=0.01 * ones,
        repetition_penalty=1.2 * ones,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        seeds=torch.arange(rows),
        steps=torch.arange(rows),
    )
    seen = (torch.arange(9), torch.ones(9, dtype=torch.int32))
    for chosen in (None, mask):
        sample(logits, batch, [seen] * rows, chosen)
    sample(torch.zeros(rows, vocabulary), batch)  # all alike: no list is long enough


OPS: dict[str, Callable[[], None]] = {op.__name__: op for op in (linear, lora, attention, small, topk, sampling)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run each GPU kernel on small tensors.")
    parser.add_argument("ops", nargs="*", help="default: all")
    chosen = parser.parse_args().ops or list(OPS)
    require_gpu()
    torch.manual_seed(0)
    failed = []
    with torch.device("cuda"), torch.inference_mode():
        for name in chosen:
            try:
                OPS[name]()
                torch.cuda.synchronize()
                print(f"sanitize {name}: ran")
            except Exception as error:  # the others are still of use
                failed.append(name)
                print(f"sanitize {name}: {type(error).__name__}: {error}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
