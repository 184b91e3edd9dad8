"""Ranking and scoring paths: ours with everything, and the shapes of services that rerank.

Knows fields of requests and answers; does not know keys or connections. Which service's answer is meant is told by the path and by what a
request has: `texts` is TEI's, `top_k` is Voyage's, the second version of the path is Cohere's, the rest takes Jina's, which holds what
Infinity's clients read too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest
from uma_engine.ranking.assessment import sentence_dict
from uma_engine.serve.app import Context, answer_json, events
from uma_engine.serve.shapes import RankCandidate, RankRequest, RerankRequest, ScoreRequest, decode
from uma_engine.tasks.results import RankAnswer, RankResult

__all__ = ["ROUTES"]

DEFAULT_CUT = 4096  # tokens of a document that Cohere's first version keeps


async def rank(context: Context, body: bytes) -> Response:
    asked = decode(body, RankRequest)
    _, adapter = context.model(asked.model)
    context.documents(len(asked.candidates), "candidates")
    people = [
        Candidate(str(i), c) if isinstance(c, str) else Candidate(c.id or str(i), c.text, c.facts, c.prior)
        for i, c in enumerate(asked.candidates)
    ]
    named = ("top_n", "instruction", "max_tokens_per_candidate", "surface", "job_facts", "explain_top", "deliberate")
    options: dict[str, Any] = {name: getattr(asked, name) for name in named}
    options |= {"adapter": asked.adapter or adapter, "explain": asked.explain, "tenant": context.tenant}
    options["deadline"] = context.deadline(asked.deadline)
    if asked.labels is not None:
        options["labels"] = asked.labels
    texts = [p.text for p in people]
    if not asked.stream:
        options |= {"cascade": asked.cascade, "budget": asked.budget}
        answer = await context.engine.rank(asked.query, people, **options)
        context.used(answer.usage)
        context.remember(asked.query, texts, answer, _is_plain(asked) and adapter is None)
        return answer_json({"id": context.id, **answer.to_dict()})
    context.remember(asked.query, texts)
    if asked.cascade is not None:
        raise InvalidRequest("`stream` and `cascade` are given", hint="ask for one of them", param="stream")
    return events(_rank_events(context, asked.query, people, options))


def _is_plain(asked: RankRequest) -> bool:
    """Whether a ranking is what job and candidates alone make it."""
    told = (
        asked.adapter,
        asked.instruction,
        asked.labels,
        asked.max_tokens_per_candidate,
        asked.surface,
        asked.cascade,
    )
    return (
        all(value is None for value in told)
        and not asked.deliberate
        and not any(isinstance(c, RankCandidate) and c.prior for c in asked.candidates)
    )


async def _rank_events(
    context: Context, query: str, people: Sequence[Candidate], options: dict[str, Any]
) -> AsyncIterator[bytes]:
    async for event in context.engine.rank_stream(query, people, **options):
        data: dict[str, Any] = {"event": event.kind}
        if event.kind == "sentence":
            assert event.sentence is not None
            data |= {
                "index": event.index,
                "id": event.id,
                "section": event.section,
                "sentence": sentence_dict(event.sentence),
            }
        elif event.answer is not None:
            if event.kind == "answer":
                context.used(event.answer.usage)
            data["answer"] = event.answer.to_dict()
        yield msgspec.json.encode(data)


async def rerank(context: Context, body: bytes) -> Response:
    """Jina, Voyage, TEI, Infinity and Cohere's first version."""
    return await _rerank(context, decode(body, RerankRequest), version=1)


async def rerank_v2(context: Context, body: bytes) -> Response:
    """Cohere's second version."""
    return await _rerank(context, decode(body, RerankRequest), version=2)


async def _rerank(context: Context, asked: RerankRequest, version: int) -> Response:
    model, adapter = context.model(asked.model)
    texts = _documents(asked)
    context.documents(len(texts), "documents" if asked.texts is None else "texts")
    top_n = asked.top_n if asked.top_n is not None else asked.top_k
    limit = asked.max_tokens_per_doc
    if version == 2 and limit is None:
        limit = DEFAULT_CUT
    answer = await context.engine.rank(
        asked.query,
        [Candidate(str(i), text) for i, text in enumerate(texts)],
        adapter=adapter,
        top_n=top_n,
        max_tokens_per_candidate=limit,
        deadline=context.deadline(),
        tenant=context.tenant,
    )
    context.used(answer.usage)
    context.remember(asked.query, texts, answer, adapter is None and limit is None)
    if not (asked.truncate and asked.truncation) and any(r.truncated_tokens for r in answer.all_results):
        raise InvalidRequest("a document is longer than the model's context and may not be cut", param="documents")
    return answer_json(_reranked(context, asked, answer, texts, model, version))


def _reranked(
    context: Context, asked: RerankRequest, answer: RankAnswer, texts: Sequence[str], model: str, version: int
) -> Any:
    def value(result: RankResult) -> float:
        return result.logits[0] - result.logits[1] if asked.raw_scores else result.score

    tokens = answer.usage.prompt_tokens
    if asked.texts is not None:
        shown: list[dict[str, Any]] = [{"index": r.index, "score": value(r)} for r in answer.results]
        return [s | {"text": texts[s["index"]]} for s in shown] if asked.return_text else shown
    results: list[dict[str, Any]] = [{"index": r.index, "relevance_score": value(r)} for r in answer.results]
    if asked.top_k is not None and asked.top_n is None:
        data = [r | {"document": texts[r["index"]]} if asked.return_documents else r for r in results]
        return {"object": "list", "data": data, "model": model, "usage": {"total_tokens": tokens}}
    if asked.return_documents:
        results = [r | {"document": {"text": texts[r["index"]]}} for r in results]
    meta = {"api_version": {"version": str(version)}, "billed_units": {"search_units": 1}}
    if version == 2:
        return {"id": context.id, "results": results, "meta": meta}
    return {
        "id": context.id,
        "object": "rerank",
        "created": context.created,
        "model": model,
        "results": results,
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
        "meta": meta,
    }


def _documents(asked: RerankRequest) -> list[str]:
    if (asked.documents is None) == (asked.texts is None):
        raise InvalidRequest("`documents` (TEI: `texts`) is missing, or both are given", param="documents")
    if asked.texts is not None:
        return asked.texts
    found = []
    for index, document in enumerate(asked.documents or ()):
        if isinstance(document, str):
            found.append(document)
        elif asked.rank_fields:
            found.append("\n".join(f"{field}: {document[field]}" for field in asked.rank_fields if field in document))
        elif isinstance(document.get("text"), str):
            found.append(document["text"])
        else:
            raise InvalidRequest(f"document {index} has no `text`", hint="or name `rank_fields`", param="documents")
    return found


async def score(context: Context, body: bytes) -> Response:
    """vLLM's and SGLang's `/v1/score`, told apart by their keys."""
    asked = decode(body, ScoreRequest)
    if asked.items is not None or asked.label_token_ids is not None:
        return await _score_labels(context, asked)
    left = asked.text_1 if asked.text_1 is not None else asked.queries
    right = asked.text_2 if asked.text_2 is not None else asked.documents
    if left is None or right is None:
        raise InvalidRequest(
            "neither `text_1` and `text_2`, nor `queries` and `documents`, nor `query`, `items` and `label_token_ids`",
            hint="send one of the three",
        )
    model, adapter = context.model(asked.model)
    queries, documents = ([x] if isinstance(x, str) else x for x in (left, right))
    if len(queries) not in (1, len(documents)):
        raise InvalidRequest(f"{len(queries)} queries but {len(documents)} documents", hint="one, or one for each")
    context.documents(len(documents), "documents")
    scores: list[float] = [0.0] * len(documents)
    tokens = 0
    for query in dict.fromkeys(queries):
        places = [i for i in range(len(documents)) if queries[i if len(queries) > 1 else 0] == query]
        people = [Candidate(str(i), documents[i]) for i in places]
        answer = await context.engine.rank(
            query, people, adapter=adapter, deadline=context.deadline(), tenant=context.tenant
        )
        context.used(answer.usage)
        tokens += answer.usage.prompt_tokens
        for place, result in zip(places, answer.all_results, strict=True):
            scores[place] = result.score
    return answer_json(
        {
            "id": f"score-{context.id}",
            "object": "list",
            "created": context.created,
            "model": model,
            "data": [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _score_labels(context: Context, asked: ScoreRequest) -> Response:
    if asked.query is None or asked.items is None or not asked.label_token_ids:
        raise InvalidRequest("`query`, `items` and `label_token_ids` belong together", param="label_token_ids")
    if asked.item_first:
        raise InvalidRequest("`item_first` would compute the query anew for each item", hint="put the query first")
    _, adapter = context.model(asked.model)
    items: Any = [asked.items] if isinstance(asked.items, str) else asked.items
    context.documents(len(items), "items")
    tokenizer = context.engine.tokenizer
    words = [tokenizer.decode([token]) for token in asked.label_token_ids]
    found = await context.engine.score(
        asked.query, items, labels=words, adapter=adapter, deadline=context.deadline(), tenant=context.tenant
    )
    values = [list(s.probabilities if asked.apply_softmax else s.logits) for s in found]
    return answer_json({"scores": values, "model": asked.model or context.engine.model, "object": "scoring"})


ROUTES = (
    ("/v1/rank", rank),
    ("/v1/rerank", rerank),
    ("/rerank", rerank),
    ("/v2/rerank", rerank_v2),
    ("/v1/score", score),
    ("/score", score),
)
