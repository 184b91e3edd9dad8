"""Answers that a JSON schema accepts: always, whole, and at no cost to the neighbours' bits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import SMALL
from tests.tiny import make_tiny_model
from uma_engine import Engine, SamplingParams
from uma_engine.core import FinishReason, Request, RequestKind, Segment
from uma_engine.errors import InvalidRequest, TooLarge
from uma_engine.tasks.generate import TextSink
from uma_kernels import dispatch

PROMPT = "We need a senior Rust engineer who knows databases, Linux and networks; taxes and payroll are a plus."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "years": {"type": "integer"},
        "skills": {"type": "array", "items": {"enum": ["rust", "linux", "tax"]}, "maxItems": 3},
        "remote": {"type": "boolean"},
    },
    "required": ["name", "years", "skills"],
    "additionalProperties": False,
}
NESTED = {"type": "object", "properties": {"child": {"$ref": "#"}, "n": {"type": "number"}}, "required": ["n"]}
FREE = {"type": "string"}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "nested": NESTED,
    "free text": FREE,
    "at least": {"type": "string", "minLength": 8},
    "pattern": {"type": "string", "pattern": "^[}\\]]+$"},
    "choice": {"anyOf": [{"type": "null"}, {"type": "array", "items": {}, "minItems": 2}]},
    "number": {"type": "number"},
    "anything": {},
}


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None) -> bool:
    """The part of JSON Schema that the tests use, written for them."""
    root = schema if root is None else root
    if "$ref" in schema:
        return accepts(root, value, root)
    if "anyOf" in schema:
        return any(accepts(s, value, root) for s in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    if kind == "object":
        known = schema["properties"]
        if not isinstance(value, dict) or not set(schema["required"]) <= value.keys():
            return False
        if schema.get("additionalProperties") is False and not value.keys() <= known.keys():
            return False
        return all(accepts(known[k], v, root) for k, v in value.items() if k in known)
    if kind == "array":
        if not isinstance(value, list) or not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
            return False
        return all(accepts(schema["items"], item, root) for item in value)
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return {"boolean": isinstance(value, bool), "null": value is None, None: True}[kind]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_of_a_random_model_is_valid_and_whole(engine: Engine, name: str) -> None:
    schema = SCHEMAS[name]
    shortest = len(engine._grammars.json(schema, 1000)._closing)
    params = [
        SamplingParams(max_tokens=max(1, n), temperature=t, seed=seed, json_schema=schema)
        for n in (shortest, shortest + 1, shortest + 9, 64)
        for seed in range(8)
        for t in (0.0, 1.0, 3.0)
    ]
    answers = engine.generate([PROMPT] * len(params), params)
    for p, answer in zip(params, answers, strict=True):
        assert accepts(schema, json.loads(answer.text)), answer.text
        assert answer.finish_reason is FinishReason.STOP
        assert len(answer.token_ids) <= p.max_tokens
    if name in ("person", "free text"):
        assert len({a.text for a in answers}) > 10, "the model still says what it would"


def test_a_neighbour_without_a_grammar_keeps_its_bits(engine: Engine) -> None:
    free = SamplingParams(max_tokens=24, temperature=1.2, seed=5, ignore_eos=True)
    bound = SamplingParams(max_tokens=40, temperature=1.2, seed=5, json_schema=PERSON)
    alone = engine.generate(PROMPT, free)[0].token_ids
    bound_alone = engine.generate(PROMPT, bound)[0].token_ids
    together = engine.generate([PROMPT] * 6, [free, bound] * 3)
    assert [a.token_ids for a in together] == [alone, bound_alone] * 3


@pytest.mark.skipif(dispatch.C is None, reason="only compiled kernels are recorded")
def test_recorded_decode_steps_honour_the_mask(engine: Engine) -> None:
    taped = engine._stack.model._taped
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=2, json_schema=PERSON)
    text = engine.generate(PROMPT, params)[0].text
    assert taped._tapes, "decode steps were recorded"
    assert accepts(PERSON, json.loads(text))
    with dispatch.use_backend("reference"):
        plain = Engine(engine.model, **SMALL)
        try:
            assert accepts(PERSON, json.loads(plain.generate(PROMPT, params)[0].text))
        finally:
            plain.close()


def test_an_answer_survives_preemption_and_small_steps(make_engine: Callable[..., Engine]) -> None:
    params = [SamplingParams(max_tokens=40, temperature=1.0, seed=i, json_schema=PERSON) for i in range(8)]
    expected = [a.token_ids for a in make_engine().generate([PROMPT] * 8, params)]
    tight = make_engine(kv_cache_bytes=2 * 2 * 2 * 16 * 4 * 16 * 16, max_num_batched_tokens=5, max_model_len=128)
    assert [a.token_ids for a in tight.generate([PROMPT] * 8, params)] == expected
    assert tight._stack.scheduler.counters.preempted > 0


def test_schemas_that_cannot_be_met_are_typed_errors(engine: Engine) -> None:
    def ask(schema: Any, max_tokens: int = 64) -> None:
        engine.generate(PROMPT, SamplingParams(max_tokens=max_tokens, json_schema=schema))

    with pytest.raises(InvalidRequest, match=r"takes .* tokens but `max_tokens` is 4"):
        ask(PERSON, 4)
    for schema in ({"$ref": "#"}, {"type": "string", "minLength": 10**9}, {"type": "array", "items": {}, "minItems": 10**9}):  # fmt: skip
        with pytest.raises(InvalidRequest, match="accepts no answer"):
            ask(schema)
    for schema in ({"not": {}}, {"type": "string", "format": "no-such"}, {"type": "string", "pattern": "(" * 20000}):
        with pytest.raises(InvalidRequest, match="cannot be enforced"):
            ask(schema)
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    with pytest.raises(TooLarge, match="nested"):
        ask(deep)
    with pytest.raises(TooLarge, match="bytes"):
        ask({"enum": ["x" * 70_000]})
    for bad in ("{}", {"enum": [float("nan")]}, {"enum": [object()]}):
        with pytest.raises(InvalidRequest, match="json_schema"):
            SamplingParams(json_schema=bad)  # type: ignore[arg-type]


class Failing:
    """A grammar that ends its request at a chosen place."""

    finished = False

    def __init__(self, where: str) -> None:
        self.where = where

    def mask(self) -> bytes:
        if self.where == "mask":
            raise InvalidRequest("no mask")
        return b"\xff" * 64

    def accept(self, token_id: int) -> int:
        if self.where == "accept":
            raise InvalidRequest("no token")
        return token_id

    def forced(self) -> list[int]:
        return []


@pytest.mark.parametrize("where", ["mask", "accept"])
def test_a_grammar_that_fails_ends_its_own_request_alone(engine: Engine, where: str) -> None:
    from uma_engine.catalog.tokenizer import IncrementalDecoder

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    sink = TextSink(0, IncrementalDecoder(engine.tokenizer), (), frozenset(), lambda _: None)
    segments = [Segment(engine.tokenize(PROMPT))]
    request = Request("bad", RequestKind.GENERATE, segments, sampling=params, grammar=Failing(where))
    expected = engine.generate(PROMPT, params)[0].token_ids
    engine._stack.loop.submit(request, sink)
    assert engine.generate(PROMPT, params)[0].token_ids == expected
    with pytest.raises(InvalidRequest, match="no mask" if where == "mask" else "no token"):
        sink.future.result(10)


@pytest.mark.parametrize("cuts", [(0,), (0, 7, 9, 12), (0, 1, 2)])
def test_a_path_of_segments_says_what_one_segment_says(engine: Engine, cuts: tuple[int, ...]) -> None:
    """The same bits through tables of slots, recorded or not, beside sequences that lie in whole blocks."""
    from uma_engine.catalog.tokenizer import IncrementalDecoder

    ids = engine.tokenize(PROMPT)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
    expected = engine.generate([ids], params)[0].token_ids
    ends = [*cuts[1:], len(ids)]
    requests = []
    for number in range(3):
        path = [Segment(ids[a:b], parent=i - 1) for i, (a, b) in enumerate(zip(cuts, ends, strict=True))]
        request = Request(f"path{number}", RequestKind.GENERATE, path, sampling=params)
        sink = TextSink(0, IncrementalDecoder(engine.tokenizer), (), frozenset(), lambda _: None)
        engine._stack.loop.submit(request, sink)
        requests.append((request, sink))
    assert engine.generate([ids], params)[0].token_ids == expected
    for request, sink in requests:
        assert sink.future.result(60) is FinishReason.LENGTH
        assert tuple(request.output_token_ids) == expected


def test_other_random_models_are_as_obedient(tmp_path: Any) -> None:
    for seed in (11, 12):
        with Engine(make_tiny_model(tmp_path / str(seed), seed=seed), **SMALL) as engine:
            params = [SamplingParams(max_tokens=30, temperature=2.0, seed=i, json_schema=PERSON) for i in range(24)]
            for answer in engine.generate([PROMPT] * 24, params):
                assert accepts(PERSON, json.loads(answer.text))
