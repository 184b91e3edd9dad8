"""Moves by slot in C++ (csrc/cpu/kv_cache.cpp). Shapes are checked by the caller, slots here."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension


def write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    slots, kv_heads, head_dim = k_cache.shape
    bad = extension().kv_cache_write(
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), slot_mapping.data_ptr(),
        k.shape[0], slots, kv_heads * head_dim,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"`slot_mapping[{bad}]` is {int(slot_mapping[bad])}, outside -1 .. {slots - 1}")


def gather(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    num_slots, kv_heads, head_dim = cache.shape
    bad = extension().kv_cache_gather(
        cache.data_ptr(), slots.data_ptr(), out.data_ptr(), slots.shape[0], num_slots, kv_heads * head_dim
    )
    if bad >= 0:
        raise IndexError(f"`slots[{bad}]` is {int(slots[bad])}, outside 0 .. {num_slots - 1}")
