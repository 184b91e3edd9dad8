"""What both faces of the engine share: how a call becomes requests, and how results become answers.

Knows text, adapters' names and answers; does not know scheduling, tensors or how a caller waits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uma_engine._version import __version__
from uma_engine.adapters.shipped import shipped
from uma_engine.catalog.tokenizer import IncrementalDecoder
from uma_engine.config import EngineConfig
from uma_engine.core import (
    AdapterRef,
    Candidate,
    Request,
    RequestKind,
    SamplingParams,
    Segment,
)
from uma_engine.errors import EngineUnavailable, InvalidRequest, TooLarge, UmaError
from uma_engine.ranking.surface import DEFAULT_PROBE, Surface, question_of
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.arguments import check_count, check_list, check_text
from uma_engine.tasks.calls import Call, CallSink, ScoreSink, end_futures
from uma_engine.tasks.cascade import ranked_plan
from uma_engine.tasks.decisions import close_log, open_log
from uma_engine.tasks.generate import TextSink, chat_ids, with_seed
from uma_engine.tasks.grammar import GrammarCompiler, JsonGrammar
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.records import make_record
from uma_engine.tasks.results import Completion, CompletionChunk, RankAnswer, RankResult, Score, StackInfo
from uma_engine.tasks.shortlist import Beside
from uma_engine.tasks.stack import Progress, Stack
from uma_engine.tasks.surface_rank import as_surface, surface_call
from uma_engine.tasks.usage import Clock, usage_of

if TYPE_CHECKING:
    from uma_engine.adapters import AdapterInfo, Known
    from uma_engine.catalog.tokenizer import Tokenizer
    from uma_engine.decision_log import DecisionLog
    from uma_engine.engine import EngineLoop

__all__ = ["EngineBase"]

DEFAULT_LABELS = ("yes", "no")
RANK_DEFAULTS: dict[str, Any] = {
    "adapter": None,
    "top_n": None,
    "instruction": None,
    "labels": DEFAULT_LABELS,
    "max_tokens_per_candidate": None,
    "deadline": None,
    "tenant": "",
    "surface": None,
    "job_facts": None,
}
ZERO_SHOT = (
    "zero-shot: no adapter was used and `{model}` is not known to be tuned for ranking; "
    "these scores show that the engine runs, they are not advice about people"
)


def _is_busy(loop: weakref.ref[EngineLoop]) -> bool:
    found = loop()
    return found is not None and not found.closed and found.busy


class EngineBase:
    """Everything the two faces share: the stack, the adapters, and the making of calls."""

    def __init__(self, model: str | Path = "smollm2-135m", *, progress: Progress | None = None, **options: Any) -> None:
        """Load a base: a catalog name, a hub id or a path. Options are the fields of `EngineConfig`."""
        try:
            self.config = EngineConfig(**options)
        except TypeError as error:
            known = ", ".join(f"`{name}`" for name in EngineConfig.__dataclass_fields__)
            raise InvalidRequest(f"unknown engine option: {error}", hint=f"options are {known}") from error
        self._log = open_log(self.config)  # before the weights: what is wrong with it shows at once
        weakref.finalize(self, close_log, self._log)
        try:
            self._stack = Stack(model, self.config, progress)
        except BaseException:
            close_log(self._log)
            raise
        self._ids = itertools.count()
        tokenizer, template = self._stack.tokenizer, self._stack.template
        # A prompt's template is rendered once for each question. (No reference to self: it would be a cycle.)
        self._rank_prompt = functools.lru_cache(maxsize=128)(
            lambda question: ranking.RankPrompt.build(tokenizer, template, question)
        )
        self._grammars = GrammarCompiler(tokenizer, self.vocab_size, self._eos_ids())
        weakref.finalize(self, self._stack.loop.stop)  # an engine that is forgotten without `close` ends its thread

    # -- adapters and information -----------------------------------------------------------------------------------

    def _load_adapter(self, name: str, path: str | Path | None) -> AdapterRef:
        if path is None:
            path = shipped(check_text("name", name))
        if not isinstance(path, str | Path):
            raise InvalidRequest(f"`path` is a `{type(path).__name__}` but must be a string or a Path", param="path")
        self._check_open()
        return self._stack.adapter_store.load(check_text("name", name), Path(path).expanduser().absolute())

    def register_adapter(self, name: str, path: str | Path, *, pinned: bool = False) -> None:
        """Make an adapter known without loading it: the first request that asks for it does, and may put an idle one out of its slot (of
        `max_loras`), which comes back in the same way. `pinned`: it stays once it is there. Errors: AdapterError"""
        self._check_open()
        path = Path(path).expanduser().absolute()
        self._stack.adapter_store.register(check_text("name", name), path, pinned)

    def alias_adapter(self, alias: str, name: str) -> None:
        """Another name for a known adapter, or the same for another one: requests from now on get that. Errors: UnknownAdapter,
        AdapterError"""
        self._stack.adapter_store.alias(check_text("alias", alias), name)

    def known_adapters(self) -> list[tuple[Known, AdapterInfo | None]]:
        """Every known adapter by name, and what is in its slot, if anything."""
        return self._stack.adapter_store.known()

    def is_cold(self, name: str) -> bool:
        """Whether this is a known adapter that would have to be loaded."""
        return self._stack.adapter_store.is_cold(name)

    def prefetch_adapter(self, name: str) -> None:
        """Load a known adapter now, if it is not there, and blocks until then. Errors: as `lease` of a request"""
        store = self._stack.adapter_store
        store.release(store.lease(name))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter or an alias. Requests that use it finish; its memory is freed with the last of them."""
        self._stack.adapter_store.unload(name)

    def adapters(self) -> list[str]:
        """Names that may be asked for, sorted: of loaded adapters, of registered ones, and aliases."""
        return self._stack.adapter_store.names()

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of messages, each with `role` (system, user, assistant) and `content`, in the base's chat template, up to where an
        answer begins. No content can bring control tokens. Errors: InvalidRequest"""
        return chat_ids(self._stack.tokenizer, self._stack.template, messages)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text: no special tokens are added, and none can come out of the text itself."""
        return self._stack.tokenizer.encode(check_text("text", text, blank=True))

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return self._stack.tokenizer

    @property
    def model(self) -> str:
        """The name or path that the engine was made with."""
        return self._stack.name

    @property
    def vocab_size(self) -> int:
        """Token ids are integers below this."""
        return self._stack.model_config.vocab_size

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of the linear layers for one token, a multiply and an add being two."""
        return self._stack.flops_per_token

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

    @property
    def decision_log(self) -> DecisionLog | None:
        """The log of the option `decision_log`, to read, export and verify; None without it."""
        return self._log

    @property
    def closed(self) -> bool:
        return self._stack.loop.closed

    def give_way(self, to: EngineBase | None) -> None:
        """Compute only while `to`, an engine of this process, has nothing to do, but a step in five seconds. None: as ever."""
        self._stack.loop.give_way = None if to is None else functools.partial(_is_busy, weakref.ref(to._stack.loop))

    def counters(self) -> dict[str, float]:
        """What goes on now: requests running and waiting, `kv_cache_usage_perc` from 0 to 1, adapters in slots; and so far: `num_steps`,
        misses and evictions of adapters. A look from outside: the numbers may be of two steps."""
        scheduler, pool = self._stack.scheduler, self._stack.block_pool
        return {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": scheduler.num_waiting,
            "kv_cache_usage_perc": pool.num_used / max(1, pool.num_blocks),
            "num_adapters": sum(info is not None for _, info in self._stack.adapter_store.known()),
            "adapter_misses": self._stack.adapter_store.num_misses,
            "adapter_evictions": self._stack.adapter_store.num_evictions,
            "num_steps": self._stack.loop.num_steps,
        }

    def _check_open(self) -> None:
        if self.closed:
            raise EngineUnavailable("the engine is closed", hint="create a new engine")

    # -- calls ------------------------------------------------------------------------------------------------------

    def _lease(self, adapter: str | None) -> AdapterRef | None:
        return None if adapter is None else self._stack.adapter_store.lease(check_text("adapter", adapter))

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

    def _release_with(self, ref: AdapterRef | None, sink: CallSink) -> None:
        if ref is not None:
            sink.future.add_done_callback(lambda _: self._stack.adapter_store.release(ref))

    def _ids_of(self, name: str, value: str | Sequence[int]) -> list[int]:
        """Token ids of a text, or the ids themselves, checked against the vocabulary."""
        if isinstance(value, str):
            return self._stack.check_tokens(self._stack.tokenizer.encode(value))
        try:
            ids = list(value)
        except TypeError:
            raise InvalidRequest(
                f"`{name}` is a `{type(value).__name__}` but must be a string or token ids", param=name
            ) from None
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
        if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline < float("inf"):
            raise InvalidRequest(
                f"`deadline` is `{deadline}` but must be a positive number of seconds", param="deadline"
            )
        return time.monotonic() + deadline

    def _rank_plan(
        self,
        query: str,
        candidates: Iterable[Candidate | str],
        **options: Any,
    ) -> Plan[RankAnswer]:
        """The calls of a ranking, one after the other; see `Engine.rank`. Its record goes into no log: `rank` adds that, and an
        audit, which decides about nobody, does not."""
        return (yield from ranked_plan(self, query, candidates, RANK_DEFAULTS | options))

    def _rank_call(
        self,
        query: str,
        candidates: Iterable[Candidate | str],
        *,
        adapter: str | None = None,
        top_n: int | None = None,
        instruction: str | None = None,
        labels: Sequence[str] = DEFAULT_LABELS,
        max_tokens_per_candidate: int | None = None,
        deadline: float | None = None,
        tenant: str = "",
        surface: Surface | Mapping[str, Any] | str | Path | None = None,
        job_facts: Mapping[str, Any] | None = None,
        beside: Beside | None = None,
    ) -> Call[RankAnswer]:
        """`beside`: what later stages will read after the candidates' texts."""
        self._check_open()
        began = Clock()
        expires = self._deadline(deadline)
        # White space at a text's ends would change how the template around it is tokenised.
        query = check_text("query", query).strip()
        declared = None if surface is None else as_surface(surface)
        if instruction is None and declared is not None:
            instruction = declared.instruction
        instruction = (
            ranking.DEFAULT_INSTRUCTION if instruction is None else check_text("instruction", instruction)
        ).strip()
        check_text("tenant", tenant, blank=True)
        check_count("top_n", top_n)
        check_count("max_tokens_per_candidate", max_tokens_per_candidate)
        people = ranking.as_candidates(candidates)
        if declared is not None:
            if any(person.prior for person in people):
                raise InvalidRequest(
                    "a candidate has a `prior` beside a surface", hint="declare a fact for it", param="prior"
                )
            if not isinstance(labels, list | tuple) or tuple(labels) != DEFAULT_LABELS:
                raise InvalidRequest(
                    f"`labels` is `{labels!r}` beside a surface",
                    hint="a surface's reads have their own",
                    param="labels",
                )
            return surface_call(
                self,
                query,
                people,
                surface=declared,
                job_facts={} if job_facts is None else job_facts,
                adapter=adapter,
                top_n=top_n,
                instruction=instruction,
                max_tokens_per_candidate=max_tokens_per_candidate,
                expires=expires,
                tenant=tenant,
                began=began,
                beside=beside,
            )
        if job_facts is not None:
            raise InvalidRequest("`job_facts` is given without a surface", hint="only a surface's facts read them")
        tokenizer = self._stack.tokenizer
        label_token_ids = ranking.label_ids(tokenizer, labels)
        labels = tuple(labels)
        prompt = self._rank_prompt(question_of(DEFAULT_PROBE, labels))
        instruction_ids, job_ids = self._ids_of("instruction", instruction), self._ids_of("query", query)
        room = prompt.room(instruction_ids, job_ids, self.max_model_len)
        limit = min(room, max_tokens_per_candidate) if max_tokens_per_candidate else room
        encoded = [self._stack.check_tokens(ids) for ids in tokenizer.encode_batch([c.text.strip() for c in people])]
        others = [] if beside is None else beside.of(adapter)
        shared = ranking.shared_prefix([prompt.after_candidate, *others]) if others else None
        segments, truncated = prompt.segments(instruction_ids, job_ids, encoded, limit, shared)
        leaves = [i for i, segment in enumerate(segments) if segment.scored]
        tokenized = began.stage("tokenize")
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
            logits = sink.future.result()
            usage = usage_of(requests, tokenized, call.started, self._stack.flops_per_token)
            everyone: list[RankResult] = [
                ranking.rank_result(i, person, labels, logits[leaves[i]], truncated[i])
                for i, person in enumerate(people)
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
        expires = self._deadline(deadline)
        items = check_list("items", items)
        check_text("tenant", tenant, blank=True)
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
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        adapter: str | Sequence[str | None] | None,
        chat: bool,
        deadline: float | None,
        tenant: str,
        emit: Callable[[CompletionChunk | UmaError], object],
    ) -> Call[list[Completion]]:
        """`emit` is called on the loop's thread; see `TextSink`."""
        self._check_open()
        expires = self._deadline(deadline)
        prompts = [prompts] if isinstance(prompts, str) else check_list("prompts", prompts)
        check_text("tenant", tenant, blank=True)
        tokenizer, n = self._stack.tokenizer, len(prompts)
        params = SamplingParams() if params is None else params
        all_params = [params] * n if isinstance(params, SamplingParams) else check_list("params", params)
        all_adapters = [adapter] * n if adapter is None or isinstance(adapter, str) else check_list("adapter", adapter)
        for name, given in (("params", all_params), ("adapter", all_adapters)):
            if len(given) != n:
                raise InvalidRequest(f"`{name}` has {len(given)} entries for {n} prompts", param=name)
        prepared: list[tuple[Segment, SamplingParams, JsonGrammar | None]] = []
        began = Clock()
        for index, (prompt, p) in enumerate(zip(prompts, all_params, strict=True)):
            if not isinstance(p, SamplingParams):
                raise InvalidRequest(f"`params[{index}]` is a `{type(p).__name__}`, not SamplingParams", param="params")
            if isinstance(prompt, str):
                prompt = check_text(f"prompts[{index}]", prompt)
                ids = self._stack.check_tokens(
                    self.chat_tokens([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
                )
                if tokenizer.adds_bos and tokenizer.bos_id is not None and not chat:
                    ids = [tokenizer.bos_id, *ids]
            else:
                if chat:
                    raise InvalidRequest(
                        f"`prompts[{index}]` is token ids, which `chat` cannot put into a template", param="chat"
                    )
                ids = self._ids_of(f"prompts[{index}]", prompt)
            if not ids:
                raise InvalidRequest(f"prompt {index} has no tokens", param="prompts")
            if len(ids) + p.max_tokens > self.max_model_len:
                raise TooLarge(
                    f"prompt {index} has {len(ids)} tokens and `max_tokens` is {p.max_tokens} but a path may hold {self.max_model_len}",
                    hint="shorten the prompt or lower `max_tokens`",
                    param="prompts",
                )
            if p.seed is None:
                p = with_seed(p, self.config.seed, ids, index)
            prepared.append((Segment(ids), p, self._grammar(p)))
        tokenized = began.stage("tokenize")
        requests: list[Request] = []
        sinks: list[TextSink] = []
        try:
            for index, ((segment, p, grammar), adapter_name) in enumerate(zip(prepared, all_adapters, strict=True)):
                stop_ids = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else self._eos_ids())
                sink = TextSink(index, IncrementalDecoder(tokenizer), p.stop, stop_ids, emit)
                ref = self._lease(adapter_name)
                self._release_with(ref, sink)
                sinks.append(sink)
                request = Request(
                    self._request_id("generate"),
                    RequestKind.GENERATE,
                    [segment],
                    cache_root=self._stack.cache_root(ref, tenant),
                    adapter=ref,
                    sampling=p,
                    stop_token_ids=stop_ids,
                    deadline=expires,
                    grammar=grammar,
                )
                requests.append(request)
        except BaseException as error:
            end_futures(sinks, error)
            raise

        def build() -> list[Completion]:
            return [
                Completion(
                    sink.text,
                    tuple(request.output_token_ids),
                    sink.future.result(),
                    usage_of(
                        [request], tokenized, call.started, self._stack.flops_per_token, "generate", sink.ended_at
                    ),
                )
                for request, sink in zip(requests, sinks, strict=True)
            ]

        call: Call[list[Completion]] = Call(self._stack.loop, requests, sinks, build)
        return call

    def _grammar(self, params: SamplingParams) -> JsonGrammar | None:
        if params.json_schema is None:
            return None
        return self._grammars.json(params.json_schema, params.max_tokens)

    def _eos_ids(self) -> frozenset[int]:
        eos = self._stack.tokenizer.eos_id
        return frozenset(self._stack.model_config.eos_token_ids) | (frozenset() if eos is None else {eos})
