"""Drawing the next token of each row from its logits.

Knows logits, sampling parameters and a counter-based random number; does not know requests, grammars or stop words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uma_kernels.check import check, check_indices, readable
from uma_kernels.dispatch import choose
from uma_kernels.sampling import cpp, reference

__all__ = ["SamplingBatch", "TokenCounts", "sample"]

# Ids [M] int64, each at most once, and how often each was generated [M] int32: 0 for an id that only the prompt holds.
TokenCounts = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """The sampling parameters of B rows, one element a row.

    Semantics:  temperature 0: the largest logit; top_k 0 or less, top_p 1, min_p 0, repetition_penalty 1,
                presence_penalty 0, frequency_penalty 0: off. seeds and steps name the random number of the row
    Shapes:     temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty [B] fp32 .
                top_k [B] int32 . seeds, steps [B] int64
    Errors:     ShapeError when shapes do not fit . ValueError when a parameter is out of range (on a GPU: where values are
                `readable`)
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    seeds: torch.Tensor
    steps: torch.Tensor

    def __post_init__(self) -> None:
        rows = tuple(self.temperature.shape)
        check("temperature", self.temperature, (None,))
        for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check(name, getattr(self, name), rows)
        check("top_k", self.top_k, rows, torch.int32)
        check("seeds", self.seeds, rows, torch.int64)
        check("steps", self.steps, rows, torch.int64)
        infinity = float("inf")
        _check_range("temperature", self.temperature, lambda t: 0 <= t < infinity, "at least 0 and finite")
        _check_range("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
        _check_range("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1")
        _check_range("repetition_penalty", self.repetition_penalty, lambda r: 0 < r < infinity, "above 0 and finite")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_range(name, getattr(self, name), lambda x: -infinity < x < infinity, "finite")


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    token_counts: Sequence[TokenCounts | None] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Semantics:  one token a row, in this order: tokens with mask False are removed; for the ids in token_counts
                logit = logit / r if logit > 0 else logit * r, and for those generated (count > 0)
                logit -= frequency_penalty * count + presence_penalty; logits / temperature; the top_k largest stay (of
                equals the lowest index); of these the fewest largest whose probabilities reach top_p; of these the ones
                with at least min_p times the largest probability; then the first token, in index order, at which the
                cumulative probability exceeds u(seed, step). Temperature 0: the largest logit (of equals the lowest
                index)
    Shapes:     logits [B, V] fp32, unchanged . mask [B, V] bool . -> [B] int64
    Numerics:   fp32 weights, fp64 cumulative sums; a row's draw depends on the row alone
    Errors:     ShapeError when shapes do not fit . ValueError when a row holds a NaN or +inf, or no token is left in
                it . IndexError when an id of token_counts is outside 0 .. V - 1. On a GPU where values are not `readable`
                the first gives the token -1, the second -2, and such an id changes nothing
    """
    check("logits", logits, (None, None))
    rows = logits.shape[0]
    check("temperature", batch.temperature, (rows,))
    if mask is not None:
        check("mask", mask, tuple(logits.shape), torch.bool)
    if token_counts is not None:
        if len(token_counts) != rows:
            raise ValueError(f"`token_counts` has {len(token_counts)} entries but `logits` has {rows} rows")
        for entry in token_counts:
            if entry is not None:
                check("token_counts ids", entry[0], (None,), torch.int64)
                check("token_counts counts", entry[1], tuple(entry[0].shape), torch.int32)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    name = choose("sampling", logits.device.type)
    if name != "triton":
        (cpp if name == "cpp" else reference).sample(logits, batch, token_counts, mask, out)
        return out
    from uma_kernels.sampling import triton_kernel

    for row, entry in enumerate(token_counts or ()):
        if entry is not None:
            check_indices(f"token_counts[{row}]", entry[0], 0, logits.shape[1])
    triton_kernel.sample(logits, batch, token_counts, mask, out)
    if readable(out):
        for row, token in enumerate(out.tolist()):
            if token < 0:
                bad = token == triton_kernel.NOT_FINITE
                what = "holds a NaN or +inf" if bad else "has no token left: all are masked or -inf"
                raise ValueError(f"`logits[{row}]` {what}")
    return out


def _check_range(name: str, values: torch.Tensor, accepts: Callable[[float], bool], wanted: str) -> None:
    if not readable(values):
        return
    for row, value in enumerate(values.tolist()):
        if not accepts(value):
            raise ValueError(f"`{name}[{row}]` is {value} but must be {wanted}")
