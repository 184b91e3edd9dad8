"""What the public calls return.

Knows scores, usage and digests; does not know how they were computed. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from uma_engine.core import FinishReason
from uma_engine.decision_log.types import Logged
from uma_engine.ranking.assessment import Assessment
from uma_engine.ranking.bounds import Bounds
from uma_engine.ranking.ledger import Factor, LedgerLine
from uma_engine.ranking.redaction import Redaction

__all__ = [
    "AdapterUse",
    "Completion",
    "CompletionChunk",
    "Deliberation",
    "Factor",
    "Note",
    "RankAnswer",
    "RankResult",
    "Score",
    "StackInfo",
    "Stage",
    "SurfaceAnswer",
    "SurfaceResult",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a call cost; fields as in `Usage`. `seconds` by the clock, from its begin to its end."""

    name: str  # e.g. "tokenize", "score"
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    flops: float = 0.0
    attention_flops: float = 0.0
    seconds: float = 0.0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of one call. Tokens a candidate shares with the others count once in `computed_tokens`.

    `prompt_tokens` is what one prompt a candidate would have held in all; of these `computed_tokens` went through the
    model and `reused_tokens` did not: shared within the call, or taken from the prefix cache (`cached_tokens`).
    `flops` are those of the base's linear layers, `attention_flops` those of attention's two products; adapters, norms and label
    heads are not counted. Times are in seconds; `inference_time` runs from submission to the last score. `core_seconds` is
    processor time of the engine's threads, `gpu_seconds` time for which a step had the device (by the host's clock): a step that
    several calls share is charged to them by their tokens. `stages` splits all of it; every counter is the sum over the stages.
    """

    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int
    output_tokens: int
    flops: float
    tokenization_time: float
    inference_time: float
    attention_flops: float = 0.0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    stages: tuple[Stage, ...] = ()

    @property
    def reused_tokens(self) -> int:
        return max(0, self.prompt_tokens + max(0, self.output_tokens - 1) - self.computed_tokens)

    @property
    def total_time(self) -> float:
        return self.tokenization_time + self.inference_time


@dataclass(frozen=True, slots=True)
class StackInfo:
    """Which model answered: names for people, digests for machines."""

    model: str
    base_digest: str
    tokenizer_digest: str
    template_digest: str
    adapter: str | None
    adapter_digest: str | None
    backend: str  # e.g. "cpp-avx2": bits are the same only within one back end
    version: str


@dataclass(frozen=True, slots=True)
class Score:
    """Label logits and probabilities of one item, in the order of `labels`; probabilities sum to 1 over the labels alone."""

    labels: tuple[str, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    @property
    def value(self) -> float:
        """Probability of the first label."""
        return self.probabilities[0]


@dataclass(frozen=True, slots=True)
class RankResult:
    """One candidate's place: `index` is its position in the input, `score` the probability of the first label.

    `truncated_tokens` were cut from the end of the candidate's own text; the score does not know them.
    """

    index: int
    id: str
    score: float
    logits: tuple[float, ...]
    truncated_tokens: int
    ledger: tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """What was noted about one candidate before the probes were read again, and what that changed. Places count from 1."""

    index: int
    id: str
    text: str
    token_ids: tuple[int, ...]
    score_before: float
    logits_before: tuple[float, ...]
    place_before: int
    score: float
    place: int


@dataclass(frozen=True, slots=True)
class Deliberation:
    """`notes` in the order after them. `kendall_tau` compares the scores before and after; `moved` counts changed places."""

    notes: tuple[Note, ...]
    order_before: tuple[int, ...]
    order: tuple[int, ...]
    kendall_tau: float
    moved: int


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """Who was read to the end (`whole`), who only in part (`eliminated`), and who `not_looked_at` at all because a deadline or a budget
    ended the ranking (`stopped_by`); positions in the input. Scores of the eliminated are those of their first tokens; with
    bounds of no tokens they have none, and are not among the results."""

    bounds: Bounds
    top: int
    whole: tuple[int, ...]
    eliminated: tuple[int, ...]
    not_looked_at: tuple[int, ...]
    waves: int
    stopped_by: str | None


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """`results` sorted by score, ties by index, at most `top_n`; `all_results` has everyone in input order.

    With `explain="words"` the shortlist's `assessments`, best first; with `deliberate` what the notes changed: the shortlist's
    scores are those after them, and it keeps the places that it took. `usage.stages` says what each stage cost. With `cascade`
    those read to the end come first, and `all_results` lacks who was not looked at.
    """

    results: tuple[RankResult, ...]
    all_results: tuple[RankResult, ...]
    usage: Usage
    stack: StackInfo
    warnings: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False, default_factory=dict)
    logged: Logged | None = None  # where the record went, with the engine's option `decision_log`
    assessments: tuple[Assessment, ...] = ()
    deliberation: Deliberation | None = None
    cascade: CascadeReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the decision record."""
        return ({} if self.logged is None else {"logged": asdict(self.logged)}) | {
            "results": [asdict(r) for r in self.results],
            "all_results": [
                {"index": r.index, "id": r.id, "score": r.score, "truncated_tokens": r.truncated_tokens}
                for r in self.all_results
            ],
            "usage": asdict(self.usage)
            | {"reused_tokens": self.usage.reused_tokens, "total_time": self.usage.total_time},
            "stack": asdict(self.stack),
            "warnings": list(self.warnings),
            "assessments": [a.to_dict() for a in self.assessments],
            "deliberation": asdict(self.deliberation) if self.deliberation else None,
            "cascade": asdict(self.cascade) if self.cascade else None,
        }


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter that read for a surface: its name then, its content, and the directory it came from."""

    name: str
    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class SurfaceResult(RankResult):
    """One candidate's place on a surface. `ledger` holds all that made the score; `logits` are those of all reads, in order.

    `place` is 1 for the best and shared by `tied_with` others, whose scores differ by less than the surface's resolution.
    `redactions` are the spans of the candidate's text, blanks around it taken off, that no read has seen.
    """

    ledger: tuple[LedgerLine, ...]
    place: int
    tied_with: int
    redactions: tuple[Redaction, ...]


@dataclass(frozen=True, slots=True)
class SurfaceAnswer(RankAnswer):
    """As `RankAnswer`; `results` in the order of places. `surface` is the declaration that answered, calibrations included."""

    results: tuple[SurfaceResult, ...]
    all_results: tuple[SurfaceResult, ...]
    surface: Mapping[str, Any] = field(repr=False, default_factory=dict)
    surface_digest: str = ""
    adapters: tuple[AdapterUse, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the decision record. Every result has its ledger."""
        data = RankAnswer.to_dict(self)  # `super()` does not know a class with slots
        data["all_results"] = [asdict(r) for r in self.all_results]
        return data | {
            "surface": dict(self.surface),
            "surface_digest": self.surface_digest,
            "adapters": [asdict(a) for a in self.adapters],
        }


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of streamed text of prompt `index`; the last one carries the finish reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated text of one prompt. A matched stop string is not part of `text`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
