"""A ranking in two depths: everybody is read for a few tokens, and only who can still reach the top is read to the end.

Knows bounds, waves, deadlines and budgets; does not know prompts or tokens. The cheap score is the score of the candidate's first tokens
alone; the whole score goes on from their keys and values. With bounds of no tokens a candidate's prior is the cheap score, and nothing is
read for it. In waves, best cheap score first, whoever could not beat the k-th best whole
score even at the upper bound is left out. A whole score has the bits that `rank` gives it without a cascade.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.bounds import Bounds, fit_bounds, load_bounds, margin
from uma_engine.ranking.surface import DEFAULT_PROBE, question_of
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.records import make_record
from uma_engine.tasks.results import CascadeReport, RankAnswer, RankResult, Usage
from uma_engine.tasks.shortlist import WISHES, Beside, shortlist_plan
from uma_engine.tasks.usage import joined

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["cascade_plan", "fit_plan", "ranked_plan", "recorded_cascade"]

LEAST_WAVE = 8  # candidates read to the end together, at least
CHUNK = 64  # candidates read cheaply together where time or tokens may run out
SAFETY = 1.25  # what a step may take longer than the one before did


def ranked_plan(
    engine: EngineBase, query: str, candidates: Iterable[Candidate | str], options: Mapping[str, Any]
) -> Plan[RankAnswer]:
    """The plan of a ranking: one call, one with words or notes after it, or a cascade."""
    options = dict(options)
    cascade, budget = options.pop("cascade", None), options.pop("budget", None)
    if cascade is None:
        if budget is not None:
            raise InvalidRequest("`budget` is given without `cascade`", hint="it ends a cascade", param="budget")
        return (yield from shortlist_plan(engine, query, candidates, **options))
    options.pop("emit", None)
    wishes = [options.pop(name, None) for name in WISHES]
    if any(value not in (None, "ledger", True) for value in wishes):
        raise InvalidRequest("`cascade` is given with words or notes", hint="ask for one of them", param="cascade")
    return (yield from cascade_plan(engine, query, candidates, cascade=cascade, budget=budget, options=options))


def recorded_cascade(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `rank` from a decision record's options: who was read to the end is read to the end again."""
    kept = options.get("cascade")
    return {} if kept is None else {"cascade": kept}


class _Allowance:
    """What is left of the time and of the tokens. A step's cost is foretold from those before it."""

    def __init__(self, expires: float | None, budget: int | None) -> None:
        self._expires, self._budget = expires, budget
        self._tokens = 0
        self._seconds_each = 0.0
        self._tokens_each = 0.0

    @property
    def limited(self) -> bool:
        return self._expires is not None or self._budget is not None

    def spent(self, usage: Usage, people: int, seconds: float) -> None:
        self._tokens += usage.computed_tokens
        if people:
            self._seconds_each, self._tokens_each = seconds / people, usage.computed_tokens / people

    def stops(self, people: int) -> str | None:
        """Why a step over `people` must not begin, or None."""
        if self._expires is not None and time.monotonic() + SAFETY * self._seconds_each * people >= self._expires:
            return "deadline"
        if self._budget is not None and self._tokens + self._tokens_each * people > self._budget:
            return "budget"
        return None


def cascade_plan(
    engine: EngineBase,
    query: str,
    candidates: Iterable[Candidate | str],
    *,
    cascade: Bounds | Mapping[str, Any] | str,
    budget: int | None,
    options: Mapping[str, Any],
) -> Plan[RankAnswer]:
    """See `Engine.rank`. `options` are those of `rank` without a cascade."""
    if options["surface"] is not None:
        raise InvalidRequest("`cascade` is given with a surface", hint="bounds are those of one read", param="cascade")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise InvalidRequest(f"`budget` is `{budget!r}` but must be None or a number of tokens", param="budget")
    again: list[int] | None = None
    if isinstance(cascade, Mapping) and "whole" in cascade:  # a record: who was read to the end is known
        cascade = dict(cascade)
        again = [int(i) for i in cascade.pop("whole")]
        cascade.pop("top", None)
    bounds = load_bounds(cascade)
    people = ranking.as_candidates(candidates)
    top = options["top_n"] or min(10, len(people))
    _check_digests(engine, bounds, options["adapter"])
    expires = engine._deadline(options["deadline"])
    allowance = _Allowance(expires, budget)
    shared = {**options, "deadline": None, "top_n": None}
    prompt = engine._rank_prompt(question_of(DEFAULT_PROBE, tuple(options["labels"])))
    # The tail is what follows whole texts too: so the candidate's tokens are a segment whose keys and values are kept.
    beside = Beside(((options["adapter"], tuple(prompt.after_candidate)),))
    limit = options["max_tokens_per_candidate"]
    few = bounds.prefix_tokens if limit is None else min(limit, bounds.prefix_tokens)
    cheaply = {**shared, "max_tokens_per_candidate": few}
    usages: list[Usage] = []
    cheap: dict[int, RankResult] = {}
    whole: dict[int, RankResult] = {}
    base: RankAnswer | None = None
    stopped: str | None = None

    by_prior = bounds.prefix_tokens == 0
    first = list(range(len(people))) if again is None else [i for i in range(len(people)) if i not in set(again)]
    if by_prior:
        first = []
    step = CHUNK if allowance.limited else max(1, len(first))
    for start in range(0, len(first), step):
        part = first[start : start + step]
        if start and (stopped := allowance.stops(len(part))):
            break
        base = yield from _read(engine, query, people, part, cheaply, beside, cheap, usages, allowance, "cheap")
    # Who fits into the few tokens has been read to the end already.
    whole |= {i: result for i, result in cheap.items() if not result.truncated_tokens or few == limit}
    waves = 0
    odds = {i: people[i].prior for i in range(len(people))} if by_prior else {}
    odds |= {i: _odds(people, result) for i, result in cheap.items() if i not in whole}
    waiting = again if again is not None else sorted(odds, key=lambda i: (-odds[i], i))
    while waiting and stopped is None:
        size = len(waiting) if again is not None else max(LEAST_WAVE, top)
        part = waiting[:size]
        if again is None:
            part = [i for i in part if _may_reach(people, odds[i], whole, bounds, top)]
            if not part:
                break
            if waves and (stopped := allowance.stops(len(part))):
                break
        base = yield from _read(engine, query, people, part, shared, beside, whole, usages, allowance, "whole")
        waves += 1
        waiting = waiting[size:]
    looked_at = sorted(cheap.keys() | whole.keys())
    left_out = range(len(people)) if by_prior and stopped is None else looked_at
    report = CascadeReport(
        bounds=bounds,
        top=top,
        whole=tuple(sorted(whole)),
        eliminated=tuple(i for i in left_out if i not in whole),
        not_looked_at=tuple(i for i in range(len(people)) if i not in left_out),
        waves=waves,
        stopped_by=stopped,
    )
    if base is None:  # nobody was there
        base = yield engine._rank_call(query, [], **shared)
    return _answer(query, people, cheap, whole, base, usages, report, options)


def _read(
    engine: EngineBase,
    query: str,
    people: Sequence[Candidate],
    part: Sequence[int],
    options: Mapping[str, Any],
    beside: Beside,
    into: dict[int, RankResult],
    usages: list[Usage],
    allowance: _Allowance,
    name: str,
) -> Plan[RankAnswer]:
    began = time.monotonic()
    answer: RankAnswer = yield engine._rank_call(query, [people[i] for i in part], beside=beside, **options)
    for place, index in enumerate(part):
        into[index] = replace(answer.all_results[place], index=index)
    usage = answer.usage
    usage = replace(usage, stages=tuple(replace(s, name=name) if s.name == "score" else s for s in usage.stages))
    usages.append(usage)
    allowance.spent(usage, len(part), time.monotonic() - began)
    return answer


def _odds(people: Sequence[Candidate], result: RankResult) -> float:
    return margin(result.logits) + people[result.index].prior


def _may_reach(
    people: Sequence[Candidate], odds: float, whole: Mapping[int, RankResult], bounds: Bounds, top: int
) -> bool:
    """Whether a candidate of these cheap odds can still be among the best `top`."""
    if len(whole) < top:
        return True
    return odds + bounds.high >= sorted((_odds(people, r) for r in whole.values()), reverse=True)[top - 1]


def _check_digests(engine: EngineBase, bounds: Bounds, adapter: str | None) -> None:
    if not bounds.base_digest:
        return
    ref = engine._lease(adapter)
    try:
        stack = engine.stack_info(adapter, ref)
    finally:
        if ref is not None:
            engine._stack.adapter_store.release(ref)
    if (stack.base_digest, stack.adapter_digest) != (bounds.base_digest, bounds.adapter_digest):
        raise InvalidRequest(
            "the bounds were fitted for another base or adapter",
            hint="fit them again: `engine.fit_cascade`",
            param="cascade",
        )


def _answer(
    query: str,
    people: Sequence[Candidate],
    cheap: Mapping[int, RankResult],
    whole: Mapping[int, RankResult],
    base: RankAnswer,
    usages: Sequence[Usage],
    report: CascadeReport,
    options: Mapping[str, Any],
) -> RankAnswer:
    """Whole scores first, then cheap ones: both in their own order."""
    everyone = [whole.get(i, cheap.get(i)) for i in range(len(people))]
    looked_at = [r for r in everyone if r is not None]
    ordered = [
        *ranking.order([r for r in looked_at if r.index in whole], None),
        *ranking.order([r for r in looked_at if r.index not in whole], None),
    ]
    top_n = options["top_n"]
    warnings = [w for w in base.warnings if "`truncated_tokens`" not in w]
    said = list(warnings)  # what ended the ranking is not part of what a replay must give again
    if report.stopped_by is not None:
        said.append(
            f"the {report.stopped_by} ended the ranking: {len(report.whole)} of {len(people)} were read to the end,"
            f" {len(report.eliminated)} in part, {len(report.not_looked_at)} not at all"
        )
    usage = joined(usages) if usages else base.usage
    kept = {
        **asdict(report.bounds),
        "whole": [looked_at.index(r) for r in looked_at if r.index in whole],
        "top": report.top,
    }
    recorded = {**base.record["options"], "top_n": top_n, "cascade": kept}
    recorded["max_tokens_per_candidate"] = options["max_tokens_per_candidate"]
    record = make_record(
        query=base.record["query"],
        candidates=[people[r.index] for r in looked_at],
        options=recorded,
        results=looked_at,
        stack=base.stack,
        usage=usage,
        warnings=warnings,
    )
    seen = {r.index for r in looked_at}
    record["left_out"] = [people[i].id for i in report.eliminated if i not in seen]
    record["not_looked_at"] = [people[i].id for i in report.not_looked_at]
    record["stopped_by"] = report.stopped_by
    shown = tuple(ordered if top_n is None else ordered[:top_n])
    return RankAnswer(shown, tuple(looked_at), usage, base.stack, tuple(said), record, cascade=report)


def fit_plan(
    engine: EngineBase,
    jobs: Iterable[tuple[str, Sequence[Candidate | str]]],
    prefix_tokens: int,
    confidence: float,
    options: Mapping[str, Any],
) -> Plan[Bounds]:
    """See `Engine.fit_cascade`."""
    cheap: list[float] = []
    whole: list[float] = []
    stack = None
    options = dict(options)
    most = options.pop("max_tokens_per_candidate", None)
    for job, people in jobs:
        named = ranking.as_candidates(people)
        if not prefix_tokens:
            cheap += [0.0] * len(named)
        for into, limit in ((cheap, prefix_tokens), (whole, most)):
            if limit == 0:
                continue
            answer = yield from engine._rank_plan(job, named, max_tokens_per_candidate=limit, **options)
            into += [margin(r.logits) for r in answer.all_results]
            stack = answer.stack
    if stack is None:
        raise InvalidRequest("`jobs` is empty", param="jobs")
    return fit_bounds(cheap, whole, prefix_tokens, confidence, stack.base_digest, stack.adapter_digest)
