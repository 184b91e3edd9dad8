"""Moves by slot in plain torch: the specification."""

from __future__ import annotations

import torch


def write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    _check_range("slot_mapping", slot_mapping, -1, k_cache.shape[0])
    rows = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[rows].long()
    k_cache[slots] = k[rows]
    v_cache[slots] = v[rows]


def gather(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    _check_range("slots", slots, 0, cache.shape[0])
    out.copy_(cache[slots.long()])


def _check_range(name: str, slots: torch.Tensor, low: int, high: int) -> None:
    bad = ((slots < low) | (slots >= high)).nonzero()
    if bad.numel():
        index = int(bad[0, 0])
        raise IndexError(f"`{name}[{index}]` is {int(slots[index])}, outside {low} .. {high - 1}")
