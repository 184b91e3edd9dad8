"""The services' own Python clients against the server: what they send is understood, what they read is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL, tiny_dir  # noqa: F401
from uma_engine import Engine

pytest.importorskip("uvicorn")
ROOT = Path(__file__).resolve().parents[2]
QUERY = "We need a Rust engineer."
TEXTS = ["Ten years of Rust and Linux.", "A nurse.", "Rust beginner, good at tax law."]
KEY = "sdk-secret-0123456789"


@pytest.fixture(scope="module")
def address(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"sdk rank {KEY}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--model", str(tiny_dir), "--port", "0"]
    command += ["--keys", str(keys), "--alias", "rerank-v3.5", "--alias", "rerank-2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
    assert found
    yield found.group()
    process.terminate()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def order(tiny_dir: Path) -> list[tuple[int, float]]:  # noqa: F811
    with Engine(tiny_dir, **SMALL) as engine:
        return [(r.index, r.score) for r in engine.rank(QUERY, TEXTS).results]


def test_openai(address: str, tiny_dir: Path) -> None:  # noqa: F811
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    (base, *_) = client.models.list().data
    asked = {"model": base.id, "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(prompt="Rust is", **asked)
    assert whole.usage.completion_tokens == 5
    parts = client.completions.create(prompt="Rust is", stream=True, **asked)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    messages = [{"role": "user", "content": "Rust?"}]
    chat = client.chat.completions.create(messages=messages, **asked)
    stream = client.chat.completions.create(messages=messages, stream=True, **asked)
    assert "".join(p.choices[0].delta.content or "" for p in stream) == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="no model `gpt-x`"):
        client.completions.create(prompt="x", model="gpt-x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(prompt="x", model=base.id, temperature=-1)


@pytest.mark.weights
def test_openai_embeddings(address: str) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("onnxruntime")
    from uma_engine.retrieval.embedder import Embedder

    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    answer = client.embeddings.create(model="minilm-l6", input=TEXTS)  # this client asks for base64
    plain = client.embeddings.create(model="minilm-l6", input=TEXTS[0], encoding_format="float")
    with Embedder(cache=False) as embedder:
        mine = embedder.embed(TEXTS).vectors
        assert answer.usage.prompt_tokens == embedder.count_tokens(TEXTS) > 0
    assert [d.embedding for d in answer.data] == [[float(x) for x in row] for row in mine]
    assert plain.data[0].embedding == answer.data[0].embedding
    for bad in ({"input": []}, {"input": " "}, {"input": "x", "dimensions": 5}):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="minilm-l6", **bad)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="x")


def test_litellm(address: str, order: list[tuple[int, float]], tiny_dir: Path) -> None:  # noqa: F811
    litellm = pytest.importorskip("litellm")
    answer = litellm.rerank(
        model="cohere/rerank-v3.5", query=QUERY, documents=TEXTS, top_n=3, api_base=f"{address}/v2/rerank", api_key=KEY
    )
    assert [(r["index"], r["relevance_score"]) for r in answer.results] == order
    said = litellm.text_completion(
        model=f"text-completion-openai/{tiny_dir}", prompt="Rust is", max_tokens=5, temperature=0,
        api_base=f"{address}/v1", api_key=KEY,
    )  # fmt: skip
    assert said.usage.completion_tokens == 5


def test_langchain(address: str, order: list[tuple[int, float]]) -> None:
    langchain_cohere = pytest.importorskip("langchain_cohere")
    documents = pytest.importorskip("langchain_core.documents")
    compressor = langchain_cohere.CohereRerank(cohere_api_key=KEY, base_url=address, model="rerank-v3.5", top_n=3)
    found = compressor.compress_documents([documents.Document(page_content=t) for t in TEXTS], QUERY)
    assert [(TEXTS.index(d.page_content), d.metadata["relevance_score"]) for d in found] == order


def test_cohere(address: str, order: list[tuple[int, float]]) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key=KEY, base_url=address)
    answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=2)
    assert [(r.index, r.relevance_score) for r in answer.results] == order[:2]
    old = cohere.Client(api_key=KEY, base_url=address)
    documents = [{"text": text} for text in TEXTS]
    found = old.rerank(model="rerank-v3.5", query=QUERY, documents=documents, return_documents=True)
    assert [(r.index, r.relevance_score) for r in found.results] == order
    assert found.results[0].document.text == TEXTS[order[0][0]]


def test_voyage(address: str, order: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    voyageai = pytest.importorskip("voyageai")
    client = voyageai.Client(api_key=KEY, max_retries=0, base_url=f"{address}/v1")
    found = client.rerank(QUERY, TEXTS, model="rerank-2", top_k=2)
    assert [(r.index, r.relevance_score) for r in found.results] == order[:2]
    assert found.results[0].document == TEXTS[order[0][0]]
    assert found.total_tokens > 0


def test_our_own_client(address: str, order: list[tuple[int, float]]) -> None:
    from uma_engine import Candidate
    from uma_engine.client import Client
    from uma_engine.errors import EngineUnavailable, InvalidRequest, UmaError, UnknownAdapter

    with Client(address, key=KEY) as client:
        people = [Candidate(f"p{i}", text, {"rate": i}) for i, text in enumerate(TEXTS)]
        found = client.rank(QUERY, people, top_n=2)
        assert [(r.id, r.score) for r in found] == [(f"p{i}", score) for i, score in order[:2]]
        assert len(found) == 2
        assert found.warnings
        assert "rerank-2" in client.models()
        events = list(client.rank_stream(QUERY, TEXTS, deliberate=3))
        assert [e["event"] for e in events] == ["scores", "deliberated", "answer"]
        with pytest.raises(UnknownAdapter, match="`ghost`"):
            client.rank(QUERY, TEXTS, adapter="ghost")
        with pytest.raises(InvalidRequest, match="query"):
            client.rank(" ", TEXTS)
        with pytest.raises(InvalidRequest, match="query"):
            list(client.rank_stream(" ", TEXTS))
        with pytest.raises(UmaError) as error:
            client.load_adapter("x", "x")
        assert error.value.status == 403
    with Client(address) as nobody, pytest.raises(UmaError, match="a key is needed"):
        nobody.rank(QUERY, TEXTS)
    with Client("http://127.0.0.1:9", timeout=2) as nowhere, pytest.raises(EngineUnavailable, match="no answer came"):
        nowhere.models()
