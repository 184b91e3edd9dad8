"""How an adapter ranks judged jobs, through the engine that will serve it.

Knows `rank` and nDCG; does not know training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from uma_engine.core import Candidate
from uma_engine.ranking.metrics import ndcg, ranked_grades
from uma_engine.ranking.surface import DEFAULT_PROBE, question_of
from uma_engine.train.groups import Group
from uma_engine.train.prompts import cut_job
from uma_engine.train.recipe import Recipe

__all__ = ["RankedGroup", "rank_groups"]


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """One job: its nDCG@10 with priors, and each candidate's score and margin without them, in the group's order."""

    id: str
    ndcg: float
    scores: tuple[float, ...]
    margins: tuple[float, ...]


def rank_groups(
    engine: Any,
    groups: Sequence[Group],
    recipe: Recipe,
    *,
    adapter: str | None,
    candidates: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[RankedGroup]:
    """Rank each job's candidates (the first `candidates`) with the recipe's probe. The ideal order
    is over all who fit, also those the first stage missed."""
    ranked = []
    surface = _surface(recipe)
    for number, group in enumerate(groups, 1):
        judged = group.candidates[:candidates]
        answer = engine.rank(
            cut_job(engine.tokenizer, group.job, recipe.sampling.max_job_tokens),
            [Candidate(c.id, c.text) for c in judged],
            adapter=adapter,
            instruction=recipe.instruction,
            labels=recipe.labels if surface is None else ("yes", "no"),
            surface=surface,
            max_tokens_per_candidate=recipe.sampling.max_candidate_tokens,
        )
        scores = tuple(r.score for r in answer.all_results)
        margins = tuple(r.logits[0] - r.logits[1] for r in answer.all_results)
        odds = [m + c.prior for m, c in zip(margins, judged, strict=True)]
        order = ranked_grades(odds, [c.grade for c in judged])
        ranked.append(RankedGroup(group.id, ndcg(order, group.ideal), scores, margins))
        done(number)
    return ranked


def _surface(recipe: Recipe) -> dict[str, Any] | None:
    """None where the recipe asks what `rank` asks by itself; else a surface of one read, nothing redacted."""
    if question_of(recipe.probe, recipe.labels) == question_of(DEFAULT_PROBE, recipe.labels):
        return None
    read = {"name": "fit", "probe": recipe.probe, "labels": list(recipe.labels)}
    return {"name": recipe.name, "redact": [], "reads": [read]}
