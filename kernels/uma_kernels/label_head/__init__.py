"""Logits of a few tokens at a few rows: all of the vocabulary that scoring needs.

Knows rows, token ids and the output matrix; does not know what the labels mean.
"""

from __future__ import annotations

import torch

from uma_kernels.check import check
from uma_kernels.label_head import cpp, reference
from uma_kernels.linear import PackedLinear

__all__ = ["label_head"]


def label_head(hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Semantics:  out[r, l] = hidden[rows[r]] . w[token_ids[l]]
    Shapes:     hidden [T, K] . rows [R] int64 . weight [V, K] . token_ids [L] int64 . out [R, L] fp32
    Numerics:   fp32; cpp: batch-invariant: one order of summing, whatever R and L
    Errors:     IndexError when a row or a token id is out of range, ShapeError when shapes or dtypes do not fit
    """
    check("hidden", hidden, (None, weight.shape[1]))
    check("rows", rows, (None,), torch.int64)
    check("token_ids", token_ids, (None,), torch.int64)
    out = torch.empty(rows.shape[0], token_ids.shape[0], dtype=torch.float32, device=hidden.device)
    (cpp if weight.backend == "cpp" else reference).label_head(hidden, rows, weight, token_ids, out)
    return out
