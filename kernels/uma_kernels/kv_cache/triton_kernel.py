"""Moves of key and value rows by slot on a GPU.

Knows rows of one length; does not know heads or blocks. A slot out of range moves nothing: the caller checks where it asks to.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase

BLOCK = 1024


@triton.jit
def write_kernel(k, v, k_cache, v_cache, slots, S, width, stride_k, stride_v, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    keep = (offs < width) & (slot >= 0) & (slot < S)
    tl.store(k_cache + slot * width + offs, tl.load(k + row * stride_k + offs, keep), keep)
    tl.store(v_cache + slot * width + offs, tl.load(v + row * stride_v + offs, keep), keep)


@triton.jit
def gather_kernel(cache, slots, out, S, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    keep = (offs < width) & (slot >= 0) & (slot < S)
    tl.store(out + row * width + offs, tl.load(cache + slot * width + offs, keep), keep)


def write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    if k.numel():
        width = k.shape[1] * k.shape[2]
        write_kernel[(k.shape[0], triton.cdiv(width, BLOCK))](
            k, v, k_cache, v_cache, slot_mapping, k_cache.shape[0], width, k.stride(0), v.stride(0), BLOCK=BLOCK
        )


def gather(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel():
        width = out.shape[1] * out.shape[2]
        gather_kernel[(slots.shape[0], triton.cdiv(width, BLOCK))](
            cache, slots, out, cache.shape[0], width, BLOCK=BLOCK
        )


_TYPES = {"slots": "*i32", "S": "i32", "width": "i32:16", "stride_k": "i32:16", "stride_v": "i32:16"}
AOT_CASES = [
    AotCase("write", write_kernel, _TYPES | dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16"), {"BLOCK": BLOCK}),
    AotCase("gather", gather_kernel, _TYPES | dict.fromkeys(("cache", "out"), "*bf16"), {"BLOCK": BLOCK}),
]
