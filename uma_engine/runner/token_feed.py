"""The tokens that the last step drew, kept on the device: the next step begins with them before the host has seen them.

Knows output numbers and token ids; does not know requests, steps' arrays or how a token was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["TokenFeed"]


class TokenFeed:
    """One place for each output of a step, at a fixed address, for graphs."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)

    def keep(self, tokens: torch.Tensor, places: torch.Tensor | None = None) -> None:
        """These are the tokens [n] of the outputs numbered `places` [n] int64; None: of the first ones."""
        if places is None:
            self._tokens[: len(tokens)].copy_(tokens)
        else:
            self._tokens.index_copy_(0, places, tokens)

    def resolve(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] int64, those below 0 (`unknown_token`) replaced by what they stand for. A row without a token (its logits
        were not finite, and its request is about to end) goes on with token 0."""
        known = self._tokens.index_select(0, (-1 - input_ids).clamp_(min=0)).clamp_(min=0)
        return torch.where(input_ids < 0, known, input_ids)


def in_order(places: Sequence[int]) -> bool:
    """Whether these are the first output numbers, one after the other."""
    return all(place == number for number, place in enumerate(places))
