"""What follows the scores, for the shortlist only: notes before the probes are read again, and words.

Knows the order of the stages, what each cost and how the answer and its record change; does not know prompts or tokens: `deliberate`
and `words` make the calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from uma_engine.core import AdapterRef, Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.assessment import Section, Sentence
from uma_engine.ranking.surface import Surface
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.decisions import logged
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.results import RankAnswer, Usage
from uma_engine.tasks.surface_rank import as_surface
from uma_engine.tasks.usage import joined

if TYPE_CHECKING:
    from uma_engine.tasks.base import EngineBase

__all__ = [
    "Beside",
    "Emit",
    "RankEvent",
    "Shortlist",
    "Wishes",
    "recorded_wishes",
    "shortlist_plan",
    "stream_plan",
]

DEFAULT_TOP = 5
DEFAULT_TOKENS = 96
MOST_NOTES = 4096
WISHES = ("explain", "explain_top", "explain_tokens", "explain_strict", "deliberate")  # arguments of `rank`
EventKind = Literal["scores", "deliberated", "sentence", "answer"]


@dataclass(frozen=True, slots=True)
class RankEvent:
    """One event of `rank_stream`.

    scores: `answer` has scores and order, nothing else yet. deliberated: the same after the notes. sentence: one more grounded
    `sentence` about candidate `index` in `section`. answer: `answer` is whole.
    """

    kind: EventKind
    answer: RankAnswer | None = None
    index: int | None = None
    id: str | None = None
    section: Section | None = None
    sentence: Sentence | None = None


# A task that a stream's reader runs to get events: so sentences are judged on its thread, not on the engine's.
Emit = Callable[[Callable[[], Iterable[RankEvent]]], object]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is wanted beyond scores, checked."""

    words: bool = False
    top: int | None = None
    tokens: int = DEFAULT_TOKENS
    strict: bool = True
    notes: int | None = None  # tokens of notes

    @classmethod
    def parse(
        cls,
        explain: str,
        explain_top: int | None,
        explain_tokens: int | None,
        explain_strict: bool,
        deliberate: int | None,
        has_surface: bool,
    ) -> Wishes:
        """Errors: InvalidRequest"""
        if explain not in ("ledger", "words"):
            raise InvalidRequest(
                f"`explain` is `{explain!r}`", hint="it is `ledger`, which costs nothing, or `words`", param="explain"
            )
        for name, value, most in (
            ("explain_top", explain_top, 2**31),
            ("explain_tokens", explain_tokens, 2**20),
            ("deliberate", deliberate, MOST_NOTES),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise InvalidRequest(
                    f"`{name}` is `{value!r}` but must be None or an integer from 1 to {most}", param=name
                )
        if not isinstance(explain_strict, bool):
            raise InvalidRequest(
                f"`explain_strict` is `{explain_strict!r}` but must be True or False", param="explain_strict"
            )
        words = explain == "words"
        if words and not has_surface:
            raise InvalidRequest(
                "`explain` is `words` without a surface", hint="words cite a surface's ledger", param="explain"
            )
        if not words and (explain_tokens is not None or not explain_strict):
            raise InvalidRequest("`explain_tokens` or `explain_strict` is given but `explain` is not `words`")
        if explain_top is not None and not words and deliberate is None:
            raise InvalidRequest("`explain_top` is given but nothing is to be written", param="explain_top")
        return cls(words, explain_top, explain_tokens or DEFAULT_TOKENS, explain_strict, deliberate)

    def __bool__(self) -> bool:
        return self.words or self.notes is not None

    def to_dict(self) -> dict[str, Any]:
        """As the decision record has it; the keyword arguments of `rank`."""
        found: dict[str, Any] = {"explain": "words" if self.words else "ledger", "explain_top": self.top}
        if self.words:
            found |= {"explain_tokens": self.tokens, "explain_strict": self.strict}
        return found | {"deliberate": self.notes}


def recorded_wishes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `rank` from a decision record's options. Errors: InvalidRequest"""
    wishes = options.get("shortlist", {})
    if not isinstance(wishes, dict) or not wishes.keys() <= {*WISHES, "top_n"}:
        raise InvalidRequest("the record's `options.shortlist` is not what `rank` writes", param="record")
    return dict(wishes)


@dataclass(frozen=True)
class Beside:
    """What will be read after the candidates' texts once the scores are there, by adapter: the tree of the scores is cut so that
    it finds their keys and values."""

    tails: tuple[tuple[str | None, tuple[int, ...]], ...] = ()

    def of(self, adapter: str | None) -> list[list[int]]:
        return [list(tail) for name, tail in self.tails if name == adapter]


@dataclass
class Shortlist:
    """Who is looked at again, and all that the later stages share."""

    engine: EngineBase
    query: str
    people: Sequence[Candidate]
    surface: Surface | None  # as it answered, calibrations included
    options: Mapping[str, Any]  # of `rank`
    refs: Mapping[str | None, AdapterRef | None]
    instruction: str
    expires: float | None
    answer: RankAnswer
    wishes: Wishes
    indices: tuple[int, ...]  # of the candidates, best first
    beside: Beside

    @property
    def writer(self) -> str | None:
        """The adapter that writes."""
        return self.options["adapter"]


def shortlist_plan(
    engine: EngineBase,
    query: str,
    candidates: Iterable[Candidate | str],
    *,
    explain: str = "ledger",
    explain_top: int | None = None,
    explain_tokens: int | None = None,
    explain_strict: bool = True,
    deliberate: int | None = None,
    emit: Emit | None = None,
    **options: Any,
) -> Plan[RankAnswer]:
    """The stages of a ranking. Without wishes beyond scores it is the one call that it always was."""
    from uma_engine.tasks import deliberate as notes
    from uma_engine.tasks import words

    surface = options["surface"]
    wishes = Wishes.parse(explain, explain_top, explain_tokens, explain_strict, deliberate, surface is not None)
    tell = emit or (lambda task: None)
    if not wishes:
        answer: RankAnswer = yield engine._rank_call(query, candidates, **options)
        tell(lambda: [RankEvent("scores", answer)])
        return answer
    if wishes.words:
        engine._grammars.json({"type": "null"}, 16)  # the package is there: not after minutes of scoring
    people = ranking.as_candidates(candidates)
    declared = None if surface is None else as_surface(surface)
    options = {**options, "surface": declared}
    writer: str | None = options["adapter"]
    names = {writer} if declared is None else {writer, *(read.adapter or writer for read in declared.reads)}
    tails = [(writer, tuple(tail)) for tail in words.tails(engine)] if wishes.words else []
    if wishes.notes:
        tails += [(name, tuple(notes.tail(engine))) for name in sorted(names, key=str)]
    expires = engine._deadline(options["deadline"])
    with _held(engine, names) as refs:
        beside = Beside(tuple(tails))
        answer = yield engine._rank_call(query, people, beside=beside, **options)
        first = answer
        tell(lambda: [RankEvent("scores", first)])
        _check_unchanged(answer, refs, declared is not None)
        top = min(wishes.top or DEFAULT_TOP, len(answer.results))
        shortlist = Shortlist(
            engine=engine,
            query=query.strip(),
            people=people,
            surface=None if declared is None else Surface.from_dict(answer.surface),  # type: ignore[attr-defined]
            options=options,
            refs=refs,
            instruction=answer.record["options"]["instruction"],
            expires=expires,
            answer=answer,
            wishes=wishes,
            indices=tuple(r.index for r in answer.results[:top]),
            beside=beside,
        )
        usages = [answer.usage]
        if wishes.notes is not None and top:
            answer = yield from notes.deliberated(shortlist, usages)
            shortlist.answer = answer
            shortlist.indices = tuple(r.index for r in answer.results[:top])
            second = answer
            tell(lambda: [RankEvent("deliberated", second)])
        if wishes.words and top:
            answer = yield from words.explained(shortlist, usages, tell if emit else None)
    return _recorded(answer, wishes, usages, options["top_n"])


def stream_plan(
    engine: EngineBase, query: str, candidates: Iterable[Candidate | str], options: Mapping[str, Any]
) -> Callable[[Emit], Plan[RankAnswer]]:
    """What makes the plan of `rank_stream` for a listener. Errors: InvalidRequest for an option that `rank` does not have"""
    from uma_engine.tasks.base import RANK_DEFAULTS  # which imports this module

    for name in options:
        if name not in RANK_DEFAULTS and name not in WISHES:
            raise InvalidRequest(f"`rank_stream` has no option `{name}`", hint="its options are those of `rank`")
    tenant = options.get("tenant", "")
    return lambda emit: logged(engine._rank_plan(query, candidates, emit=emit, **options), engine._log, tenant)


@contextlib.contextmanager
def _held(engine: EngineBase, names: Iterable[str | None]) -> Iterator[dict[str | None, AdapterRef | None]]:
    """The adapters, kept loaded for all stages."""
    adapters = engine._stack.adapter_store
    refs: dict[str | None, AdapterRef | None] = {}
    try:
        for name in sorted(names, key=str):
            refs[name] = engine._lease(name)
        yield refs
    finally:
        for ref in refs.values():
            if ref is not None:
                adapters.release(ref)


def _check_unchanged(answer: RankAnswer, refs: Mapping[str | None, AdapterRef | None], has_surface: bool) -> None:
    """The adapters that scored are the ones that are held: another thread may have loaded others under their names."""
    scored = {answer.stack.adapter: answer.stack.adapter_digest}
    if has_surface:
        scored = {a.name: a.digest for a in answer.adapters}  # type: ignore[attr-defined]
    for name, digest in scored.items():
        ref = refs.get(name)
        if name is not None and (ref is None or ref.digest.hex() != digest):
            raise InvalidRequest(f"adapter `{name}` was replaced while the call ran", hint="ask again", param="adapter")


def _recorded(answer: RankAnswer, wishes: Wishes, usages: Sequence[Usage], top_n: int | None) -> RankAnswer:
    """The answer with the cost of all stages in it and in its record; what was said about a candidate lies with their result."""
    usage = joined(usages)
    record = dict(answer.record)
    wanted = wishes.to_dict()
    if top_n is not None:
        wanted["top_n"] = top_n  # nobody beyond it is looked at again
    record["options"] = {**record["options"], "shortlist": wanted}
    record["usage"] = asdict(usage)
    record["warnings"] = list(dict.fromkeys([*record["warnings"], *_new(answer, record)]))
    results = [dict(entry) for entry in record["results"]]
    for assessment in answer.assessments:
        results[assessment.index]["assessment"] = assessment.to_dict()
    if answer.deliberation is not None:
        for note in answer.deliberation.notes:
            results[note.index]["deliberation"] = {
                "notes": note.text,
                "token_ids": list(note.token_ids),
                "before": {
                    "score": note.score_before.hex(),
                    "logits": [x.hex() for x in note.logits_before],
                    "place": note.place_before,
                },
            }
    record["results"] = results
    return replace(answer, usage=usage, record=record)


def _new(answer: RankAnswer, record: Mapping[str, Any]) -> list[str]:
    """Warnings of later stages. What `top_n` cuts belongs to what was shown, not to the record."""
    return [w for w in answer.warnings if w not in record["warnings"] and not w.startswith("`top_n`")]
