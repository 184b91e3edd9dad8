"""Match: an index finds who may fit, the language model ranks those, and the answer says what the first stage left out.

Knows the order of the two stages and their cost; does not know how an index finds people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.decisions import logged
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.results import RankAnswer, RankResult, Usage
from uma_engine.tasks.usage import Clock, joined

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["FirstStage", "MatchAnswer", "match_plan"]


class FirstHit(Protocol):
    """What a first stage says of one candidate: `by_words` and `by_vectors` are places from 1, or None."""

    @property
    def candidate(self) -> Candidate: ...
    @property
    def score(self) -> float: ...
    @property
    def by_words(self) -> int | None: ...
    @property
    def by_vectors(self) -> int | None: ...
    @property
    def prior(self) -> float: ...


class FirstFound(Protocol):
    """Hits, best first, and a dataclass that says what was cut."""

    @property
    def hits(self) -> Sequence[FirstHit]: ...
    @property
    def cut(self) -> Any: ...


class FirstStage(Protocol):
    """An index, such as `uma_engine.retrieval.CandidateIndex`."""

    def search(
        self,
        query: str,
        first: int | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        recall: float | None = None,
    ) -> FirstFound: ...


@dataclass(frozen=True, slots=True)
class MatchAnswer:
    """`ranking` is the language model's answer about those whom the first stage found; `hits` is how that stage saw them, by id; `cut`
    says who was not looked at. `usage` is the cost of both stages.
    """

    ranking: RankAnswer
    hits: Mapping[str, FirstHit]
    cut: Any

    @property
    def results(self) -> tuple[RankResult, ...]:
        return self.ranking.results

    @property
    def usage(self) -> Usage:
        return self.ranking.usage

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.ranking.warnings

    def __iter__(self) -> Iterator[RankResult]:
        return iter(self.ranking.results)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the decision record."""
        return self.ranking.to_dict() | {
            "cut": asdict(self.cut),
            "first_stage": {
                name: {"score": hit.score, "by_words": hit.by_words, "by_vectors": hit.by_vectors, "prior": hit.prior}
                for name, hit in self.hits.items()
            },
        }


def match_plan(
    engine: EngineBase,
    job: str,
    index: FirstStage,
    *,
    first: int | None,
    recall: float | None,
    where: Mapping[str, Any] | None,
    blend: bool,
    tenant: str,
    options: Mapping[str, Any],
) -> Plan[MatchAnswer]:
    """See `Engine.match`. The record of the ranking has the cut."""
    if not hasattr(index, "search"):
        raise InvalidRequest(f"`index` is a `{type(index).__name__}` that cannot be searched", param="index")
    clock = Clock()
    found = index.search(job, first, where=where, recall=recall)
    searched = clock.stage("first stage")
    cut = found.cut

    def ranked() -> Plan[RankAnswer]:
        people = [replace(hit.candidate, prior=hit.prior) if blend else hit.candidate for hit in found.hits]
        answer = yield from engine._rank_plan(job, people, tenant=tenant, **options)
        warnings = list(answer.warnings)
        if cut.measured_recall is None:
            warnings.append(
                f"the first stage kept {len(people)} of {cut.considered} candidates; how many good ones it loses was never measured"
            )
        elif not people:
            warnings.append("nobody passes the filters, or nobody has a word or a meaning of the job")
        usage = joined([answer.usage], [searched])
        record = {**answer.record, "cut": asdict(cut), "usage": asdict(usage), "warnings": warnings}
        return replace(answer, usage=usage, warnings=tuple(warnings), record=record)

    answer = yield from logged(ranked(), engine._log, tenant)
    return MatchAnswer(answer, {hit.candidate.id: hit for hit in found.hits}, cut)
