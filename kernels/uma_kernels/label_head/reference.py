"""Logits and log-probabilities of a few tokens in plain torch: the specification."""

from __future__ import annotations

import torch

from uma_kernels.linear import PackedLinear, gather_rows, linear


def label_head(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    out.copy_(hidden.index_select(0, rows).float() @ gather_rows(weight, token_ids).float().T)


def token_logprobs(
    hidden: torch.Tensor, rows: torch.Tensor, weight: PackedLinear, token_ids: torch.Tensor, out: torch.Tensor
) -> None:
    x = hidden.index_select(0, rows)
    if weight.backend == "reference" and weight.scales is None:
        logits = x.float() @ weight.data.float().T
    else:
        logits = linear(x, weight).float()
    out.copy_(logits.log_softmax(dim=1).gather(1, token_ids))
