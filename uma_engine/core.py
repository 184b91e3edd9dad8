"""The nouns that every layer shares: candidates, sampling, requests as trees of segments, and the record of one step.

Knows token ids and counters; does not know text templates, tensors or who schedules what. Imports no torch.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeGuard

from uma_engine.errors import InvalidRequest, UmaError

__all__ = [
    "AdapterRef",
    "Candidate",
    "FinishReason",
    "Grammar",
    "Request",
    "RequestKind",
    "SamplingParams",
    "ScheduledChunk",
    "SchedulerOutput",
    "Segment",
    "StepResult",
    "background",
    "in_background",
    "unknown_token",
]

NO_PARENT = -1
_background: contextvars.ContextVar[bool] = contextvars.ContextVar("uma_background", default=False)


@contextlib.contextmanager
def background() -> Iterator[None]:
    """What is asked of an engine inside, in this thread or task, is background work: it is computed in small steps with what others leave,
    so that nobody waits long behind it. It is not starved, and its answers are the same.
    """
    token = _background.set(True)
    try:
        yield
    finally:
        _background.reset(token)


def in_background() -> bool:
    """Whether this thread or task is inside `background`."""
    return _background.get()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One person or proposal to be ranked.

    `facts` are typed values (numbers, strings, booleans, None) kept beside the text. `prior`: what is known before anything is read, such
    as by a first stage, in log-odds of fitting this job; a ranking without a surface adds it to the model's own.
    """

    id: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    prior: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not isinstance(self.text, str):
            raise InvalidRequest(
                f"a candidate has `id` of type `{type(self.id).__name__}` and `text` of type"
                f" `{type(self.text).__name__}`",
                hint="both must be strings",
            )
        if not isinstance(self.facts, Mapping):
            raise InvalidRequest(
                f"`facts` of candidate `{self.id}` is a `{type(self.facts).__name__}` but must be a mapping"
            )
        if isinstance(self.prior, bool) or not isinstance(self.prior, int | float) or not math.isfinite(self.prior):
            raise InvalidRequest(
                f"`prior` of candidate `{self.id}` is `{self.prior!r}` but must be a finite number", param="prior"
            )
        for key, value in self.facts.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidRequest(
                    f"fact `{key}` of candidate `{self.id}` is `{value}`",
                    hint="facts must be finite; leave out what is not known, or pass None",
                    param=key,
                )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    `temperature=0` is greedy; `top_k=0`, `top_p=1` and penalties at their neutral value are off. With `json_schema` the text is
    JSON that the schema accepts, whatever the model would rather say, and whole within `max_tokens` (extra `words`).
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    json_schema: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError:
                raise _bad(name, getattr(self, name), "a sequence") from None
        # Values travel to the kernels as fp32, int32 and int64: what does not fit must fail here, not in a shared step.
        for name, low in (("max_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not _is_int(value) or not low <= value < 2**31:
                raise _bad(name, value, f"an integer from {low} on")
        if self.seed is not None and (not _is_int(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise _bad("seed", self.seed, "None or a 64-bit integer")
        floats = (
            ("temperature", lambda x: x >= 0, "finite and not negative"),
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("min_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("repetition_penalty", lambda x: x > 0, "finite and positive"),
            ("presence_penalty", lambda x: -2 <= x <= 2, "in [-2, 2]"),
            ("frequency_penalty", lambda x: -2 <= x <= 2, "in [-2, 2]"),
        )
        for name, fits, rule in floats:
            value = _as_fp32(getattr(self, name))
            if value is None or not fits(value):
                raise _bad(name, getattr(self, name), f"{rule}, as a 32-bit float")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise _bad("stop", self.stop, "non-empty strings")
        if not all(_is_int(t) and 0 <= t < 2**31 for t in self.stop_token_ids):
            raise _bad("stop_token_ids", self.stop_token_ids, "token ids")
        if not isinstance(self.ignore_eos, bool):
            raise _bad("ignore_eos", self.ignore_eos, "True or False")
        if self.json_schema is not None:
            if not isinstance(self.json_schema, Mapping):
                raise _bad("json_schema", self.json_schema, "None or a JSON schema as a mapping")
            try:
                json.dumps(self.json_schema, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidRequest(f"`json_schema` is not plain JSON data: {error}", param="json_schema") from None

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_fp32(value: object) -> float | None:
    """The value as a 32-bit float holds it; None for what is no finite number there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return None
    return rounded if math.isfinite(rounded) else None


def _bad(name: str, value: object, rule: str) -> InvalidRequest:
    return InvalidRequest(f"`{name}` is `{value!r}` but must be {rule}", param=name)


class RequestKind(Enum):
    SCORE = "score"  # prefill only: label logits at the end of every segment with `scored`
    GENERATE = "generate"  # a path of segments, of which the last grows by one sampled token a step


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    SCORED = "scored"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A loaded adapter as the lower layers see it: its content and its place, never its name."""

    digest: bytes  # of the adapter's weights and configuration
    slot: int  # resident position, the value in `token_lora_mapping`


class Grammar(Protocol):
    """What tokens may follow in one request's output: below the tasks, only this much is known of it.

    Used by one thread, in the order of the output's tokens: `mask`, `accept` with the token that was drawn, `forced`. An error it
    raises (UmaError) ends its request alone.
    """

    def mask(self) -> bytes:
        """One bit for each token id, lowest bit of the first byte first: 1 where the token may come next. Never empty."""
        ...

    def accept(self, token_id: int) -> int:
        """Take the token that was drawn; the token that stands: another one where the output would not end in time."""
        ...

    def forced(self) -> list[int]:
        """Take, and return, the tokens that must come next whatever the model says; none where it has a choice. Raises nothing."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the output is whole: nothing may follow."""
        ...


class Segment:
    """A run of token ids in a request tree. A token sees its ancestors' tokens and, causally, its own segment.

    `parent` is the index of another segment of the same request, smaller than its own, or -1. A `scored` segment ends
    in label logits. `children_left` counts the direct children that are not finished: at 0 nobody will read the
    segment's KV again. `block_ids` is filled by the scheduler and stays empty while the segment is `transient`: then
    its keys and values live for one layer of one step only.
    """

    __slots__ = (
        "block_ids",
        "cached_keys",
        "children_left",
        "num_cached_tokens",
        "num_computed_tokens",
        "parent",
        "path_offset",
        "scored",
        "token_ids",
        "transient",
    )

    def __init__(self, token_ids: list[int], parent: int = NO_PARENT, scored: bool = False) -> None:
        self.token_ids = token_ids
        self.parent = parent
        self.scored = scored
        self.path_offset = 0  # position of the first token; set by Request
        self.children_left = 0  # set by Request, lowered by the scheduler
        self.num_computed_tokens = 0  # set by the scheduler
        self.num_cached_tokens = 0  # of these, how many came from the prefix cache
        self.block_ids: list[int] = []
        self.cached_keys: list[bytes] = []  # chain keys of the blocks, in order; set by the scheduler
        self.transient = False

    @property
    def done(self) -> bool:
        return self.num_computed_tokens >= len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)


class Request:
    """One unit of work in the engine: a tree of segments, scored or grown.

    A SCORE request finishes when every scored segment has its logits, a GENERATE request (a single path of segments, of
    which the last one grows, as its `grammar` allows) when its output ends. `cache_root` starts the hash
    chain of the prefix cache: a digest over base, adapter content and tenant. `deadline` is in the scheduler's clock, seconds.
    `background`: others go first; see `background`.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "attention_flops",
        "background",
        "cache_root",
        "core_seconds",
        "deadline",
        "gpu_seconds",
        "grammar",
        "kind",
        "label_token_ids",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "output_token_ids",
        "request_id",
        "sampling",
        "scheduler_state",
        "scores_left",
        "segments",
        "stop_token_ids",
        "user_data",
    )

    def __init__(
        self,
        request_id: str,
        kind: RequestKind,
        segments: list[Segment],
        *,
        cache_root: bytes = b"",
        adapter: AdapterRef | None = None,
        label_token_ids: tuple[int, ...] = (),
        sampling: SamplingParams | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        deadline: float | None = None,
        grammar: Grammar | None = None,
        user_data: Any = None,
    ) -> None:
        if not segments:
            raise InvalidRequest("a request has no segments")
        for index, segment in enumerate(segments):
            segment.children_left = 0  # children come later, so nothing is lost
            if not segment.token_ids:
                raise InvalidRequest(f"segment {index} has no tokens")
            if not NO_PARENT <= segment.parent < index:
                raise InvalidRequest(f"segment {index} names parent {segment.parent}, which does not come before it")
            if segment.parent != NO_PARENT:
                parent = segments[segment.parent]
                parent.children_left += 1
                segment.path_offset = parent.path_offset + len(parent.token_ids)
        if kind is RequestKind.GENERATE:
            is_path = all(segment.parent == index - 1 for index, segment in enumerate(segments))
            if not is_path or sampling is None or any(segment.scored for segment in segments):
                raise InvalidRequest(
                    "a generate request has a single path of segments, none scored, and sampling parameters"
                )
        if kind is RequestKind.SCORE and (not label_token_ids or not any(s.scored for s in segments)):
            raise InvalidRequest("a score request has labels and at least one scored segment")
        self.request_id = request_id
        self.kind = kind
        self.segments = segments
        self.cache_root = cache_root
        self.adapter = adapter
        self.label_token_ids = label_token_ids
        self.sampling = sampling
        self.stop_token_ids = stop_token_ids  # end-of-sequence ids included, unless ignored
        self.deadline = deadline
        self.grammar = grammar
        self.user_data = user_data
        self.background = in_background()
        self.arrival = 0.0  # set by the scheduler
        self.num_prompt_tokens = sum(len(s.token_ids) for s in segments)
        self.num_computed_tokens = 0  # tokens run for it, again after a preemption included; set by the scheduler
        self.num_cached_tokens = 0  # tokens taken from the prefix cache instead; set by the scheduler
        self.num_preemptions = 0
        self.attention_flops = 0  # what it cost so far; these three are set by the engine's meter
        self.core_seconds = 0.0
        self.gpu_seconds = 0.0
        self.output_token_ids: list[int] = []  # also appended to the growing segment, which the KV cache follows
        self.scores_left = sum(s.scored for s in segments)
        self.scheduler_state: Any = None  # the scheduler's own

    @property
    def growing(self) -> int:
        """The index of the segment that grows, NO_PARENT (which is none) in a SCORE request."""
        return len(self.segments) - 1 if self.kind is RequestKind.GENERATE else NO_PARENT

    @property
    def reads_tokens(self) -> bool:
        """Whether the host must know each of its tokens to draw the next: a grammar or a penalty looks at them."""
        return self.grammar is not None or (self.sampling is not None and self.sampling.penalises)


@dataclass(slots=True)
class ScheduledChunk:
    """Tokens [start, start + num_tokens) of one segment, computed in this step.

    `wants_output`: the chunk ends the segment and its last row is needed: label logits (scored) or a sampled token. `decodes`: it is the
    one token that was drawn last. Which kernel computes a row follows from that, never from the number of tokens beside it.
    """

    request: Request
    segment_index: int
    start: int
    num_tokens: int
    wants_output: bool
    decodes: bool = False

    @property
    def segment(self) -> Segment:
        return self.request.segments[self.segment_index]


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work. A chunk comes after the chunks of its ancestors that share the step; a segment has one at most.

    A `transient` segment is always scheduled whole in a single chunk; its ancestors are computed, or in this step.
    `num_tokens` stays within `max_num_batched_tokens`, unless a single transient segment and the step's decode tokens
    exceed it together: the excess is then at most the number of those decode tokens, so below `max_num_seqs`.
    """

    chunks: list[ScheduledChunk]
    num_tokens: int
    # ended since the last report, outside of a step: cancelled, stopped by the engine, past its deadline
    finished: list[tuple[Request, FinishReason]] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What the runner computed, one entry per chunk with `wants_output`, in chunk order: label logits, a token id, or
    the error that ends this request alone. Of a step that a device still computes, a token is `unknown_token`.
    """

    outputs: list[list[float] | int | UmaError]


def unknown_token(output: int) -> int:
    """What stands for the token that is output number `output` of the step under way: below 0, as no token id is. The next step may
    begin with it, since the device knows it by then.
    """
    return -1 - output
