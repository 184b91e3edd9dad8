"""Sampling in C++ (csrc/cpu/sampling.cpp). Shapes are checked by the caller, values here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from uma_kernels.check import ptr
from uma_kernels.dispatch import extension

if TYPE_CHECKING:
    from uma_kernels.sampling import SamplingBatch, TokenCounts


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_counts: Sequence[TokenCounts | None] | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    rows, vocab = logits.shape
    seen = None
    if token_counts is not None and any(entry is not None for entry in token_counts):
        addresses = [(e[0].data_ptr(), e[1].data_ptr(), e[0].shape[0]) if e else (0, 0, 0) for e in token_counts]
        seen = torch.tensor(addresses, dtype=torch.int64)
    bad, why = extension().sample(
        logits.data_ptr(), ptr(mask), ptr(seen), out.data_ptr(), rows, vocab,
        batch.temperature.data_ptr(), batch.top_k.data_ptr(), batch.top_p.data_ptr(), batch.min_p.data_ptr(),
        batch.repetition_penalty.data_ptr(), batch.presence_penalty.data_ptr(), batch.frequency_penalty.data_ptr(),
        batch.seeds.data_ptr(), batch.steps.data_ptr(),
    )  # fmt: skip
    if why == "id":
        raise IndexError(f"`token_counts[{bad}]` names ids outside 0 .. {vocab - 1}")
    if why == "nan":
        raise ValueError(f"`logits[{bad}]` holds a NaN or +inf")
    if why == "empty":
        raise ValueError(f"`logits[{bad}]` has no token left: all are masked or -inf")
