"""The public face: Engine and AsyncEngine with rank, score, generate, tokenize and adapters.

Knows how a call becomes requests and how results become answers; does not know scheduling or tensors. Both faces share
every line but the waiting.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import queue
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine._version import __version__
from uma_engine.catalog.chat_template import FieldPiece, split_template
from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.config import EngineConfig
from uma_engine.core import (
    AdapterRef,
    Candidate,
    FinishReason,
    Request,
    RequestKind,
    SamplingParams,
    Segment,
)
from uma_engine.errors import EngineUnavailable, InvalidRequest, TooLarge, UmaError
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.calls import Call, ScoreSink, TokenSink
from uma_engine.tasks.generate import TextAssembler
from uma_engine.tasks.records import make_record
from uma_engine.tasks.results import Completion, CompletionChunk, RankAnswer, RankResult, Score, StackInfo, Usage
from uma_engine.tasks.stack import Progress, Stack

if TYPE_CHECKING:
    from uma_engine.catalog.tokenizer import Tokenizer

__all__ = ["AsyncEngine", "Engine"]

ZERO_SHOT = (
    "zero-shot: `{model}` was never tuned for ranking and no adapter was used; "
    "these scores show that the engine runs, they are not advice about people"
)


class _EngineBase:
    """Everything the two faces share: the stack, the adapters, and the making of calls."""

    def __init__(self, model: str | Path = "smollm2-135m", *, progress: Progress | None = None, **options: Any) -> None:
        """Load a base: a catalog name, a hub id or a path. Options are the fields of `EngineConfig`."""
        try:
            self.config = EngineConfig(**options)
        except TypeError as error:
            known = ", ".join(f"`{name}`" for name in EngineConfig.__dataclass_fields__)
            raise InvalidRequest(f"unknown engine option: {error}", hint=f"options are {known}") from error
        self._stack = Stack(model, self.config, progress)
        self._ids = itertools.count()
        # A prompt's template is rendered once for each choice of labels.
        self._rank_prompt = functools.lru_cache(maxsize=32)(
            lambda labels: ranking.RankPrompt.build(self._stack.tokenizer, self._stack.template, labels)
        )

    # -- adapters and information -----------------------------------------------------------------------------------

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Requests that use it finish; its memory is freed with the last of them."""
        self._stack.adapters.unload(name)

    def adapters(self) -> list[str]:
        """Names of the loaded adapters, sorted."""
        return [info.name for info in self._stack.adapters.loaded()]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text: no special tokens are added, and none can come out of the text itself."""
        return self._stack.tokenizer.encode(_text("text", text, blank=True))

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return self._stack.tokenizer

    @property
    def model(self) -> str:
        """The name or path that the engine was made with."""
        return self._stack.name

    @property
    def max_model_len(self) -> int:
        """Tokens on the longest path from the root that the engine accepts."""
        return self._stack.max_model_len

    def stack_info(self, adapter: str | None = None, ref: AdapterRef | None = None) -> StackInfo:
        """Digests of what answers; see `StackInfo`."""
        s = self._stack
        return StackInfo(
            model=s.name,
            base_digest=s.digest,
            tokenizer_digest=s.tokenizer.digest,
            template_digest=s.template.digest,
            adapter=adapter,
            adapter_digest=ref.digest.hex() if ref else None,
            backend=s.backend,
            version=__version__,
        )

    def _check_open(self) -> None:
        if self._stack.loop.closed:
            raise EngineUnavailable("the engine is closed", hint="create a new engine")

    # -- calls ------------------------------------------------------------------------------------------------------

    def _lease(self, adapter: str | None) -> AdapterRef | None:
        return None if adapter is None else self._stack.adapters.lease(adapter)

    def _release_with(self, ref: AdapterRef | None, sink: ScoreSink | TokenSink) -> None:
        if ref is not None:
            sink.future.add_done_callback(lambda _: self._stack.adapters.release(ref))

    def _ids_of(self, name: str, value: str | Sequence[int]) -> list[int]:
        """Token ids of a text, or the ids themselves, checked against the vocabulary."""
        if isinstance(value, str):
            return self._stack.tokenizer.encode(value)
        ids = list(value)
        size = self._stack.model_config.vocab_size
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
                raise InvalidRequest(f"`{name}` holds `{token!r}` but token ids are integers below {size}", param=name)
        return ids

    def _request_id(self, kind: str) -> str:
        return f"{kind}-{next(self._ids)}"

    def _deadline(self, deadline: float | None) -> float | None:
        if deadline is None:
            return None
        if not 0 < deadline < float("inf"):
            raise InvalidRequest(
                f"`deadline` is `{deadline}` but must be a positive number of seconds", param="deadline"
            )
        return time.monotonic() + deadline

    def _score_usage(self, request: Request, tokenization_time: float, started: float, prompt_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=prompt_tokens,
            computed_tokens=request.num_computed_tokens,
            cached_tokens=request.num_cached_tokens,
            output_tokens=0,
            flops=request.num_computed_tokens * self._stack.model.flops_per_token,
            tokenization_time=tokenization_time,
            inference_time=time.perf_counter() - started,
        )

    def _rank_call(
        self,
        query: str,
        candidates: Iterable[Candidate | str],
        *,
        adapter: str | None,
        top_n: int | None,
        instruction: str | None,
        labels: Sequence[str],
        max_tokens_per_candidate: int | None,
        deadline: float | None,
        tenant: str,
    ) -> Call[RankAnswer]:
        self._check_open()
        began = time.perf_counter()
        query = _text("query", query)
        instruction = ranking.DEFAULT_INSTRUCTION if instruction is None else _text("instruction", instruction)
        _count("top_n", top_n)
        _count("max_tokens_per_candidate", max_tokens_per_candidate)
        people = ranking.as_candidates(candidates)
        tokenizer = self._stack.tokenizer
        label_token_ids = ranking.label_ids(tokenizer, labels)
        labels = tuple(labels)
        prompt = self._rank_prompt(labels)
        instruction_ids, job_ids = tokenizer.encode(instruction), tokenizer.encode(query)
        room = prompt.room(instruction_ids, job_ids, self.max_model_len)
        limit = min(room, max_tokens_per_candidate) if max_tokens_per_candidate else room
        encoded = tokenizer.encode_batch([c.text for c in people])
        segments, truncated = prompt.segments(instruction_ids, job_ids, encoded, limit)
        expires = self._deadline(deadline)
        ref = self._lease(adapter)
        options = {
            "adapter": adapter,
            "adapter_path": self._stack.adapters.path_of(ref) if ref else None,
            "top_n": top_n,
            "instruction": instruction,
            "labels": list(labels),
            "max_tokens_per_candidate": max_tokens_per_candidate,
            "engine": {"max_model_len": self.max_model_len, "precision": self.config.precision},
        }
        stack = self.stack_info(adapter, ref)
        warnings = [] if adapter else [ZERO_SHOT.format(model=self.model)]
        if any(truncated):
            cut = sum(1 for t in truncated if t)
            warnings.append(f"{cut} of {len(people)} candidates were cut to {limit} tokens; see `truncated_tokens`")
        tokenization_time = time.perf_counter() - began

        def answer(logits: dict[int, list[float]], usage: Usage) -> RankAnswer:
            everyone: list[RankResult] = [
                ranking.rank_result(i, person, labels, logits[i + 2], truncated[i]) for i, person in enumerate(people)
            ]
            record = make_record(
                query=query,
                candidates=people,
                options=options,
                results=everyone,
                stack=stack,
                usage=usage,
                warnings=warnings,
            )
            return RankAnswer(ranking.order(everyone, top_n), tuple(everyone), usage, stack, tuple(warnings), record)

        if not people:
            if ref is not None:
                self._stack.adapters.release(ref)
            usage = Usage(0, 0, 0, 0, 0.0, tokenization_time, 0.0)
            return Call(self._stack.loop, [], [], lambda: answer({}, usage))
        request = Request(
            self._request_id("rank"),
            RequestKind.SCORE,
            segments,
            cache_root=self._stack.cache_root(ref, tenant),
            adapter=ref,
            label_token_ids=label_token_ids,
            deadline=expires,
        )
        paths = sum(s.path_offset + len(s) for s in segments if s.scored)
        sink = ScoreSink()
        self._release_with(ref, sink)
        call: Call[RankAnswer] = Call(
            self._stack.loop,
            [request],
            [sink],
            lambda: answer(sink.future.result(), self._score_usage(request, tokenization_time, call.started, paths)),
        )
        return call

    def _score_call(
        self,
        prefix: str | Sequence[int],
        items: Sequence[str | Sequence[int]],
        *,
        labels: Sequence[str],
        adapter: str | None,
        deadline: float | None,
        tenant: str,
    ) -> Call[list[Score]]:
        self._check_open()
        if isinstance(items, str):
            raise InvalidRequest("`items` is a single string", hint="pass a list", param="items")
        tokenizer = self._stack.tokenizer
        labels = tuple(labels)
        label_token_ids = ranking.label_ids(tokenizer, labels)
        prefix_ids = self._ids_of("prefix", prefix)
        segments = [Segment(prefix_ids)] if prefix_ids else []
        parent = 0 if prefix_ids else -1
        for index, item in enumerate(items):
            ids = self._ids_of(f"items[{index}]", item)
            if not ids:
                raise InvalidRequest(f"item {index} is empty", param="items")
            segments.append(Segment(ids, parent=parent, scored=True))
        expires = self._deadline(deadline)
        if not items:
            return Call(self._stack.loop, [], [], list)
        ref = self._lease(adapter)
        request = Request(
            self._request_id("score"),
            RequestKind.SCORE,
            segments,
            cache_root=self._stack.cache_root(ref, tenant),
            adapter=ref,
            label_token_ids=label_token_ids,
            deadline=expires,
        )
        sink = ScoreSink()
        self._release_with(ref, sink)
        first = len(segments) - len(items)

        def build() -> list[Score]:
            logits = sink.future.result()
            return [ranking.score_of(labels, logits[i]) for i in range(first, len(segments))]

        return Call(self._stack.loop, [request], [sink], build)

    def _generate_call(
        self,
        prompts: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | Sequence[str | None] | None,
        chat: bool,
        deadline: float | None,
        tenant: str,
        emit: Any,
    ) -> Call[list[Completion]]:
        """`emit(CompletionChunk | UmaError | None)` is called on the loop's thread; None once every prompt ended."""
        self._check_open()
        tokenizer, n = self._stack.tokenizer, len(prompts)
        all_params = [params] * n if isinstance(params, SamplingParams) else list(params)
        all_adapters = [adapter] * n if adapter is None or isinstance(adapter, str) else list(adapter)
        for name, given in (("params", all_params), ("adapter", all_adapters)):
            if len(given) != n:
                raise InvalidRequest(f"`{name}` has {len(given)} entries for {n} prompts", param=name)
        expires = self._deadline(deadline)
        prepared: list[tuple[Segment, SamplingParams]] = []
        began = time.perf_counter()
        for index, (prompt, p) in enumerate(zip(prompts, all_params, strict=True)):
            prompt = _text(f"prompts[{index}]", prompt)
            ids = self._chat_ids(prompt) if chat else tokenizer.encode(prompt)
            if tokenizer.adds_bos and tokenizer.bos_id is not None and not chat:
                ids = [tokenizer.bos_id, *ids]
            if len(ids) + p.max_tokens > self.max_model_len:
                raise TooLarge(
                    f"prompt {index} has {len(ids)} tokens and `max_tokens` is {p.max_tokens} but a path may hold {self.max_model_len}",
                    hint="shorten the prompt or lower `max_tokens`",
                    param="prompts",
                )
            if p.seed is None:
                p = _with_seed(p, self.config.seed, ids, index)
            prepared.append((Segment(ids), p))
        tokenization_time = time.perf_counter() - began
        refs: list[AdapterRef | None] = []
        requests: list[Request] = []
        sinks: list[TokenSink] = []
        assemblers: list[TextAssembler] = []
        ended_at: list[float] = [0.0] * n
        left = itertools.count(n - 1, -1)
        try:
            for adapter_name in all_adapters:
                refs.append(self._lease(adapter_name))
        except UmaError:
            for ref in refs:
                if ref is not None:
                    self._stack.adapters.release(ref)
            raise

        def ended(index: int, reason: FinishReason, error: UmaError | None) -> None:
            ended_at[index] = time.perf_counter()
            if error is not None:
                emit(error)
            else:
                reasons[index] = assemblers[index].finish(reason)
                emit(CompletionChunk(index, "", (), reasons[index]))
            if next(left) == 0:
                emit(None)

        reasons: list[FinishReason] = [FinishReason.ERROR] * n
        for index, ((segment, p), ref) in enumerate(zip(prepared, refs, strict=True)):
            stop_ids = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else self._eos_ids())
            requests.append(
                Request(
                    self._request_id("generate"),
                    RequestKind.GENERATE,
                    [segment],
                    cache_root=self._stack.cache_root(ref, tenant),
                    adapter=ref,
                    sampling=p,
                    stop_token_ids=stop_ids,
                    deadline=expires,
                )
            )
            assembler = TextAssembler(
                IncrementalDecoder(tokenizer),
                p.stop,
                lambda text, ids, index=index: emit(CompletionChunk(index, text, ids)),  # type: ignore[misc]
            )
            assemblers.append(assembler)
            take = _skip_stop_ids(assembler, stop_ids)
            sink = TokenSink(take, lambda reason, error, index=index: ended(index, reason, error))  # type: ignore[misc]
            self._release_with(ref, sink)
            sinks.append(sink)

        def build() -> list[Completion]:
            return [
                Completion(
                    assemblers[i].text,
                    tuple(requests[i].output_token_ids),
                    reasons[i],
                    self._generate_usage(requests[i], tokenization_time, call.started, ended_at[i]),
                )
                for i in range(n)
            ]

        call: Call[list[Completion]] = Call(self._stack.loop, requests, sinks, build)
        return call

    def _generate_usage(self, request: Request, tokenization_time: float, started: float, ended: float) -> Usage:
        return Usage(
            prompt_tokens=request.num_prompt_tokens,
            computed_tokens=request.num_computed_tokens,
            cached_tokens=request.num_cached_tokens,
            output_tokens=len(request.output_token_ids),
            flops=request.num_computed_tokens * self._stack.model.flops_per_token,
            tokenization_time=tokenization_time,
            inference_time=ended - started,
        )

    def _eos_ids(self) -> frozenset[int]:
        eos = self._stack.tokenizer.eos_id
        return frozenset(self._stack.model_config.eos_token_ids) | (frozenset() if eos is None else {eos})

    def _chat_ids(self, prompt: str) -> list[int]:
        mark = "\u27e6uma-prompt\u27e7"
        tokenizer = self._stack.tokenizer
        ids: list[int] = []
        for piece in split_template(
            tokenizer, self._stack.template, [{"role": "user", "content": mark}], {"prompt": mark}
        ):
            ids += tokenizer.encode(prompt) if isinstance(piece, FieldPiece) else piece.token_ids
        return ids


class Engine(_EngineBase):
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

    def load_adapter(self, name: str, path: str | Path) -> AdapterRef:
        """Load a PEFT adapter directory under `name`, replacing what had that name at once.

        Errors: AdapterError with the reason, before anything becomes visible.
        """
        self._check_open()
        return self._stack.adapters.load(name, Path(path))

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
    ) -> RankAnswer:
        """Rank candidates for a job.

        Semantics:  each candidate is read alone after the job; score = probability of `labels[0]` among the labels' tokens
                    at the end of its prompt. Sorted by score, ties by index; `top_n` limits `results`, everyone is in
                    `all_results`. A candidate longer than `max_tokens_per_candidate` (or than the room left) is cut at the
                    end of its own text, and says so.
        Numerics:   the same bits alone, in any batch, in any order, cached or not.
        Errors:     InvalidRequest (empty query, labels of several tokens, duplicate ids, a non-finite fact), UnknownAdapter,
                    TooLarge, Overloaded, DeadlineExceeded (`deadline` in seconds from now), EngineUnavailable.
        """
        return self._rank_call(
            query,
            candidates,
            adapter=adapter,
            top_n=top_n,
            instruction=instruction,
            labels=labels,
            max_tokens_per_candidate=max_tokens_per_candidate,
            deadline=deadline,
            tenant=tenant,
        ).wait()

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
        prompts: str | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Completion]:
        """Complete each prompt. `chat=True` puts it into the model's chat template as a user message.

        `params` and `adapter` are one for all or one for each prompt. Errors as in `rank`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._generate_call(
            prompts,
            params or SamplingParams(),
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda _: None,
        ).wait()

    def stream(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> Iterator[CompletionChunk]:
        """Like `generate`, piece by piece as text appears. Leaving the iterator early cancels what is left."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        pieces: queue.SimpleQueue[CompletionChunk | UmaError | None] = queue.SimpleQueue()
        call = self._generate_call(
            prompts,
            params or SamplingParams(),
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=pieces.put,
        )
        return _stream(call, pieces, bool(prompts))


def _stream(
    call: Call[list[Completion]], pieces: queue.SimpleQueue[CompletionChunk | UmaError | None], any_prompts: bool
) -> Iterator[CompletionChunk]:
    call.submit()
    try:
        while any_prompts and (piece := pieces.get()) is not None:
            if isinstance(piece, UmaError):
                raise piece
            yield piece
    finally:
        call.cancel()


class AsyncEngine(_EngineBase):
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

    async def load_adapter(self, name: str, path: str | Path) -> AdapterRef:
        """As `Engine.load_adapter`."""
        self._check_open()
        return await asyncio.to_thread(self._stack.adapters.load, name, Path(path))

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
    ) -> RankAnswer:
        """As `Engine.rank`."""
        call = await asyncio.to_thread(
            self._rank_call,
            query,
            candidates,
            adapter=adapter,
            top_n=top_n,
            instruction=instruction,
            labels=labels,
            max_tokens_per_candidate=max_tokens_per_candidate,
            deadline=deadline,
            tenant=tenant,
        )
        return await _finish(call)

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
        call = await asyncio.to_thread(
            self._score_call, prefix, items, labels=labels, adapter=adapter, deadline=deadline, tenant=tenant
        )
        return await _finish(call)

    async def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> list[Completion]:
        """As `Engine.generate`."""
        call = await asyncio.to_thread(
            self._generate_call,
            [prompts] if isinstance(prompts, str) else list(prompts),
            params or SamplingParams(),
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda _: None,
        )
        return await _finish(call)

    async def stream(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        chat: bool = False,
        deadline: float | None = None,
        tenant: str = "",
    ) -> AsyncIterator[CompletionChunk]:
        """As `Engine.stream`: an asynchronous iterator."""
        pieces: asyncio.Queue[CompletionChunk | UmaError | None] = asyncio.Queue()
        event_loop = asyncio.get_running_loop()
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        call = await asyncio.to_thread(
            self._generate_call,
            prompts,
            params or SamplingParams(),
            adapter=adapter,
            chat=chat,
            deadline=deadline,
            tenant=tenant,
            emit=lambda piece: event_loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )
        call.submit()
        try:
            while prompts and (piece := await pieces.get()) is not None:
                if isinstance(piece, UmaError):
                    raise piece
                yield piece
        finally:
            call.cancel()


async def _finish(call: Call[Any]) -> Any:
    call.submit()
    try:
        for future in call.futures:
            await asyncio.wrap_future(future)
    except BaseException:
        call.cancel()
        raise
    return call.build()


def _text(name: str, value: object, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"`{name}` is a `{type(value).__name__}` but must be a string", param=name)
    if not blank and not value.strip():
        raise InvalidRequest(f"`{name}` is empty", hint="pass the text itself", param=name)
    return value


def _count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(f"`{name}` is `{value!r}` but must be a positive integer or None", param=name)


def _with_seed(params: SamplingParams, base: int, ids: list[int], index: int) -> SamplingParams:
    """A request without a seed gets one from the engine's seed, its prompt and its place: the same call, the same text."""
    from dataclasses import replace

    data = f"{base}:{index}:{ids}".encode()
    return replace(params, seed=int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1)


def _skip_stop_ids(assembler: TextAssembler, stop_ids: frozenset[int]) -> Any:
    """Tokens that end a sequence are not part of its text."""

    def take(token_id: int) -> bool:
        return False if token_id in stop_ids else assembler.take(token_id)

    return take
