"""What a step brought, in the order in which it happened, and running totals.

Knows requests and results; does not know who listens.
"""

from __future__ import annotations

from dataclasses import dataclass

from uma_engine.core import FinishReason, Request

__all__ = ["Counters", "Event", "Finished", "ScoreReady", "TokenReady"]


@dataclass(slots=True)
class ScoreReady:
    """The label logits at the end of one scored segment, in the order of `request.label_token_ids`."""

    request: Request
    segment_index: int
    logits: list[float]


@dataclass(slots=True)
class TokenReady:
    """One more output token, the request's number `position`. `finish_reason` is set on the last one: STOP (the token is a stop
    token) or LENGTH. A token id below 0 is not known yet: see `Scheduler.settle`.
    """

    request: Request
    token_id: int
    position: int
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Finished:
    """The request is over and holds nothing any more. `error` is what stopped it where the reason is ERROR."""

    request: Request
    reason: FinishReason
    error: BaseException | None = None


Event = ScoreReady | TokenReady | Finished


@dataclass(slots=True)
class Counters:
    """accepted = finished + cancelled + failed + waiting + running, at all times. Tokens count every computation."""

    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0  # errors and passed deadlines
    preempted: int = 0  # preemptions, not requests
    computed_tokens: int = 0
    cached_tokens: int = 0
