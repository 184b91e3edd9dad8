"""A rank call over a surface: facts measured, probes put under each candidate's text, ledgers added up, ties shown.

Knows surfaces, prompts and answers; does not know threads, or how logits are computed. All probes that one adapter reads are
children of the candidate's segment (instruction -> job -> candidate -> probe), so its text is computed once for them; words with
which they all begin go into that segment too. Another adapter means other keys and values from the first layer on: each has a
tree of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine.core import AdapterRef, Candidate, Request, Segment
from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.calibration import FILE_NAME, Calibration, probability, read_calibrations
from uma_engine.ranking.factors import as_number
from uma_engine.ranking.ledger import LedgerLine, aggregate
from uma_engine.ranking.presidio import finder
from uma_engine.ranking.redaction import Redaction, redact
from uma_engine.ranking.surface import Read, Surface
from uma_engine.ranking.ties import arrange, lot
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.calls import Call, ScoreSink, end_futures
from uma_engine.tasks.records import make_surface_record
from uma_engine.tasks.results import AdapterUse, RankAnswer, SurfaceAnswer, SurfaceResult
from uma_engine.tasks.usage import Clock, usage_of

if TYPE_CHECKING:
    from uma_engine.catalog.tokenizer import Tokenizer
    from uma_engine.tasks.base import EngineBase
    from uma_engine.tasks.shortlist import Beside

__all__ = ["Group", "as_surface", "groups_of", "inert", "ledger_of", "redacted", "surface_call"]


def as_surface(surface: Surface | Mapping[str, Any] | str | Path) -> Surface:
    """A surface, its plain data or its TOML file. Errors: SurfaceError"""
    if isinstance(surface, Surface):
        return surface
    if isinstance(surface, str | os.PathLike):
        return Surface.load(surface)
    return Surface.from_dict(surface)


@dataclass
class Group:
    """The reads of one adapter, and the tree that serves them."""

    adapter: str | None
    places: list[int] = field(default_factory=list)  # of its reads among the surface's
    prompts: list[ranking.RankPrompt] = field(default_factory=list)
    label_ids: list[tuple[int, ...]] = field(default_factory=list)
    shared: int = 0  # tokens after the candidate's text with which all probes begin
    is_kept: bool = False  # something else will be read after the candidates' texts
    sink: ScoreSink = field(default_factory=ScoreSink)
    ref: AdapterRef | None = None
    request: Request | None = None
    leaves: list[list[int]] = field(default_factory=list)  # candidate -> segment of each read

    @property
    def all_labels(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(token for ids in self.label_ids for token in ids))

    @property
    def longest(self) -> ranking.RankPrompt:
        return max(self.prompts, key=lambda p: len(p.after_candidate))

    def tree(self, instruction: list[int], job: list[int], candidates: Sequence[list[int]]) -> list[Segment]:
        """The request tree; `leaves` says where each probe of each candidate is."""
        first = self.prompts[0]
        segments = [
            Segment(first.head + instruction + first.after_instruction),
            Segment(job + first.after_job, parent=0),
        ]
        self.leaves = []
        for tokens in candidates:
            if (
                len(self.prompts) == 1 and not self.is_kept
            ):  # nothing to share: one leaf, whose keys and values nobody keeps
                self.leaves.append([len(segments)])
                segments.append(Segment(tokens + first.after_candidate, parent=1, scored=True))
                continue
            parent = len(segments)
            segments.append(Segment(tokens + first.after_candidate[: self.shared], parent=1))
            self.leaves.append(list(range(parent + 1, parent + 1 + len(self.prompts))))
            for prompt in self.prompts:
                segments.append(Segment(prompt.after_candidate[self.shared :], parent=parent, scored=True))
        return segments


def surface_call(
    engine: EngineBase,
    query: str,
    people: list[Candidate],
    *,
    surface: Surface,
    job_facts: Mapping[str, Any],
    adapter: str | None,
    top_n: int | None,
    instruction: str,
    max_tokens_per_candidate: int | None,
    expires: float | None,
    tenant: str,
    began: Clock,
    beside: Beside | None = None,
) -> Call[RankAnswer]:
    """The call; arguments as `Engine.rank` has them, checked by its caller. `adapter` reads where a read names none; `beside`: what
    else will be read after the candidates' texts."""
    stack = engine._stack
    tokenizer = stack.tokenizer
    if not isinstance(job_facts, Mapping):
        raise InvalidRequest(f"`job_facts` is a `{type(job_facts).__name__}` but must be a mapping", param="job_facts")
    for key, value in job_facts.items():
        as_number(value, f"job fact `{key}`", "job_facts")
    surface = replace(surface, reads=tuple(replace(r, adapter=r.adapter or adapter) for r in surface.reads))
    measured = [[fact.measure(person.facts, job_facts, person.id) for fact in surface.facts] for person in people]
    groups = groups_of(engine, surface, beside)
    seen = [redacted(surface, person) if surface.reads else ("", ()) for person in people]
    instruction_ids, job_ids = engine._ids_of("instruction", instruction), engine._ids_of("query", query)
    limit = None
    if groups:
        limit = min(g.longest.room(instruction_ids, job_ids, engine.max_model_len) for g in groups)
        limit = min(limit, max_tokens_per_candidate) if max_tokens_per_candidate else limit
    encoded = [stack.check_tokens(ids) for ids in tokenizer.encode_batch([text for text, _ in seen])]
    truncated = [max(0, len(ids) - limit) for ids in encoded] if limit is not None else [0 for _ in people]
    encoded = [ids[:limit] for ids in encoded]
    tokenized = began.stage("tokenize")

    try:
        for group in groups:
            group.ref = engine._lease(group.adapter)
            engine._release_with(group.ref, group.sink)
        surface = _calibrated(engine, surface, groups)
        for group in groups if people else []:
            segments = group.tree(instruction_ids, job_ids, encoded)
            group.request = engine._score_request("rank", segments, group.ref, group.all_labels, expires, tenant)
        adapters = tuple(
            AdapterUse(g.adapter, g.ref.digest.hex(), stack.adapters.path_of(g.ref))
            for g in groups
            if g.ref is not None and g.adapter is not None
        )
    except BaseException as error:
        end_futures([g.sink for g in groups], error)
        raise
    warnings = _warnings(engine, surface, groups, truncated, limit)

    def answer() -> RankAnswer:
        logits = _logits(groups, len(surface.reads), len(people))
        ledgers = [ledger_of(surface, measured[i], logits[i]) for i in range(len(people))]
        scores = [score for score, _ in ledgers]
        draws = [lot(query, person.id) for person in people] if surface.tie_order == "lot" else None
        places = arrange(scores, surface.resolution, draws)
        by_index = {p.index: p for p in places}
        everyone = [
            SurfaceResult(
                index=i,
                id=person.id,
                score=scores[i],
                logits=tuple(x for read in logits[i] for x in read),
                truncated_tokens=truncated[i],
                ledger=ledgers[i][1],
                place=by_index[i].place,
                tied_with=by_index[i].tied_with,
                redactions=seen[i][1],
            )
            for i, person in enumerate(people)
        ]
        said = list(warnings)
        if top_n is not None and top_n < len(places) and places[top_n - 1].group == places[top_n].group:
            left = sum(p.group == places[top_n].group for p in places[top_n:])
            said.append(f"`top_n` {top_n} cuts a tie: {left} more are as good as the last one shown")
        usage = usage_of(call.requests, tokenized, call.started, engine.flops_per_token)
        info = engine.stack_info()
        record = make_surface_record(
            query=query,
            candidates=people,
            options={
                "surface": surface.to_dict(),
                "surface_digest": surface.digest,
                "job_facts": dict(job_facts),
                "top_n": top_n,
                "instruction": instruction,
                "max_tokens_per_candidate": max_tokens_per_candidate,
                "engine": {"max_model_len": engine.max_model_len, "precision": engine.config.precision},
                **({"finders": {name: finder(name)[1] for name in surface.redact_with}} if surface.redact_with else {}),
            },
            results=everyone,
            stack=info,
            adapters=adapters,
            usage=usage,
            warnings=warnings,  # what `top_n` cuts is a property of what was shown, and a replay shows all
        )
        return SurfaceAnswer(
            results=tuple(everyone[p.index] for p in places[: top_n or len(places)]),
            all_results=tuple(everyone),
            usage=usage,
            stack=info,
            warnings=tuple(said),
            record=record,
            surface=surface.to_dict(),
            surface_digest=surface.digest,
            adapters=adapters,
        )

    running = [g for g in groups if g.request is not None]
    call: Call[RankAnswer] = Call(
        stack.loop, [g.request for g in running if g.request is not None], [g.sink for g in running], answer
    )
    if not people:
        for group in groups:
            group.sink.future.set_result({})  # nothing to run: what the call holds goes back at once
    return call


def groups_of(engine: EngineBase, surface: Surface, beside: Beside | None = None) -> list[Group]:
    """The surface's reads by adapter, in the order in which adapters first appear."""
    tokenizer = engine._stack.tokenizer
    groups: dict[str | None, Group] = {}
    for place, read in enumerate(surface.reads):
        group = groups.setdefault(read.adapter, Group(read.adapter))
        group.places.append(place)
        group.label_ids.append(ranking.label_ids(tokenizer, read.labels))
        group.prompts.append(engine._rank_prompt(inert(tokenizer, read)))
    for group in groups.values():
        others = [] if beside is None else beside.of(group.adapter)
        group.is_kept = bool(others)
        tails = [prompt.after_candidate for prompt in group.prompts]
        group.shared = ranking.shared_prefix([*tails, *others])  # a leaf has a token of its own
    return list(groups.values())


def inert(tokenizer: Tokenizer, read: Read) -> str:
    """The read's question. Errors: SurfaceError when it holds control tokens, which in a template's text would act"""
    control = tokenizer.control_ids.intersection(tokenizer.encode(read.question, special=True))
    if control:
        raise SurfaceError(
            f"read `{read.name}`: `probe` holds the control token `{tokenizer.piece_of(min(control))}`",
            hint="a probe is plain words",
            param="surface",
        )
    return read.question


def redacted(surface: Surface, person: Candidate) -> tuple[str, tuple[Redaction, ...]]:
    """The candidate's text as reads see it, and what was taken out."""
    text = person.text.strip()
    if not surface.redact:
        return text, ()
    names = [str(person.facts[key]) for key in surface.name_fields if person.facts.get(key)]
    return redact(text, surface.redact, names, [finder(name)[0] for name in surface.redact_with])


def _calibrated(engine: EngineBase, surface: Surface, groups: Sequence[Group]) -> Surface:
    """The surface with every calibration read from its file and checked against what is going to answer."""
    reads = list(surface.reads)
    for group in groups:
        for place in group.places:
            read = reads[place]
            if read.calibration is None:
                continue
            calibration = read.calibration
            if not isinstance(calibration, Calibration):
                calibration = _find(engine, read, group.ref, calibration)
            calibration.check(
                read.name,
                base_digest=engine._stack.digest,
                adapter_digest=group.ref.digest.hex() if group.ref else None,
                probe=read.question,
                labels=read.labels,
            )
            reads[place] = replace(read, calibration=calibration)
    return replace(surface, reads=tuple(reads))


def _find(engine: EngineBase, read: Read, ref: AdapterRef | None, where: Path | bool) -> Calibration:
    """The entry for this read in a calibration file."""
    if isinstance(where, Path):
        path = where
    else:
        assert ref is not None  # the surface was checked
        path = Path(engine._stack.adapters.path_of(ref)) / FILE_NAME
    for calibration in read_calibrations(path):
        if (calibration.probe, calibration.labels) == (read.question, read.labels):
            return calibration
    raise SurfaceError(
        f"`{path}` has no calibration for the probe and labels of read `{read.name}`",
        hint="fit one with `engine.calibrate`",
        param="surface",
    )


def _warnings(
    engine: EngineBase, surface: Surface, groups: Sequence[Group], truncated: Sequence[int], limit: int | None
) -> list[str]:
    from uma_engine.tasks.base import ZERO_SHOT  # which imports this module

    found = []
    if any(group.adapter is None for group in groups):
        found.append(ZERO_SHOT.format(model=engine.model))
    if any(truncated):
        cut = sum(1 for t in truncated if t)
        found.append(f"{cut} of {len(truncated)} candidates were cut to {limit} tokens; see `truncated_tokens`")
    if surface.reads and not surface.redact:
        found.append("redaction is off: reads have seen names and whatever else says who somebody is")
    return found


def _logits(groups: Sequence[Group], num_reads: int, num_people: int) -> list[list[tuple[float, ...]]]:
    """Label logits by candidate and read."""
    found: list[list[tuple[float, ...]]] = [[()] * num_reads for _ in range(num_people)]
    for group in groups:
        scores = group.sink.future.result()
        columns = {token: i for i, token in enumerate(group.all_labels)}
        for i in range(num_people):
            for place, ids, leaf in zip(group.places, group.label_ids, group.leaves[i], strict=True):
                found[i][place] = tuple(scores[leaf][columns[token]] for token in ids)
    return found


def ledger_of(
    surface: Surface, measured: Sequence[Any], logits: Sequence[tuple[float, ...]]
) -> tuple[float, tuple[LedgerLine, ...]]:
    """The score of one candidate and the lines that make it."""
    raw_reads = [probability(x) for x in logits]
    reads = [
        read.calibration(x) if isinstance(read.calibration, Calibration) else p
        for read, x, p in zip(surface.reads, logits, raw_reads, strict=True)
    ]
    score, contributions = aggregate(surface.aggregate, [*(m.value for m in measured), *reads], surface.weights)
    lines = [
        LedgerLine(f.name, m.value, f.weight, c, kind="fact", missing=m.missing, source=f.source, raw=m.raw)
        for f, m, c in zip(surface.facts, measured, contributions[: len(measured)], strict=True)
    ]
    lines += [
        LedgerLine(r.name, v, r.weight, c, kind="read", missing=False, source=r.adapter, raw=p, logits=x)
        for r, v, c, p, x in zip(surface.reads, reads, contributions[len(lines) :], raw_reads, logits, strict=True)
    ]
    return score, tuple(lines)
