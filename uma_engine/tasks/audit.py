"""Audits that drive the live scorer: would somebody else with the same profile, or the same job in other words, get another answer?

Knows the plan of `rank` and what to compare; does not know how scores are made. Twins are ranked beside the pool in one call: nobody's
score depends on the company, so each stands in the candidate's place afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.agreement import kendall_tau, overlap, upper_bound
from uma_engine.ranking.identities import AXES, Identity, draw, dress
from uma_engine.ranking.rewrites import rewrites
from uma_engine.ranking.surface import Surface
from uma_engine.ranking.ties import arrange, lot
from uma_engine.tasks.plan import Plan, run, run_async
from uma_engine.tasks.rank import as_candidates
from uma_engine.tasks.surface_rank import as_surface, redacted

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["AsyncAudit", "Audit", "AxisReport", "CounterfactualReport", "Flip", "ParaphraseReport", "RewriteReport"]

AnySurface = Surface | Mapping[str, Any] | str | Path | None


@dataclass(frozen=True, slots=True)
class Flip:
    """A candidate whose top-k place hangs on who they are: `place_first` as `first`, `place_second` as `second`."""

    id: str
    axis: str
    first: str
    second: str
    place_first: int
    place_second: int


@dataclass(frozen=True, slots=True)
class AxisReport:
    """One axis: over `pairs` pairs, how often the second of a pair is in the top k and the first is not (`flips_in`), and the other
    way round (`flips_out`).

    `upper_95`: the flip rate that so few flips still allow (one-sided, exact). `same_input`: pairs whose texts were the same once
    redacted, for which no flip is possible. `mean_change`: of the score from the first group to the second. `skipped`: candidates
    for whom no pair could be drawn that changes nothing else.
    """

    axis: str
    pairs: int
    flips_in: int
    flips_out: int
    flip_rate: float
    upper_95: float
    same_input: int
    largest_change: float
    mean_change: Mapping[str, float]
    skipped: int


@dataclass(frozen=True, slots=True)
class CounterfactualReport:
    """What `Audit.counterfactual` found. `redact`: the kinds that were taken out before scoring, none when it was off."""

    top_k: int
    num_candidates: int
    redact: tuple[str, ...]
    axes: tuple[AxisReport, ...]
    flips: tuple[Flip, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """One rewrite against the original: agreement of the orders, and who enters or leaves the top k because of it."""

    rules: tuple[str, ...]
    text: str
    kendall_tau: float
    top_k_overlap: float
    entered: tuple[str, ...]
    left: tuple[str, ...]
    largest_change: float


@dataclass(frozen=True, slots=True)
class ParaphraseReport:
    """What `Audit.paraphrase` found. `flip_rate`: of all pairs of a rewrite and a candidate of the original's top k, how many fell out."""

    top_k: int
    num_candidates: int
    rewrites: tuple[RewriteReport, ...]
    mean_tau: float
    lowest_tau: float
    mean_overlap: float
    flip_rate: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Twins:
    place: int  # of the candidate in the pool
    first: Identity
    second: Identity
    people: tuple[Candidate, Candidate]


class Audit:
    """Audits of one engine: `engine.audit`. Their rankings are no decisions and go into no decision log."""

    def __init__(self, engine: EngineBase) -> None:
        self._engine = engine

    def counterfactual(
        self,
        job: str,
        candidates: Iterable[Candidate | str],
        *,
        surface: AnySurface = None,
        axes: Sequence[str] = AXES,
        pairs: int | None = None,
        top_k: int = 5,
        redact: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> CounterfactualReport:
        """Swap names, pronouns or schools of one candidate at a time and count who enters or leaves the top k for it.

        `pairs` on each axis (default: one a candidate), over the candidates in turn. Without a surface nothing is redacted; with one,
        `redact=False` measures what would happen without. `options` go to `rank`. Errors: as `rank`; InvalidRequest
        """
        return run(_counterfactual(self._engine, job, candidates, surface, axes, pairs, top_k, redact, seed, options))

    def paraphrase(
        self,
        job: str,
        candidates: Iterable[Candidate | str],
        n: int = 8,
        *,
        surface: AnySurface = None,
        top_k: int = 5,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ParaphraseReport:
        """Rank again for up to `n` rewrites of the job that mean the same, and report how much the order keeps.

        `synonyms` maps terms to others (default: other labels of ICT occupations and skills in ESCO). `options` go to `rank`.
        Errors: as `rank`; InvalidRequest where the job is too short to be rewritten
        """
        return run(_paraphrase(self._engine, job, candidates, n, surface, top_k, synonyms, seed, options))


class AsyncAudit:
    """As `Audit`, for an AsyncEngine: the same methods as coroutines."""

    def __init__(self, engine: EngineBase) -> None:
        self._engine = engine

    async def counterfactual(
        self,
        job: str,
        candidates: Iterable[Candidate | str],
        *,
        surface: AnySurface = None,
        axes: Sequence[str] = AXES,
        pairs: int | None = None,
        top_k: int = 5,
        redact: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> CounterfactualReport:
        """As `Audit.counterfactual`."""
        return await run_async(
            _counterfactual(self._engine, job, candidates, surface, axes, pairs, top_k, redact, seed, options)
        )

    async def paraphrase(
        self,
        job: str,
        candidates: Iterable[Candidate | str],
        n: int = 8,
        *,
        surface: AnySurface = None,
        top_k: int = 5,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ParaphraseReport:
        """As `Audit.paraphrase`."""
        return await run_async(_paraphrase(self._engine, job, candidates, n, surface, top_k, synonyms, seed, options))


def _counterfactual(
    engine: EngineBase,
    job: str,
    candidates: Iterable[Candidate | str],
    surface: AnySurface,
    axes: Sequence[str],
    pairs: int | None,
    top_k: int,
    redact: bool,
    seed: int,
    options: Mapping[str, Any],
) -> Plan[CounterfactualReport]:
    pool = as_candidates(candidates)
    declared = None if surface is None else as_surface(surface)
    if declared is not None and not redact:
        declared = declared.without_redaction()
    _check("top_k", top_k, len(pool) - 1)
    if pairs is not None:
        _check("pairs", pairs, 10**6)
    twins, skipped = _make_twins(pool, axes, pairs or len(pool), declared, random.Random(seed))
    everyone = [*pool, *(person for t in twins for person in t.people)]
    answer = yield from engine._rank_plan(job, everyone, surface=declared, **options)
    scores = [r.score for r in answer.all_results]
    placer = _Placer(job.strip(), pool, scores[: len(pool)], declared)
    flips: list[Flip] = []
    reports = []
    for axis in axes:
        changes: dict[str, list[float]] = {}
        same = flips_in = flips_out = 0
        for number, t in enumerate(twins):
            if t.first.axis != axis:
                continue
            a, b = scores[len(pool) + 2 * number : len(pool) + 2 * number + 2]
            changes.setdefault(f"{t.first.group} -> {t.second.group}", []).append(b - a)
            same += _read(t.people[0], declared) == _read(t.people[1], declared)
            first, second = placer.position(t.place, a), placer.position(t.place, b)
            flips_in += second < top_k <= first
            flips_out += first < top_k <= second
            if (first < top_k) != (second < top_k):
                flips.append(Flip(pool[t.place].id, axis, t.first.value, t.second.value, first + 1, second + 1))
        n = sum(map(len, changes.values()))
        reports.append(
            AxisReport(
                axis=axis,
                pairs=n,
                flips_in=flips_in,
                flips_out=flips_out,
                flip_rate=(flips_in + flips_out) / n if n else 0.0,
                upper_95=upper_bound(flips_in + flips_out, n),
                same_input=same,
                largest_change=max((abs(c) for found in changes.values() for c in found), default=0.0),
                mean_change={contrast: sum(found) / len(found) for contrast, found in sorted(changes.items())},
                skipped=skipped[axis],
            )
        )
    kinds = () if declared is None else declared.redact
    return CounterfactualReport(top_k, len(pool), kinds, tuple(reports), tuple(flips))


def _paraphrase(
    engine: EngineBase,
    job: str,
    candidates: Iterable[Candidate | str],
    n: int,
    surface: AnySurface,
    top_k: int,
    synonyms: Mapping[str, Sequence[str]] | None,
    seed: int,
    options: Mapping[str, Any],
) -> Plan[ParaphraseReport]:
    pool = as_candidates(candidates)
    _check("n", n, 1000)
    _check("top_k", top_k, len(pool) - 1)
    declared = None if surface is None else as_surface(surface)
    found = rewrites(job, n, seed=seed, synonyms=synonyms)
    if not found:
        raise InvalidRequest(
            "the job gives no rewrites",
            hint="it has neither lists nor several sentences nor known terms",
            param="job",
        )
    before, top = yield from _ranked(engine, job, pool, declared, job, top_k, options)
    reports = []
    for rewrite in found:
        after, new_top = yield from _ranked(engine, rewrite.text, pool, declared, job, top_k, options)
        reports.append(
            RewriteReport(
                rules=rewrite.rules,
                text=rewrite.text,
                kendall_tau=kendall_tau(before, after),
                top_k_overlap=overlap(top, new_top),
                entered=tuple(pool[i].id for i in new_top if i not in top),
                left=tuple(pool[i].id for i in top if i not in new_top),
                largest_change=max(abs(a - b) for a, b in zip(before, after, strict=True)),
            )
        )
    taus = [r.kendall_tau for r in reports]
    return ParaphraseReport(
        top_k=top_k,
        num_candidates=len(pool),
        rewrites=tuple(reports),
        mean_tau=sum(taus) / len(taus),
        lowest_tau=min(taus),
        mean_overlap=sum(r.top_k_overlap for r in reports) / len(reports),
        flip_rate=sum(len(r.left) for r in reports) / (top_k * len(reports)),
    )


def _ranked(
    engine: EngineBase,
    job: str,
    pool: Sequence[Candidate],
    surface: Surface | None,
    original: str,
    top_k: int,
    options: Mapping[str, Any],
) -> Plan[tuple[list[float], list[int]]]:
    """Scores and the top k. Lots are drawn for the original job: a rewrite is the same question."""
    answer = yield from engine._rank_plan(job, pool, surface=surface, **options)
    scores = [r.score for r in answer.all_results]
    return scores, _Placer(original.strip(), pool, scores, surface).top(top_k)


class _Placer:
    """Positions in the pool, as `rank` would give them, for one candidate with another score."""

    def __init__(self, job: str, pool: Sequence[Candidate], scores: Sequence[float], surface: Surface | None) -> None:
        self._scores = list(scores)
        self._resolution = surface.resolution if surface else 0.0
        by_lot = surface is not None and surface.tie_order == "lot"
        self._draws = [lot(job, person.id) for person in pool] if by_lot else None

    def position(self, place: int, score: float) -> int:
        """From 0 on."""
        scores = self._scores.copy()
        scores[place] = score
        order = arrange(scores, self._resolution, self._draws)
        return next(position for position, p in enumerate(order) if p.index == place)

    def top(self, k: int) -> list[int]:
        return [p.index for p in arrange(self._scores, self._resolution, self._draws)[:k]]


def _make_twins(
    pool: Sequence[Candidate], axes: Sequence[str], pairs: int, surface: Surface | None, rng: random.Random
) -> tuple[list[_Twins], dict[str, int]]:
    """For each axis `pairs` pairs over the pool in a drawn order, again and again, and how many could not be made."""
    names = surface.name_fields if surface else ("name",)
    twins: list[_Twins] = []
    skipped = dict.fromkeys(axes, 0)
    for axis in axes:
        order = rng.sample(range(len(pool)), len(pool))
        for number in range(pairs):
            place = order[number % len(pool)]
            person = pool[place]
            drawn = draw(axis, person.text, rng)
            if drawn is None:
                skipped[axis] += 1
                continue
            people = []
            for side, identity in enumerate(drawn):
                text, facts = dress(person.text.strip(), person.facts, identity, names)
                people.append(Candidate(f"{person.id}\n{axis} {number} {side}", text, facts, person.prior))
            twins.append(_Twins(place, *drawn, (people[0], people[1])))
    return twins, skipped


def _read(person: Candidate, surface: Surface | None) -> str:
    """What reads see of a candidate."""
    return person.text if surface is None else redacted(surface, person)[0]


def _check(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidRequest(f"`{name}` is `{value!r}` but must be from 1 to {most}", param=name)
