"""The last stage of a ranking: a short assessment of each candidate of the shortlist, written under a grammar and judged as it comes.

Knows the prompt, the requests and what they cost; `draft` knows the schema and the sentences. All candidates are written about in one
batch, each at the end of its own path (instruction -> job -> candidate -> this prompt), whose first three segments the scores have
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.core import Request, RequestKind, SamplingParams, Segment
from uma_engine.errors import InvalidRequest, UmaError
from uma_engine.ranking.assessment import Assessment, Section, Sentence
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.calls import Call
from uma_engine.tasks.draft import Draft, Sources, schema_of
from uma_engine.tasks.generate import TextSink
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.results import CompletionChunk, RankAnswer, Usage
from uma_engine.tasks.shortlist import Emit, RankEvent, Shortlist
from uma_engine.tasks.trunk import Trunk
from uma_engine.tasks.usage import Clock, usage_of

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = ["explained", "tails"]

_MARK = "\u27e6uma-sources\u27e7"
QUESTION = (
    "Assess the candidate as JSON: strengths, gaps, questions to ask. Each sentence cites sources and uses their words only."
    "\n\nSources:\n" + _MARK
)


def _prompt(engine: EngineBase) -> list[list[int]]:
    return ranking.cut_prompt(engine._stack.tokenizer, engine._stack.template, QUESTION, {"sources": _MARK})


def tails(engine: EngineBase) -> list[list[int]]:
    """What is read after a candidate's text, up to the first thing that differs."""
    return [_prompt(engine)[3]]


def explained(shortlist: Shortlist, usages: list[Usage], emit: Emit | None) -> Plan[RankAnswer]:
    """The answer with assessments of the shortlist."""
    assessments, usage, warnings = yield _call(shortlist, emit)
    usages.append(usage)
    answer = shortlist.answer
    return replace(answer, assessments=assessments, warnings=(*answer.warnings, *warnings))


Words = tuple[tuple[Assessment, ...], Usage, tuple[str, ...]]


def _call(shortlist: Shortlist, emit: Emit | None) -> Call[Words]:
    engine, wishes = shortlist.engine, shortlist.wishes
    began = Clock()
    tokenizer = engine._stack.tokenizer
    prompt = _prompt(engine)
    trunk = Trunk(shortlist, shortlist.beside, shortlist.writer)
    ref = shortlist.refs[shortlist.writer]
    drafts: list[Draft] = []
    requests: list[Request] = []
    sinks: list[TextSink] = []
    writing: list[Draft] = []  # of each request
    unread: list[str] = []
    for index in shortlist.indices:
        result, person = shortlist.answer.all_results[index], shortlist.people[index]
        sources = Sources.of(trunk.seen(index), shortlist.query, result.ledger)  # type: ignore[arg-type]
        below = prompt[3][trunk.shared :] + engine._ids_of("sources", sources.listed()) + prompt[4]
        tokens = trunk.candidate(index, len(below) + wishes.tokens)
        draft = Draft(index, person.id, sources, result.ledger, wishes.strict)  # type: ignore[arg-type]
        drafts.append(draft)
        if tokens is None:
            unread.append(person.id)
            continue
        params = SamplingParams(max_tokens=wishes.tokens, seed=0, json_schema=schema_of(sources))
        try:
            grammar = engine._grammar(params)
        except InvalidRequest:  # not even one sentence has room: none has to be
            grammar = engine._grammar(replace(params, json_schema=schema_of(sources, least=0)))
        path = [*trunk.above(), Segment(tokens, parent=1), Segment(below, parent=2)]
        sink = TextSink(len(requests), IncrementalDecoder(tokenizer), (), engine._eos_ids(), _listener(draft, emit))
        writing.append(draft)
        sinks.append(sink)
        requests.append(
            Request(
                engine._request_id("words"),
                RequestKind.GENERATE,
                path,
                cache_root=engine._stack.cache_root(ref, shortlist.options["tenant"]),
                adapter=ref,
                sampling=params,
                stop_token_ids=engine._eos_ids(),
                deadline=shortlist.expires,
                grammar=grammar,
            )
        )
    tokenized = began.stage("tokenize")

    def build() -> Words:
        written = {id(draft): sink.text for draft, sink in zip(writing, sinks, strict=True)}
        for draft in drafts:
            found = draft.finish(written.get(id(draft), ""))
            if emit is not None:
                emit(lambda draft=draft, found=found: _events(draft, found))  # type: ignore[misc]
        usage = usage_of(requests, tokenized, call.started, engine.flops_per_token, "words")
        warnings = []
        if unread:
            warnings.append(f"no room for words about {len(unread)} of {len(drafts)} candidates: templates stand in")
        return tuple(draft.assessment() for draft in drafts), usage, tuple(warnings)

    call: Call[Words] = Call(engine._stack.loop, requests, sinks, build)
    return call


def _listener(draft: Draft, emit: Emit | None):  # type: ignore[no-untyped-def]
    """What a sink calls with each piece: it is read where the stream's events are."""

    def listen(piece: CompletionChunk | UmaError) -> None:
        if emit is not None and isinstance(piece, CompletionChunk) and piece.text:
            emit(lambda: _events(draft, draft.feed(piece.text)))

    return listen


def _events(draft: Draft, found: Sequence[tuple[Section, Sentence]]) -> list[RankEvent]:
    return [
        RankEvent("sentence", index=draft.index, id=draft.id, section=section, sentence=sentence)
        for section, sentence in found
    ]
