"""Logits of a few tokens in C++ (csrc/cpu/label_head.cpp). Shapes are checked by the caller."""

from __future__ import annotations

import torch

from uma_kernels.dispatch import extension
from uma_kernels.linear import PackedLinear


def label_head(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    tokens, labels = hidden.shape[0], token_ids.shape[0]
    good = extension().label_head(
        *weight.handle,
        hidden.data_ptr(),
        tokens,
        rows.data_ptr(),
        rows.shape[0],
        token_ids.data_ptr(),
        labels,
        out.data_ptr(),
    )
    if not good:
        raise IndexError(
            f"`rows` {rows.tolist()} must be in 0 .. {tokens - 1}"
            f" and `token_ids` {token_ids.tolist()} in 0 .. {weight.shape[0] - 1}"
        )
