"""generate() and stream(): greedy decoding against recomputation, stop strings, seeds, streaming, both faces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL, assert_idle
from uma_engine import AsyncEngine, Engine, FinishReason, SamplingParams
from uma_engine.errors import InvalidRequest, TooLarge

PROMPT = "We need a senior Rust engineer who knows databases"


def test_greedy_decoding_equals_scoring_one_token_at_a_time(engine: Engine) -> None:
    done = engine.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert done.finish_reason is FinishReason.LENGTH
    assert len(done.token_ids) == 12
    ids = engine.tokenize(PROMPT)
    for token in done.token_ids:
        assert engine.generate(
            engine.tokenizer.decode(ids), SamplingParams(max_tokens=1, ignore_eos=True)
        )  # engine stays usable
        ids.append(token)
    fresh = [engine.generate(PROMPT, SamplingParams(max_tokens=n, ignore_eos=True))[0].token_ids for n in (1, 5, 12)]
    assert [list(done.token_ids[:n]) for n in (1, 5, 12)] == [list(f) for f in fresh]
    assert done.text == engine.tokenizer.decode(list(done.token_ids))


def test_streamed_pieces_join_to_the_whole_text(engine: Engine) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    whole = engine.generate([PROMPT, "yes no yes"], params)
    pieces = list(engine.stream([PROMPT, "yes no yes"], params))
    for index, completion in enumerate(whole):
        mine = [p for p in pieces if p.index == index]
        assert "".join(p.text for p in mine) == completion.text
        assert mine[-1].finish_reason is completion.finish_reason


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    text = engine.generate(PROMPT, params)[0].text
    stop = text[7:10]
    at = text.index(stop)
    stopped = engine.generate(
        PROMPT, SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=(stop,))
    )[0]
    assert stopped.text == text[:at]
    assert stopped.finish_reason is FinishReason.STOP
    pieces = engine.stream(
        PROMPT, SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=(stop,))
    )
    assert "".join(p.text for p in pieces) == text[:at], "no part of a stop string may be shown"


def test_an_end_token_stops_and_is_not_text(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    tokens = engine.generate(PROMPT, params)[0].token_ids
    end = tokens[5]
    first = tokens.index(end)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop_token_ids=(end,))
    done = engine.generate(PROMPT, params)[0]
    assert done.finish_reason is FinishReason.STOP
    assert done.token_ids == tokens[: first + 1]
    assert done.text == engine.tokenizer.decode(list(tokens[:first]))


def test_seeds_decide_and_no_seed_is_repeatable(engine: Engine) -> None:
    def tokens(**options: object) -> tuple[int, ...]:
        return engine.generate(PROMPT, SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True, **options))[
            0
        ].token_ids

    assert tokens(seed=1) == tokens(seed=1)
    assert tokens(seed=1) != tokens(seed=2)
    assert tokens() == tokens()
    assert tokens(top_k=1, seed=1) == tokens(top_k=1, seed=2), "one candidate leaves nothing to chance"


def test_mixed_adapters_and_parameters_in_one_call(engine: Engine, adapter_dirs: dict[str, Path]) -> None:
    engine.load_adapter("alpha", adapter_dirs["alpha"])
    params = [SamplingParams(max_tokens=8, ignore_eos=True), SamplingParams(max_tokens=3, ignore_eos=True)]
    with_adapter, without = engine.generate([PROMPT, PROMPT], params, adapter=["alpha", None])
    assert len(with_adapter.token_ids) == 8
    assert without.token_ids == engine.generate(PROMPT, params[1])[0].token_ids
    assert with_adapter.token_ids[:3] != without.token_ids


def test_chat_puts_the_prompt_into_the_template(engine: Engine) -> None:
    chat = engine.generate("yes", SamplingParams(max_tokens=1), chat=True)[0]
    raw = engine.generate("yes", SamplingParams(max_tokens=1))[0]
    assert chat.usage.prompt_tokens > raw.usage.prompt_tokens


def test_a_prompt_of_token_ids_is_taken_as_it_is(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6)
    text, ids = engine.generate(["a job", engine.tokenize("a job")], params)
    assert ids.token_ids == text.token_ids
    for bad, chat in (([[1, -1]], False), ([3], False), ([[1, 2]], True)):
        with pytest.raises(InvalidRequest):
            engine.generate(bad, params, chat=chat)  # type: ignore[arg-type]


def test_bad_generation_arguments_are_typed_errors(engine: Engine) -> None:
    for bad in ({"max_tokens": 0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"stop": ("",)}, {"top_k": -1}):
        with pytest.raises(InvalidRequest):
            SamplingParams(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="empty"):
        engine.generate("")
    with pytest.raises(InvalidRequest, match="2 entries for 1"):
        engine.generate("x", [SamplingParams(), SamplingParams()])
    with pytest.raises(TooLarge, match="max_tokens"):
        engine.generate("x", SamplingParams(max_tokens=100_000))
    assert engine.generate([]) == []


def test_the_async_face_gives_the_same_answers(tiny_dir: Path, engine: Engine) -> None:
    people = ["Ten years of Rust", "A careful nurse", "Taxes and payroll"]
    params = SamplingParams(max_tokens=10, ignore_eos=True)

    async def main() -> None:
        async with await AsyncEngine.create(tiny_dir, **SMALL) as other:
            ranks = await asyncio.gather(*(other.rank("Rust wanted", people) for _ in range(5)))
            assert all(a.results == engine.rank("Rust wanted", people).results for a in ranks)
            assert await other.score("Rust", people) == engine.score("Rust", people)
            assert (await other.generate(PROMPT, params))[0].token_ids == engine.generate(PROMPT, params)[0].token_ids
            pieces = [p async for p in other.stream(PROMPT, params)]
            assert "".join(p.text for p in pieces) == engine.generate(PROMPT, params)[0].text
            assert_idle(other)

    asyncio.run(main())


def test_leaving_a_stream_early_frees_what_it_held(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    stream = engine.stream([PROMPT] * 4, SamplingParams(max_tokens=500, ignore_eos=True))
    for _ in range(3):
        next(stream)
    stream.close()
    engine.generate("yes", SamplingParams(max_tokens=2))
    assert_idle(engine)
    assert engine._stack.scheduler.counters.cancelled == 4
