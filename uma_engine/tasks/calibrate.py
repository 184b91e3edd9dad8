"""Fitting the calibration of a surface's read through the live scorer.

Knows judged examples and the plan of `rank`; does not know the mathematics of calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.calibration import Calibration, Method, fit, save_calibration
from uma_engine.ranking.ledger import LedgerLine
from uma_engine.ranking.surface import Surface
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.surface_rank import as_surface

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["calibrate"]


def calibrate(
    engine: EngineBase,
    surface: Surface | Mapping[str, Any] | str | Path,
    read: str,
    examples: Iterable[tuple[str, Candidate | str, bool]],
    method: Method,
    adapter: str | None,
    save_to: str | Path | None,
) -> Plan[Calibration]:
    """See `Engine.calibrate`; for both faces. Judged examples are no decisions: they go into no log."""
    declared = as_surface(surface)
    found = [r for r in declared.reads if r.name == read]
    if not found:
        raise SurfaceError(
            f"surface `{declared.name}` has no read `{read}`",
            hint="its reads are " + (", ".join(f"`{r.name}`" for r in declared.reads) or "none"),
        )
    if method not in ("temperature", "isotonic"):
        raise InvalidRequest(f"`method` is `{method}`", hint="it is `temperature` or `isotonic`", param="method")
    # This read alone, as the model states it. Facts are not looked at: examples need none.
    alone = replace(declared, facts=(), reads=(replace(found[0], calibration=None),), aggregate="mean")
    judged = list(examples)
    by_job: dict[str, list[int]] = {}
    for place, (job, _, _) in enumerate(judged):
        by_job.setdefault(job, []).append(place)
    logits: list[tuple[float, ...]] = [()] * len(judged)
    base_digest, adapter_digest = engine.stack_info().base_digest, None
    for job, places in by_job.items():
        people = [_numbered(judged[place][1], place) for place in places]
        answer = yield from engine._rank_plan(job, people, surface=alone, adapter=adapter)
        adapter_digest = next((a["digest"] for a in answer.record["adapters"]), None)
        for place, result in zip(places, answer.all_results, strict=True):
            line = result.ledger[0]
            assert isinstance(line, LedgerLine)
            logits[place] = line.logits
    calibration = fit(
        method,
        logits,
        [outcome for _, _, outcome in judged],
        probe=found[0].question,
        labels=found[0].labels,
        base_digest=base_digest,
        adapter_digest=adapter_digest,
    )
    if save_to is not None:
        save_calibration(calibration, save_to)
    return calibration


def _numbered(candidate: Candidate | str, place: int) -> Candidate:
    """With its place as id: one person may be judged for many jobs, and twice for one."""
    if isinstance(candidate, Candidate):
        return Candidate(str(place), candidate.text, candidate.facts)
    return Candidate(str(place), candidate)
