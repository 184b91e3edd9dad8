"""Logits and log-probabilities of a few tokens at a few rows: all of the vocabulary that scoring needs.

Knows rows, token ids and the output matrix; does not know what the tokens mean.
"""

from __future__ import annotations

import torch

from uma_kernels.check import check, check_indices
from uma_kernels.label_head import cpp, reference
from uma_kernels.linear import PackedLinear

__all__ = ["label_head", "token_logprobs"]


def label_head(hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Semantics:  out[r, l] = hidden[rows[r]] . w[token_ids[l]]
    Shapes:     hidden [T, K] of `weight.dtype` . rows [R] int64 . weight [V, K] . token_ids [L] int64 . out [R, L] fp32
    Numerics:   fp32; cpp and triton: batch-invariant: one order of summing, whatever R and L. An 8-bit weight is
                multiplied as dequantised, and rows of `hidden` as they are
    Errors:     IndexError when a row or a token id is out of range (on a GPU: where values are `readable`; else its logits
                are left unwritten), ShapeError when shapes or dtypes do not fit
    """
    check("hidden", hidden, (None, weight.shape[1]), weight.dtype)
    check("rows", rows, (None,), torch.int64)
    check("token_ids", token_ids, (None,), torch.int64)
    out = torch.empty(rows.shape[0], token_ids.shape[0], dtype=torch.float32, device=hidden.device)
    if weight.backend == "triton":
        from uma_kernels.label_head import triton_kernel

        check_indices("rows", rows, 0, hidden.shape[0])
        check_indices("token_ids", token_ids, 0, weight.shape[0])
        triton_kernel.label_head(hidden, rows, weight, token_ids, out)
    else:
        (cpp if weight.backend == "cpp" else reference).label_head(hidden, rows, weight, token_ids, out)
    return out


def token_logprobs(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor
) -> torch.Tensor:
    """
    Semantics:  out[r, c] = log_softmax(hidden[rows[r]] @ w.T)[token_ids[r, c]], over the whole vocabulary
    Shapes:     hidden [T, K] of `weight.dtype` . rows [R] int64 . weight [V, K] . token_ids [R, C] int64 . out [R, C] fp32
    Numerics:   fp32; at most 0. triton: batch-invariant, and the logits [R, V] are never stored: each tile of tokens gives
                its largest logit and its sum of exponentials (Milakov and Gimelshein, arXiv 1805.02867), and these are
                summed in the order of the vocabulary. cpp has none of its own: it takes the product of `linear`
    Errors:     IndexError when a row or a token id is out of range (on a GPU: where values are `readable`; else its result
                is undefined), ShapeError when shapes or dtypes do not fit
    """
    check("hidden", hidden, (None, weight.shape[1]), weight.dtype)
    check("rows", rows, (None,), torch.int64)
    check("token_ids", token_ids, (rows.shape[0], None), torch.int64)
    check_indices("rows", rows, 0, hidden.shape[0])
    check_indices("token_ids", token_ids, 0, weight.shape[0])
    out = torch.empty(token_ids.shape, dtype=torch.float32, device=hidden.device)
    if weight.backend == "triton":
        from uma_kernels.label_head import triton_kernel

        triton_kernel.token_logprobs(hidden, rows, weight, token_ids, out)
    else:
        reference.token_logprobs(hidden, rows, weight, token_ids, out)
    return out
