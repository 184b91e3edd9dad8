"""Logits of a few tokens in plain torch: the specification."""

from __future__ import annotations

import torch

from uma_kernels.linear import PackedLinear, gather_rows


def label_head(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    out.copy_(hidden.index_select(0, rows) @ gather_rows(weight, token_ids).T)
