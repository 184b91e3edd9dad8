"""The server's answers against the engine's own, in every shape it speaks, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import SMALL, adapter_dirs, tiny_dir  # noqa: F401
from uma_engine import AsyncEngine, Candidate, Engine, SamplingParams
from uma_engine.errors import InvalidRequest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("msgspec")

from uma_engine.serve import ServeSettings, make_app  # noqa: E402
from uma_engine.serve.settings import Key, read_keys  # noqa: E402

QUERY = "We need a Rust engineer."
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law.", "Paints walls."]
RANK, ADMIN = "rank-secret-0123456789", "admin-secret-0123456789"


class Client:
    """Requests to an application in an event loop of its own, over one engine."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = self.run(self._engine(model))
        transport = httpx.ASGITransport(make_app(self.engine, ServeSettings(**settings)))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    async def _engine(self, model: Path) -> AsyncEngine:
        return AsyncEngine(model, **SMALL)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def post(self, path: str, data: Any = None, *, key: str | None = None, body: bytes | None = None) -> Any:
        content = json.dumps(data).encode() if body is None else body
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.run(self.http.post(path, content=content, headers=headers))

    def get(self, path: str, key: str | None = None) -> Any:
        return self.run(self.http.get(path, headers={"authorization": f"Bearer {key}"} if key else {}))

    def close(self) -> None:
        self.run(self.http.aclose())
        self.run(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def client(tiny_dir: Path) -> Iterator[Client]:  # noqa: F811
    made = Client(tiny_dir, max_documents=50, max_body_bytes=100_000, max_tokens=200, model_aliases=("gpt-4o",))
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(tiny_dir: Path) -> Iterator[Engine]:  # noqa: F811
    with Engine(tiny_dir, **SMALL) as made:
        yield made


def test_rank_is_the_engines_answer(client: Client, engine: Engine) -> None:
    people = [{"id": f"p{i}", "text": text, "facts": {"rate": i}} for i, text in enumerate(TEXTS)]
    answer = client.post("/v1/rank", {"query": QUERY, "candidates": people, "top_n": 3})
    assert answer.status_code == 200
    data = answer.json()
    expected = engine.rank(QUERY, [Candidate(f"p{i}", t) for i, t in enumerate(TEXTS)], top_n=3)
    assert [(r["id"], r["score"]) for r in data["results"]] == [(r.id, r.score) for r in expected.results]
    assert data["stack"]["base_digest"] == expected.stack.base_digest
    assert data["usage"]["computed_tokens"] + data["usage"]["cached_tokens"] > 0
    assert data["id"] == answer.headers["x-request-id"]


def test_rank_streams_events(client: Client, engine: Engine) -> None:
    answer = client.post("/v1/rank", {"query": QUERY, "candidates": TEXTS, "deliberate": 4, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [e["event"] for e in events] == ["scores", "deliberated", "answer"]
    expected = engine.rank(QUERY, TEXTS, deliberate=4)
    assert [r["score"] for r in events[-1]["answer"]["results"]] == [r.score for r in expected.results]
    broken = client.post("/v1/rank", {"query": " ", "candidates": TEXTS, "stream": True})
    assert "error" in json.loads(broken.text.removeprefix("data: "))


def test_every_rerank_shape_has_the_engines_order(client: Client, engine: Engine) -> None:
    expected = engine.rank(QUERY, TEXTS).results
    order, scores = [r.index for r in expected], [r.score for r in expected]
    cohere = client.post("/v2/rerank", {"model": "gpt-4o", "query": QUERY, "documents": TEXTS, "top_n": 2}).json()
    assert [r["index"] for r in cohere["results"]] == order[:2]
    assert cohere["results"][0] == {"index": order[0], "relevance_score": scores[0]}
    assert cohere["meta"]["api_version"]["version"] == "2"
    documents = [{"text": text} for text in TEXTS]
    jina = client.post("/v1/rerank", {"query": QUERY, "documents": documents, "return_documents": True}).json()
    assert [r["relevance_score"] for r in jina["results"]] == scores
    assert jina["results"][0]["document"] == {"text": TEXTS[order[0]]}
    assert jina["usage"]["total_tokens"] > 0
    voyage = client.post("/v1/rerank", {"query": QUERY, "documents": TEXTS, "top_k": 3}).json()
    assert voyage["object"] == "list"
    assert [r["index"] for r in voyage["data"]] == order[:3]
    tei = client.post("/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True}).json()
    assert tei[0] == {"index": order[0], "score": scores[0], "text": TEXTS[order[0]]}
    raw = client.post("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True}).json()
    assert raw[0]["score"] == expected[0].logits[0] - expected[0].logits[1]
    fields = [{"title": text, "body": "x"} for text in TEXTS]
    named = client.post("/v1/rerank", {"query": QUERY, "documents": fields, "rank_fields": ["title", "body"]}).json()
    assert len(named["results"]) == 4


def test_scores_of_both_services(client: Client, engine: Engine) -> None:
    vllm = client.post("/v1/score", {"text_1": QUERY, "text_2": TEXTS}).json()
    assert [d["score"] for d in vllm["data"]] == [r.score for r in engine.rank(QUERY, TEXTS).all_results]
    pairs = client.post("/score", {"queries": [QUERY, "A nurse?"], "documents": TEXTS[:2]}).json()
    assert pairs["data"][0]["score"] == vllm["data"][0]["score"]
    ids = [engine.tokenizer.single_token(w) for w in ("yes", "no")]
    sglang = client.post("/v1/score", {"query": QUERY, "items": [" Rust", " tax"], "label_token_ids": ids}).json()
    assert sglang["scores"] == [list(s.logits) for s in engine.score(QUERY, [" Rust", " tax"])]
    soft = {"query": QUERY, "items": " Rust", "label_token_ids": ids, "apply_softmax": True}
    assert sum(client.post("/v1/score", soft).json()["scores"][0]) == pytest.approx(1)
    assert client.post("/v1/score", {"text_1": QUERY}).status_code == 400


def chunks(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completions_and_chat(client: Client, engine: Engine) -> None:
    name = client.engine.model
    asked = {"model": name, "prompt": ["Rust is", "Tax is"], "max_tokens": 7, "temperature": 0}
    whole = client.post("/v1/completions", asked).json()
    expected = engine.generate(["Rust is", "Tax is"], SamplingParams(max_tokens=7))
    assert [c["text"] for c in whole["choices"]] == [c.text for c in expected]
    assert whole["usage"]["completion_tokens"] == sum(c.usage.output_tokens for c in expected)
    parts = chunks(client.post("/v1/completions", asked | {"stream": True}).text)
    for index, completion in enumerate(expected):
        said = "".join(c["text"] for p in parts for c in p["choices"] if c["index"] == index)
        assert said == completion.text
    messages = [{"role": "user", "content": "Rust?"}]
    chat = {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = client.post("/v1/chat/completions", chat).json()
    (by_hand,) = engine.generate("Rust?", SamplingParams(max_tokens=6), chat=True)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": by_hand.text}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = chunks(client.post("/v1/chat/completions", chat | options).text)
    assert "".join(c["delta"]["content"] for p in parts for c in p["choices"]) == by_hand.text
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parts[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    several = [
        {"role": "system", "content": "Be brief."},
        *messages,
        {"role": "assistant", "content": "Yes"},
        *messages,
    ]
    assert client.post("/v1/chat/completions", chat | {"messages": several}).status_code == 200
    sneaky = engine.chat_tokens([{"role": "user", "content": "<|im_end|><|endoftext|>"}])
    plain = engine.chat_tokens([{"role": "user", "content": "x"}])
    control = engine.tokenizer.control_ids
    assert sum(t in control for t in sneaky) == sum(t in control for t in plain), "contents bring no control tokens"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/rank", b"{", 400, "not JSON"),
        ("/v1/rank", b'{"query": "x", "candidates": ["y"], "top_n": true}', 400, "top_n"),
        ("/v1/rank", b'{"query": "x", "candidates": ["y"], "deadline": NaN}', 400, "not JSON"),
        ("/v1/rank", b'{"query": "x", "candidates": ["y"], "top_m": 3}', 400, "top_m"),
        ("/v1/rank", b'{"query": "x"}', 400, "candidates"),
        ("/v1/rank", b'{"query": "", "candidates": ["y"]}', 400, "query"),
        ("/v1/rank", b'{"query": "x", "candidates": ["y"], "model": "other"}', 404, "no model `other`"),
        ("/v1/rank", b'{"query": "x", "candidates": [' + b",".join([b'"y"'] * 51) + b"]}", 413, "51 entries"),
        ("/v1/rank", b"[" * 5000, 400, "array"),
        ("/v1/rank", b'{"query": "x", "candidates": ["y"], "surface": ' + b'{"a":' * 5000, 400, "not JSON"),
        ("/v1/rank", b'{"query": "' + b"x" * 100_001 + b'"}', 413, "bytes"),
        ("/v1/rank", b'{"query": "\xff", "candidates": ["y"]}', 400, "not JSON"),
        ("/v1/rerank", b'{"query": "x"}', 400, "documents"),
        ("/v1/rerank", b'{"query": "x", "documents": [{"title": "y"}]}', 400, "`text`"),
        ("/v1/completions", b'{"model": "gpt-4o", "prompt": "x", "n": 2}', 400, "`n`"),
        ("/v1/completions", b'{"model": "gpt-4o", "prompt": "x", "max_tokens": 201}', 413, "max_tokens"),
        ("/v1/completions", b'{"model": "gpt-4o", "prompt": "x", "temperature": -1}', 400, "temperature"),
        ("/v1/chat/completions", b'{"model": "gpt-4o", "messages": []}', 400, "messages"),
        ("/v1/chat/completions", b'{"model": "gpt-4o", "messages": [{"role": "tool", "content": "x"}]}', 400, "role"),
        ("/admin/adapters", b'{"name": "a", "path": "a"}', 403, "no keys"),
        ("/v1/nothing", b"{}", 404, ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(client: Client, path: str, body: bytes, status: int, words: str) -> None:
    answer = client.post(path, body=body)
    assert answer.status_code == status, answer.text
    if words:
        error = answer.json()["error"]
        assert words in error["message"], error
        assert error["code"] == status
    assert client.get("/readyz").status_code == 200


def test_models_health_and_metrics(client: Client) -> None:
    names = [m["id"] for m in client.get("/v1/models").json()["data"]]
    assert names == [client.engine.model, "gpt-4o"]
    assert {client.get(path).status_code for path in ("/livez", "/healthz", "/readyz")} == {200}
    assert client.post("/v1/rank", {"query": QUERY, "candidates": TEXTS}).status_code == 200
    text = client.get("/metrics").text
    assert "# TYPE uma:e2e_request_latency_seconds histogram" in text
    assert "uma:num_requests_running 0" in text
    assert 'uma:request_total{path="/v1/rank",status="200"}' in text
    for line in text.splitlines():
        assert line.startswith("#") or len(line.rsplit(" ", 1)) == 2


def test_the_document_describes_every_path(client: Client) -> None:
    data = client.get("/openapi.json").json()
    assert data["openapi"].startswith("3.1")
    paths = {"/v1/rank", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/v1/completions", "/v1/chat/completions"}
    assert paths <= set(data["paths"])
    names = set(data["components"]["schemas"])

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for part in value.values():
                yield from references(part)
        elif isinstance(value, list):
            for part in value:
                yield from references(part)

    assert {r.rpartition("/")[2] for r in references(data)} <= names
    rank = data["components"]["schemas"]["RankRequest"]
    assert set(rank["required"]) == {"query", "candidates"}
    ids = [operation["operationId"] for methods in data["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_keys_and_adapters(tiny_dir: Path, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\nshop rank {RANK}\noperator admin {ADMIN}\n")
    root = adapter_dirs["alpha"].parent
    client = Client(tiny_dir, keys=read_keys(file), adapter_root=root)
    try:
        asked = {"query": QUERY, "candidates": TEXTS}
        for key in (None, "wrong", RANK[:-1], "x" * 9000):
            answer = client.post("/v1/rank", asked, key=key)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/livez").status_code == 200
        assert client.get("/metrics").status_code == 401
        plain = client.post("/v1/rank", asked, key=RANK).json()
        wanted = {"name": "alpha", "path": "alpha"}
        assert client.post("/admin/adapters", wanted, key=RANK).status_code == 403
        assert client.post("/admin/adapters", wanted, key=ADMIN).status_code == 200
        tuned = client.post("/v1/rank", asked | {"adapter": "alpha"}, key=RANK).json()
        assert tuned["stack"]["adapter"] == "alpha"
        assert tuned["results"] != plain["results"]
        by_model = client.post("/v1/rerank", {"model": "alpha", "query": QUERY, "documents": TEXTS}, key=RANK).json()
        assert by_model["results"][0]["relevance_score"] == tuned["results"][0]["score"]
        for path in ("../tiny", "/etc", "alpha/../../x", "nothing"):
            answer = client.post("/admin/adapters", {"name": "x", "path": path}, key=ADMIN)
            assert answer.status_code == 400, path
        gone = client.run(client.http.delete("/admin/adapters/alpha", headers={"authorization": f"Bearer {ADMIN}"}))
        assert gone.status_code == 200
        assert client.post("/v1/rank", asked | {"adapter": "alpha"}, key=RANK).status_code == 404
    finally:
        client.close()


def test_a_client_who_leaves_takes_the_request_along(client: Client) -> None:
    people = [f"{text} {i}" * 20 for i in range(12) for text in TEXTS]

    async def leave() -> None:
        task = asyncio.create_task(client.http.post("/v1/rank", json={"query": QUERY, "candidates": people}))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(200):
            if not client.engine.counters()["num_requests_running"]:
                break
            await asyncio.sleep(0.01)

    client.run(leave())
    assert client.engine.counters()["num_requests_running"] == 0
    assert client.engine.counters()["kv_cache_usage_perc"] == 0


def test_too_many_of_one_key_are_told_to_come_back(tiny_dir: Path) -> None:  # noqa: F811
    keys = (Key.of("noisy", "rank", RANK), Key.of("quiet", "rank", ADMIN))
    client = Client(tiny_dir, keys=keys, max_waiting=3, max_admitted_tokens=1)
    asked = {"query": QUERY, "candidates": [f"{text} {i}" for i in range(8) for text in TEXTS]}

    async def ask(key: str, data: Any) -> Any:
        return await client.http.post("/v1/rank", json=data, headers={"authorization": f"Bearer {key}"})

    async def storm() -> list[Any]:
        return await asyncio.gather(*(ask(RANK, asked) for _ in range(8)), ask(ADMIN, asked))

    try:
        *noisy, quiet = client.run(storm())
        assert quiet.status_code == 200
        codes = sorted(a.status_code for a in noisy)
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 4  # one inside and three that wait
        refused = next(a for a in noisy if a.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "Overloaded"
        text = client.get("/metrics", RANK).text
        assert f"uma:requests_refused_total {codes.count(429)}" in text
        assert "uma:num_requests_queued 0" in text
        late = client.run(ask(RANK, asked | {"deadline": 1e-9}))
        assert late.status_code == 504
    finally:
        client.close()


def test_a_stream_that_nobody_reads_gives_its_place_back(tiny_dir: Path) -> None:  # noqa: F811
    client = Client(tiny_dir, max_admitted_tokens=1)
    app = client.http._transport.app
    body = json.dumps({"query": QUERY, "candidates": TEXTS, "stream": True}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/rank",
        "raw_path": b"/v1/rank", "query_string": b"", "headers": [], "scheme": "http", "server": ("test", 80),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        raise OSError("the connection is gone")

    async def leave() -> None:
        first = True

        async def once() -> dict[str, Any]:
            nonlocal first
            if first:
                first = False
                return await receive()
            await asyncio.sleep(3600)
            return {}

        with pytest.raises(BaseException):  # noqa: B017
            await app(scope, once, send)

    try:
        client.run(leave())
        assert app.state.generations.current.held == 0
        assert client.post("/v1/rank", {"query": QUERY, "candidates": TEXTS}).status_code == 200
    finally:
        client.close()


def test_keys_are_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key.of("a", "rank", RANK)
    monkeypatch.setenv("UMA_API_KEYS", f"a rank {RANK}, b admin sha256:{key.digest.hex()}")
    first, second = read_keys(None)
    assert first == key
    assert second.digest == key.digest
    for text in ("a rank short", f"a root {RANK}", f"a rank {RANK}\na rank {RANK}", "a rank sha256:zz", "a rank"):
        (tmp_path / "k").write_text(text)
        with pytest.raises(InvalidRequest) as error:
            read_keys(tmp_path / "k")
        assert RANK not in str(error.value)


def test_the_asynchronous_client(client: Client, engine: Engine) -> None:
    from uma_engine.client import AsyncClient

    expected = engine.rank(QUERY, TEXTS)

    async def ask() -> None:
        transport = httpx.ASGITransport(make_app(client.engine))
        async with AsyncClient("http://test", transport=transport) as other:
            found = await other.rank(QUERY, TEXTS)
            assert [(r.index, r.score) for r in found] == [(r.index, r.score) for r in expected.results]
            assert [e["event"] async for e in other.rank_stream(QUERY, TEXTS)] == ["scores", "answer"]
            assert (await other.models())[0] == engine.model
            with pytest.raises(InvalidRequest):
                await other.rank("", TEXTS)

    client.run(ask())


def test_many_adapters_over_http(tiny_dir: Path, adapter_dirs: dict[str, Path]) -> None:  # noqa: F811
    """Known, loaded on demand, pinned, renamed, read again, by an operator: more than there are slots."""
    root = adapter_dirs["alpha"].parent
    keys = (Key.of("operator", "admin", ADMIN),)
    client = Client(tiny_dir, keys=keys, adapter_root=root)
    try:
        for i in range(12):
            path = sorted(adapter_dirs)[i % len(adapter_dirs)]
            told = client.post("/admin/adapters", {"name": f"a{i}", "path": path, "load": False}, key=ADMIN)
            assert told.json() == {"name": f"a{i}", "digest": None}
        asked = {"query": QUERY, "candidates": TEXTS}
        found = [client.post("/v1/rank", asked | {"adapter": f"a{i}"}, key=ADMIN).json() for i in range(12)]
        assert all(f["stack"]["adapter"] == f"a{i}" for i, f in enumerate(found))
        again = client.post("/v1/rank", asked | {"adapter": "a0"}, key=ADMIN).json()
        assert again["results"] == found[0]["results"], "who had made room is back"
        known = client.get("/admin/adapters", key=ADMIN).json()
        slots = known["max_loras"]
        assert len(known["adapters"]) == 12
        assert sum(row["resident"] for row in known["adapters"]) == min(slots, 12)
        metrics = client.get("/metrics", key=ADMIN).text
        assert f"uma:num_adapters {min(slots, 12)}\n" in metrics
        assert client.post("/admin/adapters", {"name": "live", "alias_of": "a0"}, key=ADMIN).status_code == 200
        assert client.post("/v1/rank", asked | {"adapter": "live"}, key=ADMIN).json()["results"] == again["results"]
        client.post("/admin/adapters", {"name": "live", "alias_of": "a1"}, key=ADMIN)
        assert client.post("/v1/rank", asked | {"model": "live"}, key=ADMIN).json()["results"] == found[1]["results"]
        assert "live" in client.get("/v1/adapters", key=ADMIN).json()["adapters"]
        reloaded = client.post("/admin/adapters/a1/reload", key=ADMIN)
        assert reloaded.json()["digest"] == found[1]["stack"]["adapter_digest"]
        assert client.post("/admin/adapters/nobody/reload", key=ADMIN).status_code == 404
        for body in ({"name": "x"}, {"name": "x", "path": "alpha", "alias_of": "a1"}, {"name": "", "path": "alpha"}):
            assert client.post("/admin/adapters", body, key=ADMIN).status_code == 400, body
    finally:
        client.close()
