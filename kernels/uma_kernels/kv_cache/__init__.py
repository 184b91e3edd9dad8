"""Moves of key and value rows between a step and the cache, by slot.

Knows slots; does not know blocks, requests or who may overwrite what.
"""

from __future__ import annotations

from types import ModuleType

import torch

from uma_kernels.check import FLOATS, check, check_indices
from uma_kernels.dispatch import choose
from uma_kernels.kv_cache import cpp, reference

__all__ = ["copy", "gather", "write"]


def write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """
    Semantics:  k_cache[slot_mapping[t]] = k[t], likewise v; rows with slot -1 are skipped; no slot occurs twice
    Shapes:     k, v [T, Hkv, D], their rows at any stride . k_cache, v_cache [S, Hkv, D] . slot_mapping [T] int32
    Numerics:   exact
    Errors:     ShapeError when shapes do not fit . IndexError when a slot is outside -1 .. S - 1: nothing is
                written then
    """
    check("k_cache", k_cache, (None, None, None), FLOATS)
    row = tuple(k_cache.shape[1:])
    check("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype)
    check("k", k, (None, *row), k_cache.dtype, strided=True)
    check("v", v, tuple(k.shape), k_cache.dtype, strided=True)
    check("slot_mapping", slot_mapping, (k.shape[0],), torch.int32)
    backend = _backend(k)
    if backend not in (cpp, reference):  # these two look at every slot themselves
        check_indices("slot_mapping", slot_mapping, -1, k_cache.shape[0])
    backend.write(k, v, k_cache, v_cache, slot_mapping)


def gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """
    Semantics:  out[m] = cache[slots[m]]
    Shapes:     cache [S, Hkv, D] . slots [M] int32 -> [M, Hkv, D]
    Numerics:   exact
    Errors:     ShapeError when shapes do not fit . IndexError when a slot is outside 0 .. S - 1
    """
    check("cache", cache, (None, None, None), FLOATS)
    check("slots", slots, (None,), torch.int32)
    out = torch.empty(slots.shape[0], *cache.shape[1:], dtype=cache.dtype, device=cache.device)
    backend = _backend(cache)
    if backend not in (cpp, reference):
        check_indices("slots", slots, 0, cache.shape[0])
    backend.gather(cache, slots, out)
    return out


def copy(k_cache: torch.Tensor, v_cache: torch.Tensor, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
    """
    Semantics:  k_cache[dst_slots[m]] = k_cache[src_slots[m]], likewise v; all are read before any is written
    Shapes:     k_cache, v_cache [S, Hkv, D] . src_slots, dst_slots [M] int32
    Numerics:   exact
    Errors:     ShapeError when shapes do not fit . IndexError when a slot is out of range: then nothing is written
    """
    check("dst_slots", dst_slots, tuple(src_slots.shape), torch.int32)
    write(gather(k_cache, src_slots), gather(v_cache, src_slots), k_cache, v_cache, dst_slots)


def _backend(x: torch.Tensor) -> ModuleType:
    backend = choose("kv_cache", x.device.type)
    if backend == "triton":
        from uma_kernels.kv_cache import triton_kernel

        return triton_kernel
    return cpp if backend == "cpp" and x.dtype is torch.float32 else reference
