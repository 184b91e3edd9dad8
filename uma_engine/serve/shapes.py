"""Requests as JSON, decoded and checked: our own, and those of services that people already have clients for.

Knows field names and types; does not know the engine. A number is a number: neither NaN nor `true` passes for one.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from uma_engine.errors import InvalidRequest

__all__ = [
    "AdapterRequest",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "NamedRequest",
    "RankRequest",
    "RerankRequest",
    "ScoreRequest",
    "SwapRequest",
    "decode",
]

T = TypeVar("T")


class RankCandidate(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    id: str | None = None
    facts: dict[str, Any] = {}
    prior: float = 0.0


class RankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`/v1/rank`: the arguments of `Engine.rank`."""

    query: str
    candidates: list[str | RankCandidate]
    model: str | None = None
    adapter: str | None = None
    top_n: int | None = None
    instruction: str | None = None
    labels: list[str] | None = None
    max_tokens_per_candidate: int | None = None
    deadline: float | None = None
    surface: dict[str, Any] | None = None
    job_facts: dict[str, float] | None = None
    explain: str = "ledger"
    explain_top: int | None = None
    deliberate: int | None = None
    cascade: dict[str, Any] | None = None
    budget: int | None = None
    stream: bool = False


class RerankRequest(msgspec.Struct):
    """Cohere (v1, v2), Jina, Voyage, TEI and Infinity; what is not known is passed over, as they do."""

    query: str
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None  # TEI
    model: str | None = None
    top_n: int | None = None
    top_k: int | None = None  # Voyage
    return_documents: bool | None = None
    return_text: bool | None = None  # TEI
    raw_scores: bool = False  # TEI, Infinity
    truncate: bool = True  # TEI
    truncation: bool = True  # Voyage
    max_tokens_per_doc: int | None = None
    max_chunks_per_doc: int | None = None  # Cohere v1: what is longer is cut here
    rank_fields: list[str] | None = None


class ScoreRequest(msgspec.Struct):
    """vLLM (`text_1`, `text_2`, or `queries`, `documents`) and SGLang (`query`, `items`, `label_token_ids`)."""

    model: str | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    query: str | list[int] | None = None
    items: str | list[str | list[int]] | None = None
    label_token_ids: list[int] | None = None
    apply_softmax: bool = False
    item_first: bool = False
    truncate_prompt_tokens: int | None = None


class CompletionRequest(msgspec.Struct):
    """OpenAI's `/v1/completions`."""

    model: str
    prompt: str | list[str | int | list[int]]  # one text, several, token ids, or several of these
    max_tokens: int | None = 16
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = 1
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    echo: bool = False


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(msgspec.Struct):
    """OpenAI's `/v1/chat/completions`."""

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int | None = 1
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    response_format: dict[str, Any] | None = None


class EmbeddingRequest(msgspec.Struct):
    """OpenAI's `/v1/embeddings`. Texts only: token ids would be another tokenizer's."""

    input: str | list[str]
    model: str = "minilm-l6"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class AdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`/admin/adapters`: `path` below the server's adapter root, or `alias_of` for another name of a known adapter. `load` false: the first
    request that asks for it loads it. `pinned`: it stays in its slot."""

    name: str
    path: str | None = None
    alias_of: str | None = None
    load: bool = True
    pinned: bool = False


class NamedRequest(msgspec.Struct):
    """What a request is asked of, whatever else is in it."""

    model: str | None = None
    adapter: str | None = None


class SwapRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`/admin/swap`: the base to swap to, its adapters by name (paths below the adapter root), other names for them, and which stay."""

    model: str
    adapters: dict[str, str] = {}
    aliases: dict[str, str] = {}
    pinned: list[str] = []
    exclusive: bool = False
    canary: float | None = None  # share of the keys that it answers at first
    wait: bool = False  # answer when the swap has ended


def decode(body: bytes, shape: type[T]) -> T:
    """The request. Errors: InvalidRequest, saying where it is wrong"""
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request is not what this path takes: {error}", param=_place(str(error))) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _place(message: str) -> str | None:
    """The field that a message names, as in "... - at `$.query`"."""
    _, found, rest = message.rpartition("at `$.")
    return rest.rstrip("`") if found else None
