"""Notes before a second reading: what is written about each of the shortlist, and the probes read again after it.

Knows the prompts of the notes, the two calls and how places change; does not know words or grammars. A note is the end of the path
instruction -> job -> candidate -> notes, and the probes hang on that path: what the model wrote is the context that they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.core import Request, RequestKind, SamplingParams, Segment
from uma_engine.errors import TooLarge
from uma_engine.ranking.agreement import kendall_tau
from uma_engine.ranking.calibration import Calibration
from uma_engine.ranking.surface import DEFAULT_PROBE, Surface, question_of
from uma_engine.ranking.ties import Place, arrange, lot
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.calls import Call, ScoreSink
from uma_engine.tasks.generate import TextSink
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.records import make_record, make_surface_record
from uma_engine.tasks.results import (
    Deliberation,
    Note,
    RankAnswer,
    RankResult,
    SurfaceAnswer,
    SurfaceResult,
    Usage,
)
from uma_engine.tasks.shortlist import Shortlist
from uma_engine.tasks.surface_rank import groups_of, inert, ledger_of
from uma_engine.tasks.trunk import Trunk
from uma_engine.tasks.usage import Clock, usage_of

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["deliberated", "tail"]

QUESTION = "Think first: in a few short notes, say what the job asks for and what of it the candidate shows or lacks."
_MARK = "\u27e6uma-notes\u27e7"
CALIBRATED = "calibrations were fitted without notes and are applied after them as they are"


def tail(engine: EngineBase) -> list[int]:
    """What is read after a candidate's text until the notes begin. Errors: UnsupportedModel where the template has no second turn"""
    _after_notes(engine, question_of(DEFAULT_PROBE, ("yes", "no")))
    return engine._rank_prompt(QUESTION).after_candidate


def _after_notes(engine: EngineBase, question: str) -> list[int]:
    """From the end of the notes to the place where the probe is read."""
    turns = [{"role": "assistant", "content": _MARK}, {"role": "user", "content": question}]
    stack = engine._stack
    return ranking.cut_prompt(stack.tokenizer, stack.template, QUESTION, {"notes": _MARK}, turns)[-1]


@dataclass
class _Reading:
    """The reads of one adapter after the notes."""

    adapter: str | None
    places: list[int]  # of its reads among all
    probes: list[list[int]]
    label_ids: list[tuple[int, ...]]

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(token for ids in self.label_ids for token in ids))


def deliberated(shortlist: Shortlist, usages: list[Usage]) -> Plan[RankAnswer]:
    """The answer after the notes: the shortlist's scores are new, and so may be its order; nobody else moves."""
    readings = _readings(shortlist)
    notes, usage = yield _notes_call(shortlist, readings)
    usages.append(usage)
    logits, usage = yield _reading_call(shortlist, readings, notes)
    usages.append(usage)
    return _rearranged(shortlist, notes, logits)


def _readings(shortlist: Shortlist) -> list[_Reading]:
    engine, surface = shortlist.engine, shortlist.surface
    tokenizer = engine._stack.tokenizer
    if surface is None:
        labels = tuple(shortlist.options["labels"])
        probe = _after_notes(engine, question_of(DEFAULT_PROBE, labels))
        return [_Reading(shortlist.writer, [0], [probe], [ranking.label_ids(tokenizer, labels)])]
    return [
        _Reading(
            group.adapter,
            group.places,
            [_after_notes(engine, inert(tokenizer, surface.reads[place])) for place in group.places],
            group.label_ids,
        )
        for group in groups_of(engine, surface)
    ]


Written = dict[int, tuple[str, list[int]]]  # by candidate: the notes, their tokens


def _notes_call(shortlist: Shortlist, readings: Sequence[_Reading]) -> Call[tuple[Written, Usage]]:
    engine = shortlist.engine
    began = Clock()
    num_notes = shortlist.wishes.notes
    assert num_notes is not None
    trunk = Trunk(shortlist, shortlist.beside, shortlist.writer)
    ref = shortlist.refs[shortlist.writer]
    below = tail(engine)[trunk.shared :]
    # Whatever acts as control ends the notes: they are words, put back in front of the model.
    stops = engine._eos_ids() | engine._stack.tokenizer.control_ids
    params = SamplingParams(max_tokens=num_notes, seed=0)
    requests: list[Request] = []
    sinks: list[TextSink] = []
    for index in shortlist.indices:
        candidate = trunk.candidate(index, len(below) + _needed(num_notes, readings))
        if candidate is None:
            raise TooLarge(
                f"instruction, job and `deliberate` {num_notes} leave no token for a candidate: a path may hold {engine.max_model_len}",
                hint="shorten the job post, lower `deliberate`, or start the engine with a larger `max_model_len`",
                param="deliberate",
            )
        path = [*trunk.above(), Segment(candidate, parent=1), Segment(list(below), parent=2)]
        sinks.append(TextSink(len(sinks), IncrementalDecoder(engine._stack.tokenizer), (), stops, lambda _: None))
        requests.append(
            Request(
                engine._request_id("notes"),
                RequestKind.GENERATE,
                path,
                cache_root=engine._stack.cache_root(ref, shortlist.options["tenant"]),
                adapter=ref,
                sampling=params,
                stop_token_ids=stops,
                deadline=shortlist.expires,
            )
        )
    tokenized = began.stage("tokenize")

    def build() -> tuple[Written, Usage]:
        written: Written = {}
        for index, request, sink in zip(shortlist.indices, requests, sinks, strict=True):
            tokens = request.output_token_ids
            written[index] = sink.text, tokens[:-1] if tokens and tokens[-1] in stops else list(tokens)
        return written, usage_of(requests, tokenized, call.started, engine.flops_per_token, "notes")

    call: Call[tuple[Written, Usage]] = Call(engine._stack.loop, requests, sinks, build)
    return call


def _needed(num_notes: int, readings: Sequence[_Reading]) -> int:
    return num_notes + max((len(probe) for reading in readings for probe in reading.probes), default=0)


Logits = dict[int, list[tuple[float, ...]]]  # by candidate: of each read


def _reading_call(shortlist: Shortlist, readings: Sequence[_Reading], notes: Written) -> Call[tuple[Logits, Usage]]:
    engine = shortlist.engine
    began = Clock()
    num_notes = shortlist.wishes.notes or 0
    requests: list[Request] = []
    sinks: list[ScoreSink] = []
    leaves: list[list[list[int]]] = []
    for reading in readings:
        trunk = Trunk(shortlist, shortlist.beside, reading.adapter)
        below = tail(engine)[trunk.shared :]
        tree = trunk.above()
        of_reading: list[list[int]] = []
        for index in shortlist.indices:
            candidate = trunk.candidate(index, len(below) + _needed(num_notes, readings))
            assert candidate is not None  # the notes had room
            tree.append(Segment(candidate, parent=1))
            tree.append(Segment(below + notes[index][1], parent=len(tree) - 1))
            parent = len(tree) - 1
            of_reading.append([len(tree) + i for i in range(len(reading.probes))])
            tree += [Segment(list(probe), parent=parent, scored=True) for probe in reading.probes]
        leaves.append(of_reading)
        ref = shortlist.refs[reading.adapter]
        sinks.append(ScoreSink())
        requests.append(
            engine._score_request("rank", tree, ref, reading.labels, shortlist.expires, shortlist.options["tenant"])
        )
    tokenized = began.stage("tokenize")

    def build() -> tuple[Logits, Usage]:
        num_reads = sum(len(r.places) for r in readings)
        found: Logits = {index: [()] * num_reads for index in shortlist.indices}
        for reading, sink, of_reading in zip(readings, sinks, leaves, strict=True):
            scores, columns = sink.future.result(), {token: i for i, token in enumerate(reading.labels)}
            for index, segments in zip(shortlist.indices, of_reading, strict=True):
                for place, ids, leaf in zip(reading.places, reading.label_ids, segments, strict=True):
                    found[index][place] = tuple(scores[leaf][columns[token]] for token in ids)
        return found, usage_of(requests, tokenized, call.started, engine.flops_per_token, "reading again")

    call: Call[tuple[Logits, Usage]] = Call(engine._stack.loop, requests, sinks, build)
    return call


def _rearranged(shortlist: Shortlist, notes: Written, logits: Logits) -> RankAnswer:
    """New scores and places for the shortlist, and the record that has them."""
    answer, surface, indices = shortlist.answer, shortlist.surface, shortlist.indices
    before = {index: answer.all_results[index] for index in indices}
    if surface is None:
        labels = tuple(shortlist.options["labels"])
        changed: dict[int, RankResult] = {
            i: ranking.rank_result(i, shortlist.people[i], labels, logits[i][0], before[i].truncated_tokens)
            for i in indices
        }
        order = tuple(r.index for r in ranking.order(list(changed.values()), None))
        places = {index: place for place, index in enumerate(order, start=1)}
        places_before = {index: place for place, index in enumerate(indices, start=1)}
        everyone = tuple(changed.get(r.index, r) for r in answer.all_results)
        shown = (*order, *(r.index for r in answer.results[len(indices) :]))
        results = tuple(everyone[i] for i in shown)
    else:
        changed = _new_results(shortlist, surface, logits)
        everyone, order = _placed(shortlist, surface, changed)
        places = {index: everyone[index].place for index in indices}
        places_before = {index: before[index].place for index in indices}  # type: ignore[attr-defined]
        results = tuple(everyone[i] for i in order[: len(answer.results)])
        order = order[: len(indices)]
    record = _record(shortlist, everyone)
    warnings = list(answer.warnings)
    if surface is not None and any(isinstance(r.calibration, Calibration) for r in surface.reads):
        warnings.append(CALIBRATED)
    deliberation = Deliberation(
        notes=tuple(
            Note(
                index=i,
                id=shortlist.people[i].id,
                text=notes[i][0],
                token_ids=tuple(notes[i][1]),
                score_before=before[i].score,
                logits_before=before[i].logits,
                place_before=places_before[i],
                score=everyone[i].score,
                place=places[i],
            )
            for i in order
        ),
        order_before=indices,
        order=tuple(order),
        kendall_tau=kendall_tau([before[i].score for i in indices], [everyone[i].score for i in indices]),
        moved=sum(a != b for a, b in zip(indices, order, strict=True)),
    )
    return replace(
        answer,
        results=results,
        all_results=everyone,
        record=record,
        warnings=tuple(warnings),
        deliberation=deliberation,
    )


def _new_results(shortlist: Shortlist, surface: Surface, logits: Logits) -> dict[int, RankResult]:
    facts: dict[str, Any] = shortlist.options["job_facts"] or {}
    found: dict[int, RankResult] = {}
    for index in shortlist.indices:
        person, result = shortlist.people[index], shortlist.answer.all_results[index]
        measured = [fact.measure(person.facts, facts, person.id) for fact in surface.facts]
        score, ledger = ledger_of(surface, measured, logits[index])
        found[index] = replace(
            result, score=score, ledger=ledger, logits=tuple(x for read in logits[index] for x in read)
        )
    return found


def _placed(
    shortlist: Shortlist, surface: Surface, changed: dict[int, RankResult]
) -> tuple[tuple[SurfaceResult, ...], tuple[int, ...]]:
    """Everyone, and the order: the shortlist among itself, then the others as they were among themselves."""
    people = shortlist.people
    inside = sorted(changed)
    outside = [i for i in range(len(people)) if i not in changed]
    everyone: list[Any] = [changed.get(r.index, r) for r in shortlist.answer.all_results]
    order: list[int] = []
    for members in (inside, outside):
        draws = [lot(shortlist.query, people[i].id) for i in members] if surface.tie_order == "lot" else None
        places: list[Place] = arrange([everyone[i].score for i in members], surface.resolution, draws)
        offset = len(order)
        for place in places:
            index = members[place.index]
            everyone[index] = replace(everyone[index], place=place.place + offset, tied_with=place.tied_with)
            order.append(index)
    return tuple(everyone), tuple(order)


def _record(shortlist: Shortlist, everyone: Sequence[Any]) -> dict[str, Any]:
    answer = shortlist.answer
    options: dict[str, Any] = {
        "query": shortlist.query,
        "candidates": shortlist.people,
        "options": answer.record["options"],
        "results": everyone,
        "stack": answer.stack,
        "usage": answer.usage,
        "warnings": answer.record["warnings"],
    }
    if isinstance(answer, SurfaceAnswer):
        return make_surface_record(**options, adapters=answer.adapters)
    return make_record(**options)
