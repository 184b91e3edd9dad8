"""OpenAI's paths: completions, chat, embeddings, models.

Knows their fields; does not know keys or connections. What they have and this engine has not is refused, never passed over.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response

from uma_engine.core import FinishReason, SamplingParams
from uma_engine.errors import InvalidRequest, TooLarge, UnknownModel
from uma_engine.serve.app import Context, answer_json, events
from uma_engine.serve.shapes import ChatRequest, CompletionRequest, EmbeddingRequest, decode

__all__ = ["ROUTES"]

EMBEDDER = "minilm-l6"
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


async def models(context: Context, body: bytes) -> Response:
    engine = context.engine
    base = {"object": "model", "created": 0, "owned_by": "uma-engine"}
    names = [engine.model, *context.settings.model_aliases]
    data: list[dict[str, Any]] = [
        {"id": name, **base, "root": engine.model, "parent": None, "max_model_len": engine.max_model_len}
        for name in names
    ]
    data += [{"id": name, **base, "root": engine.model, "parent": engine.model} for name in engine.adapters()]
    return answer_json({"object": "list", "data": data})


async def completions(context: Context, body: bytes) -> Response:
    asked = decode(body, CompletionRequest)
    if asked.echo:
        raise InvalidRequest("`echo` is not supported", param="echo")
    prompts: list[Any] = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
    if any(isinstance(part, int) for part in prompts):
        if not all(isinstance(part, int) for part in prompts):
            raise InvalidRequest("`prompt` mixes token ids with other things", param="prompt")
        prompts = [prompts]
    context.documents(len(prompts), "prompt")
    params = _params(context, asked, 16 if asked.max_tokens is None else asked.max_tokens)
    return await _complete(context, asked.model, prompts, params, asked.stream, asked.stream_options, chat=False)


async def chat(context: Context, body: bytes) -> Response:
    asked = decode(body, ChatRequest)
    messages = [{"role": m.role, "content": _content(m.content)} for m in asked.messages]
    if not messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    prompt = context.engine.chat_tokens(messages)
    limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    room = context.engine.max_model_len - len(prompt)
    params = _params(context, asked, min(room, context.settings.max_tokens) if limit is None else limit)
    if asked.response_format is not None:
        params = replace(params, json_schema=_schema(asked.response_format))
    return await _complete(context, asked.model, [prompt], params, asked.stream, asked.stream_options, chat=True)


async def embeddings(context: Context, body: bytes) -> Response:
    asked = decode(body, EmbeddingRequest)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    context.documents(len(texts), "input")
    if not texts or not all(text.strip() for text in texts):
        raise InvalidRequest("`input` is empty, or a text in it is blank", param="input")
    if asked.model != EMBEDDER:
        raise UnknownModel(f"`{asked.model}` embeds nothing here", hint=f"`model` is `{EMBEDDER}`", param="model")
    embedder = await context.generations.embedder()
    if asked.dimensions not in (None, embedder.dim):
        raise InvalidRequest(f"`dimensions` is {asked.dimensions} but must be {embedder.dim}", param="dimensions")
    found = await asyncio.to_thread(embedder.embed, texts)
    data = []
    for index, vector in enumerate(found.vectors):
        value = base64.b64encode(vector.tobytes()).decode() if asked.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = await asyncio.to_thread(embedder.count_tokens, texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return answer_json({"object": "list", "model": asked.model, "data": data, "usage": usage})


def _content(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest("a message has content that is not text", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def _schema(wanted: dict[str, Any]) -> dict[str, Any] | None:
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = wanted.get("json_schema")
    if kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return schema["schema"]
    raise InvalidRequest(
        f"`response_format` has the type `{kind}`", hint="use text or json_schema", param="response_format"
    )


def _params(context: Context, asked: CompletionRequest | ChatRequest, max_tokens: int) -> SamplingParams:
    if asked.n not in (None, 1):
        raise InvalidRequest(f"`n` is {asked.n} but must be 1", hint="ask several times, with seeds", param="n")
    if max_tokens > context.settings.max_tokens:
        raise TooLarge(
            f"`max_tokens` is {max_tokens} but {context.settings.max_tokens} are the most", param="max_tokens"
        )
    given: dict[str, Any] = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "repetition_penalty": asked.repetition_penalty,
        "seed": asked.seed,
    }
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return SamplingParams(max_tokens=max_tokens, stop=stop, **{k: v for k, v in given.items() if v is not None})


async def _complete(
    context: Context,
    name: str,
    prompts: Sequence[Any],
    params: SamplingParams,
    stream: bool,
    stream_options: dict[str, Any] | None,
    *,
    chat: bool,
) -> Response:
    model, adapter = context.model(name)
    kind = "chat.completion" if chat else "text_completion"
    head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{context.id}", "created": context.created, "model": model}
    asked: dict[str, Any] = {"adapter": adapter, "deadline": context.deadline(), "tenant": context.tenant}
    if stream:
        with_usage = bool((stream_options or {}).get("include_usage"))
        kind = "chat.completion.chunk" if chat else kind
        return events(_chunks(context, {**head, "object": kind}, prompts, params, asked, with_usage, chat))
    done = await context.engine.generate(prompts, params, **asked)
    choices = []
    for index, completion in enumerate(done):
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
        )
        choices.append(
            {"index": index, **said, "finish_reason": REASONS.get(completion.finish_reason, "stop"), "logprobs": None}
        )
        context.used(completion.usage)
    prompt, output = (sum(getattr(c.usage, f) for c in done) for f in ("prompt_tokens", "output_tokens"))
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return answer_json({**head, "object": kind, "choices": choices, "usage": usage})


async def _chunks(
    context: Context,
    head: dict[str, Any],
    prompts: Sequence[Any],
    params: SamplingParams,
    asked: dict[str, Any],
    with_usage: bool,
    chat: bool,
) -> AsyncIterator[bytes]:
    def choice(index: int, text: str, reason: str | None, first: bool) -> bytes:
        delta: dict[str, Any] = {"content": text}
        if first:
            delta = {"role": "assistant", **delta}
        said: dict[str, Any] = {"delta": delta} if chat else {"text": text}
        return msgspec.json.encode(
            {**head, "choices": [{"index": index, **said, "finish_reason": reason, "logprobs": None}]}
        )

    seen: set[int] = set()
    tokens = 0
    async for piece in context.engine.stream(prompts, params, **asked):
        reason = None if piece.finish_reason is None else REASONS.get(piece.finish_reason, "stop")
        tokens += len(piece.token_ids)
        yield choice(piece.index, piece.text, reason, piece.index not in seen)
        seen.add(piece.index)
    if with_usage:
        prompt = sum(len(p) if not isinstance(p, str) else len(context.engine.tokenize(p)) for p in prompts)
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        yield msgspec.json.encode({**head, "choices": [], "usage": usage})
    yield b"[DONE]"


ROUTES = (
    ("/v1/models", models, "rank", ("GET",)),
    ("/v1/completions", completions),
    ("/v1/chat/completions", chat),
    ("/v1/embeddings", embeddings),
)
