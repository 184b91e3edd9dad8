"""Low-rank updates for a batch in which each row names its adapter, or none.

Knows rows, slots and factors; does not know where adapters come from or which request a row belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uma_kernels.check import ShapeError, check
from uma_kernels.dispatch import choose
from uma_kernels.lora import cpp, reference

__all__ = ["LoraRouting", "PackedLora", "lora", "pack_lora"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLora:
    """The two factors of one adapter at one layer, prepared for `backend`."""

    backend: str
    rank: int
    in_features: int  # K
    out_features: int  # N
    data: tuple[torch.Tensor, ...]  # cpp: one uint8 buffer, see csrc/cpu/lora.h; reference: lora_a, scaling * lora_b
    address: int  # of the cpp buffer, else 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.data)


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> PackedLora:
    """
    Semantics:  prepares the update scaling * lora_b @ lora_a of a layer
    Shapes:     lora_a [R, K] fp32 . lora_b [N, R] fp32, none of them 0
    Errors:     ShapeError when the factors do not fit together or are empty
    """
    check("lora_a", lora_a, (None, None))
    check("lora_b", lora_b, (None, lora_a.shape[0]))
    if not lora_a.numel() or not lora_b.numel():
        raise ShapeError(f"`lora_a` {list(lora_a.shape)} and `lora_b` {list(lora_b.shape)} must not be empty")
    backend = choose("lora", lora_a.device.type)
    data, address = (cpp if backend == "cpp" else reference).pack_lora(lora_a, lora_b, scaling)
    return PackedLora(backend, lora_a.shape[0], lora_a.shape[1], lora_b.shape[0], data, address)


@dataclass(frozen=True, slots=True, eq=False)
class LoraRouting:
    """Which rows of a batch each slot's adapter takes: built once a step, read by every layer.

    Rows of slot `slots[i]` are `order[offsets[i]:offsets[i + 1]]`, ascending; rows without adapter are not in `order`.
    """

    num_tokens: int
    slots: tuple[int, ...]  # that have rows, ascending
    order: torch.Tensor  # [rows with an adapter] int32
    offsets: torch.Tensor  # [len(slots) + 1] int32

    @classmethod
    def build(cls, token_lora_mapping: Sequence[int] | torch.Tensor, num_slots: int) -> LoraRouting:
        """
        Semantics:  groups the rows by slot
        Shapes:     token_lora_mapping [T], int32 tensor or integers: a slot 0 .. num_slots - 1, or -1 for the base
        Errors:     IndexError when a slot is out of range
        """
        mapping = torch.as_tensor(token_lora_mapping, dtype=torch.int32)
        if mapping.numel() and not -1 <= int(mapping.min()) <= int(mapping.max()) < num_slots:
            raise IndexError(
                f"`token_lora_mapping` holds {int(mapping.min())} .. {int(mapping.max())}"
                f" but must be in -1 .. {num_slots - 1}"
            )
        counts = torch.bincount(mapping + 1, minlength=num_slots + 1)
        slots = torch.nonzero(counts[1:]).flatten()
        order = torch.argsort(mapping, stable=True)[int(counts[0]) :].to(torch.int32)
        offsets = torch.zeros(len(slots) + 1, dtype=torch.int32)
        offsets[1:] = counts[1:][slots].cumsum(0)
        return cls(mapping.numel(), tuple(slots.tolist()), order, offsets)

    @property
    def is_empty(self) -> bool:
        """No row has an adapter."""
        return not self.slots


def lora(x: torch.Tensor, out: torch.Tensor, adapters: Sequence[PackedLora | None], routing: LoraRouting) -> None:
    """
    Semantics:  out[t] += scaling[a] * (x[t] @ lora_a[a].T) @ lora_b[a].T  in place, where a is the slot of row t;
                a row without a slot, or whose slot holds None, keeps its value
    Shapes:     x [T, K] . adapters[a]: lora_a [R_a, K], lora_b [N, R_a], any ranks . out [T, N], apart from `x`
    Numerics:   fp32 accumulate; cpp: batch-invariant: the update is summed from 0 in a fixed order and added once
    Errors:     ShapeError when shapes do not fit or an adapter was packed for another back end; IndexError when a slot
                has no entry in `adapters`
    Source:     Punica (arXiv 2310.18547); S-LoRA (arXiv 2311.03285)
    """
    check("x", x, (routing.num_tokens, None))
    check("out", out, (routing.num_tokens, None))
    if routing.is_empty:
        return
    chosen = [adapters[slot] for slot in routing.slots]
    expected = (choose("lora", x.device.type), x.shape[1], out.shape[1])
    for slot, adapter in zip(routing.slots, chosen, strict=True):
        if adapter is None:
            continue
        actual = (adapter.backend, adapter.in_features, adapter.out_features)
        if actual != expected:
            raise ShapeError(f"the adapter in slot {slot} has back end, K, N {actual} but the batch needs {expected}")
    (cpp if expected[0] == "cpp" else reference).lora(x, out, chosen, routing.order, routing.offsets)
