"""What both faces of the engine share: how a call becomes requests, and how results become answers.

Knows text, adapters' names and answers; does not know scheduling, tensors or how a caller waits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
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

__all__ = ["EngineBase"]

ZERO_SHOT = (
    "zero-shot: no adapter was used and `{model}` is not known to be tuned for ranking; "
    "these scores show that the engine runs, they are not advice about people"
)


class EngineBase:
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

    @contextlib.contextmanager
    def _leased(self, adapter: str | None, sink: ScoreSink) -> Iterator[AdapterRef | None]:
        """The adapter held until the sink's future ends, which it does at once if the block fails."""
        ref = self._lease(adapter)
        self._release_with(ref, sink)
        try:
            yield ref
        except BaseException as error:
            sink.future.set_exception(error)
            raise

    def _score_request(
        self,
        kind: str,
        segments: list[Segment],
        ref: AdapterRef | None,
        label_token_ids: tuple[int, ...],
        expires: float | None,
        tenant: str,
    ) -> Request:
        return Request(
            self._request_id(kind),
            RequestKind.SCORE,
            segments,
            cache_root=self._stack.cache_root(ref, tenant),
            adapter=ref,
            label_token_ids=label_token_ids,
            deadline=expires,
        )

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
        tokenization_time = time.perf_counter() - began
        sink = ScoreSink()
        with self._leased(adapter, sink) as ref:
            stack = self.stack_info(adapter, ref)
            options = {
                "adapter": adapter,
                "adapter_path": self._stack.adapters.path_of(ref) if ref else None,
                "top_n": top_n,
                "instruction": instruction,
                "labels": list(labels),
                "max_tokens_per_candidate": max_tokens_per_candidate,
                "engine": {"max_model_len": self.max_model_len, "precision": self.config.precision},
            }
            requests = []
            if people:
                request = self._score_request("rank", segments, ref, label_token_ids, expires, tenant)
                requests.append(request)
        warnings = [] if adapter else [ZERO_SHOT.format(model=self.model)]
        if any(truncated):
            cut = sum(1 for t in truncated if t)
            warnings.append(f"{cut} of {len(people)} candidates were cut to {limit} tokens; see `truncated_tokens`")

        def answer() -> RankAnswer:
            usage = Usage(0, 0, 0, 0, 0.0, tokenization_time, 0.0)
            logits: dict[int, list[float]] = {}
            if people:
                logits, paths = sink.future.result(), sum(s.path_offset + len(s) for s in segments if s.scored)
                usage = self._score_usage(request, tokenization_time, call.started, paths)
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

        call: Call[RankAnswer] = Call(self._stack.loop, requests, [sink] if people else [], answer)
        if not people:
            sink.future.set_result({})  # nothing to run: what the call holds goes back at once
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
        sink = ScoreSink()
        with self._leased(adapter, sink) as ref:
            request = self._score_request("score", segments, ref, label_token_ids, expires, tenant)
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
            if not ids:
                raise InvalidRequest(f"prompt {index} has no tokens", param="prompts")
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
