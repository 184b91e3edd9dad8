"""The public face: Engine and AsyncEngine with rank, score, generate, tokenize and adapters.

Knows how a caller waits, streams and leaves; what a call is, both take from `base`.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uma_engine.core import AdapterRef, Candidate, SamplingParams
from uma_engine.errors import UmaError
from uma_engine.ranking.bounds import Bounds
from uma_engine.ranking.calibration import Calibration, Method
from uma_engine.ranking.surface import Surface
from uma_engine.tasks.audit import AsyncAudit, Audit
from uma_engine.tasks.base import EngineBase
from uma_engine.tasks.calibrate import calibrate
from uma_engine.tasks.calls import Call
from uma_engine.tasks.cascade import fit_plan
from uma_engine.tasks.decisions import ForgetsPeople, ForgetsTexts, close_log, forget, logged
from uma_engine.tasks.match import FirstStage, MatchAnswer, match_plan
from uma_engine.tasks.plan import finish, prepared, run, run_async
from uma_engine.tasks.plan_stream import stream, stream_async
from uma_engine.tasks.results import Completion, CompletionChunk, RankAnswer, Score
from uma_engine.tasks.shortlist import RankEvent, stream_plan

if TYPE_CHECKING:
    from uma_engine.decision_log import Forgotten

__all__ = ["AsyncEngine", "Engine"]

Explain = Literal["ledger", "words"]


class Engine(EngineBase):
    """The synchronous face. A context manager; safe to call from several threads, whose calls share batches.

    >>> with Engine("smollm2-135m") as engine:
    ...     answer = engine.rank("We need a Rust developer", ["Ten years of Rust", "A careful nurse"])
    """

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine. Calls in flight end with EngineUnavailable. Idempotent."""
        self._stack.close()
        close_log(self._log)

    @property
    def audit(self) -> Audit:
        """Audits over this engine: `counterfactual` and `paraphrase`."""
        return Audit(self)

    def load_adapter(self, name: str, path: str | Path | None = None) -> AdapterRef:
        """Load a PEFT adapter directory under `name` (without `path`: the one of this name that comes with the package), replacing what had
        that name at once; with every slot taken it takes that of an idle adapter, which is loaded again when somebody asks for it.

        Errors: AdapterError with the reason, before anything becomes visible; Overloaded where every slot stays in use.
        """
        self._check_open()
        return self._load_adapter(name, path)

    def reload_adapter(self, name: str) -> AdapterRef:
        """Read a known adapter's files again; requests from now on get what is there. Errors: UnknownAdapter, AdapterError"""
        self._check_open()
        return self._stack.adapter_store.reload(name)

    def rank(
        self,
        query: str,
        candidates: Iterable[Candidate | str],
        *,
        adapter: str | None = None,
        top_n: int | None = None,
        instruction: str | None = None,
        labels: Sequence[str] = ("yes", "no"),
        max_tokens_per_candidate: int | None = None,
        deadline: float | None = None,
        tenant: str = "",
        surface: Surface | Mapping[str, Any] | str | Path | None = None,
        job_facts: Mapping[str, Any] | None = None,
        explain: Explain = "ledger",
        explain_top: int | None = None,
        explain_tokens: int | None = None,
        explain_strict: bool = True,
        deliberate: int | None = None,
        cascade: Bounds | Mapping[str, Any] | str | Path | None = None,
        budget: int | None = None,
    ) -> RankAnswer:
        """Rank candidates for a job.

        Semantics:  each candidate is read alone after the job; score = probability of `labels[0]` among the labels' tokens
                    at the end of its prompt. Sorted by score, ties by index; `top_n` limits `results`, everyone is in
                    `all_results`. A candidate longer than `max_tokens_per_candidate` (or than the room left) is cut at the
                    end of its own text, and says so.
        Prior:      a candidate's `prior` is added to the logit of `labels[0]`; the ledger has what that changed.
        Surface:    with `surface` (a `Surface`, its plain data or its TOML file) the score is the declared aggregate of declared
                    factors, each in the result's ledger, and the answer a `SurfaceAnswer` that shows ties. `job_facts` are
                    the job's typed numbers, such as its budget; `adapter` then reads where a read names none.
        Words:      `explain="words"` with a surface (extra `words`): for the first `explain_top` results (5) the model writes an
                    assessment of at most `explain_tokens` tokens (96), in which every sentence cites the ledger or the texts.
                    What rules do not find in what it cites is dropped, and a sentence from the ledger stands in where a section
                    is left empty. `explain_strict=False` lets small words that no source has pass, if they are no known skill.
        Notes:      with `deliberate=N` the model first writes up to N tokens of notes about each of the first `explain_top` results
                    and the probes are read again after them. These results are put in order anew, the others stay behind them;
                    `answer.deliberation` has the notes and what they changed, `answer.usage.stages` what each stage cost.
        Cascade:    with `cascade` (bounds of `fit_cascade`, or their file) everybody is read for a few tokens, and to the end only who
                    can still be among the `top_n` (10). `deadline`, and `budget` in computed tokens, then end the ranking with
                    the best answer so far; `answer.cascade` says who was read how far, and who not at all.
        Numerics:   the same bits alone, in any batch, in any order, cached or not; words and notes are greedy.
        Errors:     InvalidRequest (empty query, labels of several tokens, duplicate ids, a non-finite fact), SurfaceError,
                    UnknownAdapter, TooLarge, Overloaded, DeadlineExceeded (`deadline` in seconds from now), EngineUnavailable
                    (also where a decision log is kept and cannot take the record: then there is no answer).
        """
        plan = self._rank_plan(
            query,
            candidates,
            adapter=adapter,
            top_n=top_n,
            instruction=instruction,
            labels=labels,
            max_tokens_per_candidate=max_tokens_per_candidate,
            deadline=deadline,
            tenant=tenant,
            surface=surface,
            job_facts=job_facts,
            explain=explain,
            explain_top=explain_top,
            explain_tokens=explain_tokens,
            explain_strict=explain_strict,
            deliberate=deliberate,
            cascade=cascade,
            budget=budget,
        )
        return run(logged(plan, self._log, tenant))

    def forget(
        self,
        candidate_id: str,
        *,
        tenant: str | None = None,
        texts: Sequence[str] = (),
        also: Sequence[ForgetsPeople | ForgetsTexts] = (),
    ) -> Forgotten:
        """Remove a person's content: from the decision log (proved by a scan of its files, with an entry that says so), from the KV
        cache, and from the stores in `also`: indexes (`delete(id)`) and embedders (`forget(texts)`).

        `texts`: theirs, where the log has none or they had others. Rankings of them in flight should have ended. Errors as
        `DecisionLog.forget`; EngineUnavailable where something may still be there
        """
        return forget(self, candidate_id, tenant, texts, also)

    def rank_stream(self, query: str, candidates: Iterable[Candidate | str], **options: Any) -> Iterator[RankEvent]:
        """`rank` as events: scores and order first, then each grounded sentence as it is written, the whole answer last.

        `options` are those of `rank`. Nothing is computed before the first event is asked for; closing the iterator cancels what is
        left. Only sentences that were found grounded are ever shown. Errors as in `rank`, from the iterator.
        """
        self._check_open()
        return stream(stream_plan(self, query, candidates, options), _whole)

    def fit_cascade(
        self,
        jobs: Iterable[tuple[str, Sequence[Candidate | str]]],
        *,
        prefix_tokens: int = 48,
        confidence: float = 0.95,
        save_to: str | Path | None = None,
        **options: Any,
    ) -> Bounds:
        """Bounds for `rank(..., cascade=)`: how far the score of a candidate's first tokens lies from the whole score, over jobs with
        candidates like those to come. `prefix_tokens=0`: nothing is read cheaply, candidates'
        priors alone tell who is left out. `options` are those of `rank` that decide a score: `adapter`, `instruction`, `labels`,
        `max_tokens_per_candidate`.

        Errors:     as `rank`, and InvalidRequest for fewer candidates than the confidence needs
        """
        self._check_open()
        bounds = run(fit_plan(self, jobs, prefix_tokens, confidence, options))
        if save_to is not None:
            bounds.save(save_to)
        return bounds

    def match(
        self,
        job: str,
        index: FirstStage,
        top_n: int | None = 10,
        *,
        first: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        blend: bool = False,
        tenant: str = "",
        **options: Any,
    ) -> MatchAnswer:
        """Find and rank: the `first` best of an index (100 unless told otherwise, or the least cut whose measured recall reaches
        `recall`) that pass `where`, ranked by the language model.

        `index` is a `uma_engine.retrieval.CandidateIndex` or anything with its `search`; `options` are those of `rank`. `blend`: what
        the first stage found is each candidate's `prior`, so that the score is both stages' (adapters from `uma data build` were
        trained so). The answer's `cut` says how many were considered, filtered out and cut, and how many good ones such a cut loses,
        where that was measured.

        Errors:     as `rank`, and InvalidRequest for filters on fields that nobody has, or a recall that no measured cut reaches
        """
        self._check_open()
        options = {"top_n": top_n, **options}
        return run(
            match_plan(
                self, job, index, first=first, recall=recall, where=where, blend=blend, tenant=tenant, options=options
            )
        )

    def calibrate(
        self,
        surface: Surface | Mapping[str, Any] | str | Path,
        read: str,
        examples: Iterable[tuple[str, Candidate | str, bool]],
        *,
        method: Method = "temperature",
        adapter: str | None = None,
        save_to: str | Path | None = None,
    ) -> Calibration:
        """Fit the calibration of one read of a surface on judged examples: job, candidate, whether the first label is right.

        Texts are redacted and cut as the surface has it. `save_to`: a file, or the adapter's directory, where
        `calibration = true` finds it. Errors: SurfaceError, InvalidRequest for too few examples; otherwise as `rank`
        """
        return run(calibrate(self, surface, read, examples, method, adapter, save_to))

    def score(
        self,
        prefix: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        *,
        labels: Sequence[str] = ("yes", "no"),
        adapter: str | None = None,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Score]:
        """Label logits after `tokenize(prefix) + tokenize(item)` for each item, in input order; no template is added.

        Prefix and items may also be token ids themselves. Errors as in `rank`.
        """
        return self._score_call(prefix, items, labels=labels, adapter=adapter, deadline=deadline, tenant=tenant).wait()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Completion]:
        """Complete each prompt. `chat=True` puts it into the model's chat template as a user message.

        A prompt may also be token ids, which are taken as they are. `params` and `adapter` are one for all or one for
        each prompt. Errors as in `rank`.
        """
        return self._generate_call(
            prompts,
            params,
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda _: None,
        ).wait()

    def stream(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> Iterator[CompletionChunk]:
        """Like `generate`, piece by piece as text appears. Leaving the iterator early cancels what is left."""
        pieces: queue.SimpleQueue[CompletionChunk | UmaError] = queue.SimpleQueue()
        call = self._generate_call(
            prompts,
            params,
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=pieces.put,
        )
        return _Stream(call, pieces)


def _whole(answer: RankAnswer) -> RankEvent:
    return RankEvent("answer", answer)


class _Stream(Iterator[CompletionChunk]):
    """Pieces of a call that runs already. Leaving early cancels it: by `close`, by the end of a `with`, or by forgetting it."""

    def __init__(self, call: Call[list[Completion]], pieces: queue.SimpleQueue[CompletionChunk | UmaError]) -> None:
        self._call = call
        self._pieces = pieces
        self._left = len(call.requests)
        call.submit()

    def __next__(self) -> CompletionChunk:
        if not self._left:
            raise StopIteration
        try:
            piece = self._pieces.get()
        except BaseException:  # Ctrl-C in the waiting thread
            self.close()
            raise
        if isinstance(piece, UmaError):
            self.close()
            raise piece
        self._left -= piece.finish_reason is not None
        return piece

    def close(self) -> None:
        """Cancel what is left."""
        self._left = 0
        self._call.cancel()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._left:
            self.close()


class AsyncEngine(EngineBase):
    """The asynchronous face: the same methods as coroutines; cancelling a task cancels its request.

    Make it with `await AsyncEngine.create(...)`, or directly where blocking for the load is fine.
    """

    @classmethod
    async def create(cls, model: str | Path = "smollm2-135m", **options: Any) -> AsyncEngine:
        return await asyncio.to_thread(cls, model, **options)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the engine. Calls in flight end with EngineUnavailable. Idempotent."""
        await asyncio.to_thread(self._stack.close)
        close_log(self._log)

    async def load_adapter(self, name: str, path: str | Path | None = None) -> AdapterRef:
        """As `Engine.load_adapter`."""
        self._check_open()
        return await asyncio.to_thread(self._load_adapter, name, path)

    async def reload_adapter(self, name: str) -> AdapterRef:
        """As `Engine.reload_adapter`."""
        self._check_open()
        return await asyncio.to_thread(self._stack.adapter_store.reload, name)

    async def rank(
        self,
        query: str,
        candidates: Iterable[Candidate | str],
        *,
        adapter: str | None = None,
        top_n: int | None = None,
        instruction: str | None = None,
        labels: Sequence[str] = ("yes", "no"),
        max_tokens_per_candidate: int | None = None,
        deadline: float | None = None,
        tenant: str = "",
        surface: Surface | Mapping[str, Any] | str | Path | None = None,
        job_facts: Mapping[str, Any] | None = None,
        explain: Explain = "ledger",
        explain_top: int | None = None,
        explain_tokens: int | None = None,
        explain_strict: bool = True,
        deliberate: int | None = None,
        cascade: Bounds | Mapping[str, Any] | str | Path | None = None,
        budget: int | None = None,
    ) -> RankAnswer:
        """As `Engine.rank`."""
        plan = self._rank_plan(
            query,
            candidates,
            adapter=adapter,
            top_n=top_n,
            instruction=instruction,
            labels=labels,
            max_tokens_per_candidate=max_tokens_per_candidate,
            deadline=deadline,
            tenant=tenant,
            surface=surface,
            job_facts=job_facts,
            explain=explain,
            explain_top=explain_top,
            explain_tokens=explain_tokens,
            explain_strict=explain_strict,
            deliberate=deliberate,
            cascade=cascade,
            budget=budget,
        )
        return await run_async(logged(plan, self._log, tenant))

    @property
    def audit(self) -> AsyncAudit:
        """As `Engine.audit`, its methods coroutines."""
        return AsyncAudit(self)

    async def forget(
        self,
        candidate_id: str,
        *,
        tenant: str | None = None,
        texts: Sequence[str] = (),
        also: Sequence[ForgetsPeople | ForgetsTexts] = (),
    ) -> Forgotten:
        """As `Engine.forget`."""
        return await asyncio.to_thread(forget, self, candidate_id, tenant, texts, also)

    async def fit_cascade(
        self,
        jobs: Iterable[tuple[str, Sequence[Candidate | str]]],
        *,
        prefix_tokens: int = 48,
        confidence: float = 0.95,
        save_to: str | Path | None = None,
        **options: Any,
    ) -> Bounds:
        """As `Engine.fit_cascade`."""
        self._check_open()
        bounds = await run_async(fit_plan(self, jobs, prefix_tokens, confidence, options))
        if save_to is not None:
            bounds.save(save_to)
        return bounds

    async def match(
        self,
        job: str,
        index: FirstStage,
        top_n: int | None = 10,
        *,
        first: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        blend: bool = False,
        tenant: str = "",
        **options: Any,
    ) -> MatchAnswer:
        """As `Engine.match`."""
        self._check_open()
        options = {"top_n": top_n, **options}
        plan = match_plan(
            self, job, index, first=first, recall=recall, where=where, blend=blend, tenant=tenant, options=options
        )
        return await run_async(plan)

    async def calibrate(
        self,
        surface: Surface | Mapping[str, Any] | str | Path,
        read: str,
        examples: Iterable[tuple[str, Candidate | str, bool]],
        *,
        method: Method = "temperature",
        adapter: str | None = None,
        save_to: str | Path | None = None,
    ) -> Calibration:
        """As `Engine.calibrate`."""
        return await run_async(calibrate(self, surface, read, examples, method, adapter, save_to))

    def rank_stream(
        self, query: str, candidates: Iterable[Candidate | str], **options: Any
    ) -> AsyncIterator[RankEvent]:
        """As `Engine.rank_stream`: an asynchronous iterator."""
        self._check_open()
        return stream_async(stream_plan(self, query, candidates, options), _whole)

    async def score(
        self,
        prefix: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        *,
        labels: Sequence[str] = ("yes", "no"),
        adapter: str | None = None,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Score]:
        """As `Engine.score`."""
        call = await prepared(
            self._score_call, prefix, items, labels=labels, adapter=adapter, deadline=deadline, tenant=tenant
        )
        return await finish(call)

    async def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Completion]:
        """As `Engine.generate`."""
        call = await prepared(
            self._generate_call,
            prompts,
            params,
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda _: None,
        )
        return await finish(call)

    async def stream(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> AsyncIterator[CompletionChunk]:
        """As `Engine.stream`: an asynchronous iterator."""
        pieces: asyncio.Queue[CompletionChunk | UmaError] = asyncio.Queue()
        event_loop = asyncio.get_running_loop()
        call = await prepared(
            self._generate_call,
            prompts,
            params,
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda piece: event_loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )
        call.submit()
        left = len(call.requests)
        try:
            while left:
                piece = await pieces.get()
                if isinstance(piece, UmaError):
                    raise piece
                left -= piece.finish_reason is not None
                yield piece
        finally:
            call.cancel()
