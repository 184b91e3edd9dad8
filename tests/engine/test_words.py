"""Words, notes and events of a ranking: valid and grounded with any model, at the end of computed paths, replayed bit for bit."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import SMALL, assert_idle
from tests.tiny import make_tiny_adapter, make_tiny_model
from tests.unit.test_grounding import complaints
from uma_engine import AsyncEngine, Candidate, Engine
from uma_engine.core import SamplingParams
from uma_engine.errors import InvalidRequest, TooLarge, UnknownAdapter
from uma_engine.ranking.assessment import SECTIONS, Assessment
from uma_engine.ranking.grounding import check
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks import rank as ranking
from uma_engine.tasks.candidates import read_candidates, read_job
from uma_engine.tasks.deliberate import _after_notes, tail
from uma_engine.tasks.draft import Sources, schema_of
from uma_engine.tasks.records import differences, read_record, write_json
from uma_engine.tasks.shortlist import recorded_wishes
from uma_engine.tasks.surface_rank import redacted
from uma_kernels import dispatch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOB = read_job(EXAMPLES / "job.md")
PEOPLE = read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)
EXAMPLE = Surface.load(EXAMPLES / "surface.toml")
FACTS = {"budget": 60}
ROOM = {"kv_cache_bytes": 16 * 2**20, "max_num_batched_tokens": 1024, "max_model_len": 4096}
ONE_READ = Surface("one", reads=(Read("fit", "Answer {labels}: does the candidate fit?"),))
EngineFactory = Callable[..., Engine]
bitwise = pytest.mark.skipif(dispatch.C is None, reason="bitwise invariance is a property of the compiled kernels")


@pytest.fixture
def roomy(make_engine: EngineFactory) -> Engine:
    return make_engine(**ROOM)


def in_words(engine: Engine, people: Any = PEOPLE[:10], **options: Any) -> Any:
    options = {"surface": EXAMPLE, "job_facts": FACTS, "explain": "words"} | options
    if options["surface"] is not EXAMPLE:
        options["job_facts"] = None
    return engine.rank(JOB, people, **options)


def bits(answer: Any) -> list[Any]:
    return [(r.id, [x.hex() for x in r.logits], r.score.hex()) for r in answer.all_results]


def accepted(written: str, schema: Any) -> bool:
    """Whether the text is JSON as the schema of words has it."""
    data = json.loads(written)
    if list(data) != list(SECTIONS):
        return False
    for section, items in data.items():
        declared = schema["properties"][section]
        if not declared.get("minItems", 0) <= len(items) <= declared["maxItems"]:
            return False
        for item in items:
            names = declared["items"]["properties"]["cites"]["items"]["enum"]
            if (
                list(item) != ["cites", "text"]
                or not 1 <= len(item["cites"]) <= 2
                or not set(item["cites"]) <= set(names)
            ):
                return False
            end = "?" if section == "questions" else "."
            if not item["text"].endswith(end) or not 4 <= len(item["text"]) <= 210:
                return False
    return True


def check_assessment(
    engine: Engine, answer: Any, assessment: Assessment, surface: Surface, people: Any, strict: bool = True
) -> None:
    """Valid against its schema, every cite where it says, every sentence grounded by the judge and by another checker."""
    person, result = people[assessment.index], answer.all_results[assessment.index]
    assert assessment.id == person.id == result.id
    text = redacted(surface, person)[0]
    sources = Sources.of(text, JOB.strip(), result.ledger)
    assert accepted(assessment.written, schema_of(sources)), assessment.written
    for section in SECTIONS:
        for sentence in assessment.section(section):
            assert sentence.cites
            for cite in sentence.cites:
                if cite.kind == "factor":
                    line = next(line for line in result.ledger if line.name == cite.name)
                    assert cite.value == (None if line.missing else line.value)
                else:
                    assert (text if cite.kind == "candidate" else JOB.strip())[cite.start : cite.end] == cite.text
            if sentence.origin == "model":
                assert not check(sentence.text, section, sentence.cites, text, strict=strict)
            assert not complaints(sentence.text, [c.text for c in sentence.cites]), sentence.text


@bitwise
@pytest.mark.parametrize("surface", [EXAMPLE, ONE_READ], ids=["three reads", "one read"])
def test_words_change_no_score_and_cite_what_is_there(roomy: Engine, surface: Surface) -> None:
    plain = in_words(roomy, surface=surface, explain="ledger")
    answer = in_words(roomy, surface=surface)
    assert bits(answer) == bits(plain)
    assert [r.id for r in answer.results] == [r.id for r in plain.results]
    assert [a.index for a in answer.assessments] == [r.index for r in answer.results[:5]]
    for assessment in answer.assessments:
        check_assessment(roomy, answer, assessment, surface, PEOPLE[:10])
        assert assessment.strengths or assessment.gaps
    assert plain.assessments == ()
    assert len(in_words(roomy, surface=surface, explain_top=2).assessments) == 2
    assert len(in_words(roomy, surface=surface, top_n=3, explain_top=8).assessments) == 3


@pytest.mark.slow
def test_words_of_many_random_models_are_valid_and_grounded(tmp_path: Path) -> None:
    """300 drafts of random models at many token bounds; `tests/unit/test_grounding.py` has the adversaries."""
    seen = 0
    for seed in range(6):
        path = make_tiny_model(tmp_path / str(seed), seed=100 + seed)
        with Engine(path, **(SMALL | ROOM)) as engine:
            for number, tokens in enumerate((64, 96, 100, 130, 200)):
                people = PEOPLE[number * 9 : number * 9 + 12]
                answer = in_words(engine, people, explain_tokens=tokens, explain_top=10, explain_strict=number % 2 == 0)
                for assessment in answer.assessments:
                    if tokens >= 130:
                        check_assessment(engine, answer, assessment, EXAMPLE, people, strict=number % 2 == 0)
                    assert set(json.loads(assessment.written)) == set(SECTIONS)
                    seen += 1
    assert seen == 300


@bitwise
def test_what_is_written_about_one_does_not_depend_on_the_others_the_cache_or_the_steps(
    roomy: Engine, make_engine: EngineFactory
) -> None:
    surface = replace(EXAMPLE, resolution=0.0)
    people = PEOPLE[:10]
    answer = in_words(roomy, people, surface=surface, deliberate=12)
    for assessment, note in list(zip(answer.assessments, answer.deliberation.notes, strict=True))[:3]:
        alone = in_words(roomy, [people[assessment.index]], surface=surface, deliberate=12)
        assert alone.assessments[0].written == assessment.written
        assert alone.assessments[0].strengths == assessment.strengths
        assert alone.deliberation.notes[0].token_ids == note.token_ids
        assert alone.deliberation.notes[0].score == note.score
    for options in (
        {"enable_prefix_cache": False},
        {"max_num_batched_tokens": 33},
        {"kv_cache_bytes": 2 * 2**20, "num_threads": 1},
    ):
        other = make_engine(**(ROOM | options))
        again = in_words(other, people, surface=surface, deliberate=12)
        assert [a.written for a in again.assessments] == [a.written for a in answer.assessments], options
        assert again.deliberation == answer.deliberation
        assert bits(again) == bits(answer)


@pytest.mark.parametrize("surface", [EXAMPLE, ONE_READ], ids=["three reads", "one read"])
def test_the_candidates_text_is_not_computed_again(make_engine: EngineFactory, surface: Surface) -> None:
    engine = make_engine(**(ROOM | {"kv_cache_bytes": 64 * 2**20}))
    answer = in_words(engine, surface=surface, deliberate=8)
    stages = {s.name: s for s in answer.usage.stages if s.computed_tokens}
    assert list(stages) == ["score", "notes", "reading again", "words"]
    texts = {i: len(engine.tokenize(redacted(surface, PEOPLE[i])[0])) for i in answer.deliberation.order}
    above = len(engine.tokenize(JOB))
    for name in ("notes", "words"):
        assert stages[name].cached_tokens >= sum(texts.values()) + 5 * above, name
    assert stages["notes"].computed_tokens < 5 * 100, "the notes' prompt and the notes"
    assert stages["reading again"].cached_tokens >= sum(texts.values()), "one tree: the job counts once"
    for field in ("computed_tokens", "cached_tokens", "output_tokens", "flops"):
        assert getattr(answer.usage, field) == sum(getattr(u, field) for u in stages.values())


@bitwise
def test_the_second_reading_is_the_probe_after_the_notes(roomy: Engine) -> None:
    """Recomputed by `score` from token ids alone, with and without a surface."""
    people = PEOPLE[:7]
    tokenizer = roomy.tokenizer
    for surface in (None, ONE_READ):
        answer = roomy.rank(JOB, people, surface=surface, deliberate=20, explain_top=4)
        probe = "Answer yes or no: does the candidate fit?"
        if surface is None:
            probe = "Is the candidate a good fit for the job? Answer yes or no."
        prompt = roomy._rank_prompt(probe)
        instruction = tokenizer.encode(ranking.DEFAULT_INSTRUCTION)
        for note in answer.deliberation.notes:
            text = people[note.index].text.strip() if surface is None else redacted(surface, people[note.index])[0]
            ids = [
                *prompt.head,
                *instruction,
                *prompt.after_instruction,
                *tokenizer.encode(JOB.strip()),
                *prompt.after_job,
            ]
            ids += tokenizer.encode(text)
            before = roomy.score(ids, [prompt.after_candidate])[0]
            assert before.logits == note.logits_before
            noted = roomy.generate(
                [[*ids, *tail(roomy)]], SamplingParams(max_tokens=20, stop_token_ids=tuple(tokenizer.control_ids))
            )[0]
            tokens = [t for t in noted.token_ids if t not in tokenizer.control_ids]
            assert tuple(tokens) == note.token_ids
            after = roomy.score([*ids, *tail(roomy), *tokens], [_after_notes(roomy, probe)])[0]
            result = answer.all_results[note.index]
            assert after.logits == result.logits
            assert after.value == note.score == result.score
            assert before.value == note.score_before


@pytest.mark.parametrize("surface", [None, EXAMPLE], ids=["plain", "surface"])
def test_notes_move_the_shortlist_among_itself_alone(roomy: Engine, surface: Surface | None) -> None:
    facts = FACTS if surface else None
    plain = roomy.rank(JOB, PEOPLE[:12], surface=surface, job_facts=facts)
    answer = roomy.rank(JOB, PEOPLE[:12], surface=surface, job_facts=facts, deliberate=10, explain_top=6)
    change = answer.deliberation
    first = [r.index for r in plain.results]
    assert list(change.order_before) == first[:6]
    assert [r.index for r in answer.results] == [*change.order, *first[6:]]
    assert sorted(change.order) == sorted(first[:6])
    scores = [answer.all_results[i].score for i in change.order]
    if surface is None:
        assert scores == sorted(scores, reverse=True)
        assert [n.place for n in change.notes] == [1, 2, 3, 4, 5, 6]
    else:
        places = [r.place for r in answer.results]
        assert places == sorted(places)
        assert places[6] == 7
        assert [n.place for n in change.notes] == places[:6]
        for result in answer.all_results:
            assert result.score == min(1.0, sum(line.contribution for line in result.ledger)), (
                "the ledger is that of the score"
            )
    assert change.moved == sum(a != b for a, b in zip(change.order_before, change.order, strict=True)) > 0
    assert -1 <= change.kendall_tau <= 1
    for index in first[6:]:
        assert answer.all_results[index].logits == plain.all_results[index].logits
    assert all(0 < len(n.token_ids) <= 10 for n in change.notes)
    assert {s.name for s in answer.usage.stages} == {"tokenize", "score", "notes", "reading again"}


def test_adapters_write_and_read(roomy: Engine, adapter_dirs: dict[str, Path]) -> None:
    for name in ("alpha", "beta"):
        roomy.load_adapter(name, adapter_dirs[name])
    reads = (
        Read("a", "Answer {labels}: is it so?", adapter="alpha"),
        Read("b", "Answer {labels}: or not?", adapter="beta"),
    )
    surface = Surface("two", reads=(*reads, Read("c", "Answer {labels}: who knows?")))
    by = {writer: in_words(roomy, surface=surface, adapter=writer, deliberate=10) for writer in (None, "alpha", "beta")}
    written = {tuple(a.written for a in answer.assessments) for answer in by.values()}
    notes = {tuple(n.text for n in answer.deliberation.notes) for answer in by.values()}
    assert len(written) == len(notes) == 3, "who writes is heard"
    for answer in by.values():
        for assessment in answer.assessments:
            check_assessment(roomy, answer, assessment, surface, PEOPLE[:10])
    with pytest.raises(UnknownAdapter):
        in_words(roomy, adapter="gone")
    assert_idle(roomy)


def test_an_adapter_that_is_replaced_meanwhile_is_noticed(
    roomy: Engine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    roomy.load_adapter("alpha", adapter_dirs["alpha"])
    plan = roomy._rank_plan(
        JOB, PEOPLE[:4], adapter="alpha", top_n=None, instruction=None, labels=("yes", "no"), max_tokens_per_candidate=None,
        deadline=None, tenant="", surface=None, job_facts=None, deliberate=4,
    )  # fmt: skip
    held = roomy._stack.adapters
    lease = held.lease
    other = make_tiny_adapter(tmp_path / "other", seed=77)

    def swapped(name: str) -> Any:
        ref = lease(name)
        held.lease = lease  # type: ignore[method-assign]
        roomy.load_adapter("alpha", other)
        return ref

    held.lease = swapped  # type: ignore[method-assign]
    call = next(plan)
    with pytest.raises(InvalidRequest, match="was replaced"):
        plan.send(call.wait())
    assert_idle(roomy)


@bitwise
def test_a_record_of_words_and_notes_replays(roomy: Engine, tiny_dir: Path, tmp_path: Path) -> None:
    for options in (
        {"surface": EXAMPLE, "job_facts": FACTS, "explain": "words", "deliberate": 8, "explain_top": 3, "top_n": 6},
        {"deliberate": 8},
    ):
        answer = roomy.rank(JOB, PEOPLE[:9], **options)
        write_json(tmp_path / "record.json", answer.record)
        record = read_record(tmp_path / "record.json")
        wishes = recorded_wishes(record["options"])
        kept = {k: record["options"][k] for k in ("surface", "job_facts") if k in record["options"]}
        again = roomy.rank(record["query"], PEOPLE[:9], **kept, **wishes, instruction=record["options"]["instruction"])
        assert differences(record, json.loads(json.dumps(again.record))) == []
        looked_at = [r for r in record["results"] if "deliberation" in r]
        assert {r["id"] for r in looked_at} == {n.id for n in answer.deliberation.notes}
        assert [s["name"] for s in record["usage"]["stages"]] == [s.name for s in answer.usage.stages]
        broken = json.loads(json.dumps(record))
        entry = next(r for r in broken["results"] if "deliberation" in r)
        entry["deliberation"]["notes"] += "!"
        assert any("deliberation" in line for line in differences(broken, again.record))
        if "surface" in options:
            entry = next(r for r in broken["results"] if "assessment" in r)
            entry["assessment"]["strengths"] = []
            assert any("assessment" in line for line in differences(broken, again.record))
            script = EXAMPLES / "recompute.py"  # the ledgers are those of the scores after the notes
            done = subprocess.run(
                [sys.executable, "-I", script, "record.json"], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.stdout == "9 scores recomputed, largest difference 0.0\n"
    with pytest.raises(InvalidRequest, match="shortlist"):
        recorded_wishes({"shortlist": {"explain": "words", "model": "x"}})
    plain = roomy.rank(JOB, PEOPLE[:3]).record
    assert recorded_wishes(plain["options"]) == {}


def test_an_answer_is_plain_data(roomy: Engine) -> None:
    answer = in_words(roomy, deliberate=6, explain_top=2)
    data = json.loads(json.dumps(answer.to_dict()))
    assert [a["id"] for a in data["assessments"]] == [a.id for a in answer.assessments]
    assert data["deliberation"]["order"] == list(answer.deliberation.order)
    names = [s["name"] for s in data["usage"]["stages"] if s["computed_tokens"]]
    assert names == ["score", "notes", "reading again", "words"]
    cite = data["assessments"][0]["strengths"] or data["assessments"][0]["gaps"]
    assert cite[0]["cites"][0]["kind"] in ("factor", "candidate", "job")


def test_bad_wishes_are_typed_errors(roomy: Engine) -> None:
    for options, match in (
        ({"explain": "prose"}, "`explain` is `'prose'`"),
        ({"explain": "words"}, "without a surface"),
        ({"explain": "words", "surface": EXAMPLE, "explain_top": 0}, "explain_top"),
        ({"explain": "words", "surface": EXAMPLE, "explain_tokens": True}, "explain_tokens"),
        ({"explain": "words", "surface": EXAMPLE, "explain_strict": 1}, "explain_strict"),
        ({"explain_tokens": 64}, "is not `words`"),
        ({"explain_top": 3}, "nothing is to be written"),
        ({"deliberate": 0}, "deliberate"),
        ({"deliberate": 5000}, "deliberate"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            roomy.rank(JOB, PEOPLE[:2], **options)
    with pytest.raises(InvalidRequest, match="shortest answer"):
        in_words(roomy, explain_tokens=20)
    with pytest.raises(InvalidRequest, match="no option `explain_topp`"):
        roomy.rank_stream(JOB, PEOPLE[:2], explain_topp=3)
    assert in_words(roomy, []).assessments == ()
    assert roomy.rank(JOB, [], deliberate=4).deliberation is None
    assert_idle(roomy)


def test_where_there_is_no_room_it_is_said(make_engine: EngineFactory) -> None:
    long = [
        Candidate("long", "Ten years of Rust and Linux. " * 200),
        Candidate("short", "A careful nurse with ten years."),
    ]
    job = "We need a Rust engineer."
    small = make_engine(max_model_len=512, kv_cache_bytes=16 * 2**20)
    answer = small.rank(job, long, surface=ONE_READ, explain="words", deliberate=16)
    assert answer.all_results[0].truncated_tokens > 0
    by_id = {a.id: a for a in answer.assessments}
    assert by_id["long"].written, "cut once more, not left out"
    assert len(answer.deliberation.notes) == 2
    tight = small.rank(job, long, surface=ONE_READ, explain="words", explain_tokens=400)
    assert [a.written for a in tight.assessments] == ["", ""]
    assert all(s.origin == "template" for a in tight.assessments for part in SECTIONS for s in a.section(part))
    assert any("no room for words" in w for w in tight.warnings)
    assert any("no room for words" in w for w in tight.record["warnings"])
    with pytest.raises(TooLarge, match="deliberate"):
        small.rank(job, long, deliberate=480)
    assert_idle(small)


def test_redaction_holds_for_what_is_cited_and_written_about(roomy: Engine) -> None:
    person = Candidate("p", "My name is Zebulon Quux. Ten years of Rust at Acme.", {"name": "Zebulon Quux"})
    answer = roomy.rank(JOB, [person, PEOPLE[0]], surface=ONE_READ, explain="words", deliberate=12)
    assessment = next(a for a in answer.assessments if a.id == "p")
    assert "Zebulon" not in json.dumps(assessment.to_dict())
    sources = Sources.of(redacted(ONE_READ, person)[0], JOB, answer.all_results[0].ledger)
    assert "[name]" in sources.listed()


# ---- events ----


def test_events_come_in_order_and_add_up_to_the_answer(roomy: Engine) -> None:
    options: dict[str, Any] = {"surface": EXAMPLE, "job_facts": FACTS, "explain": "words", "deliberate": 8}
    expected = roomy.rank(JOB, PEOPLE[:8], **options)
    events = list(roomy.rank_stream(JOB, PEOPLE[:8], **options))
    kinds = [e.kind for e in events]
    assert kinds[:2] == ["scores", "deliberated"]
    assert set(kinds[2:-1]) == {"sentence"}
    assert kinds[-1] == "answer"
    plain = roomy.rank(JOB, PEOPLE[:8], surface=EXAMPLE, job_facts=FACTS)
    assert events[0].answer.results == plain.results
    assert events[1].answer.results == expected.results
    assert events[-1].answer.assessments == expected.assessments
    for assessment in expected.assessments:
        mine = [(e.section, e.sentence) for e in events if e.kind == "sentence" and e.index == assessment.index]
        assert {s for s, _ in mine} <= set(SECTIONS)
        for section in SECTIONS:
            assert tuple(s for name, s in mine if name == section) == assessment.section(section)
        assert all(e.id == assessment.id for e in events if e.index == assessment.index)
    assert [e.kind for e in roomy.rank_stream(JOB, PEOPLE[:3])] == ["scores", "answer"]


def test_leaving_a_stream_early_frees_everything(roomy: Engine) -> None:
    for leave_after in (1, 2, 3):
        stream = roomy.rank_stream(JOB, PEOPLE[:12], surface=EXAMPLE, job_facts=FACTS, explain="words", deliberate=200)
        for _ in range(leave_after):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    roomy.rank_stream(JOB, PEOPLE[:3])  # never begun
    assert roomy.rank(JOB, PEOPLE[:2]).results
    assert_idle(roomy)


def test_errors_come_out_of_the_iterator(roomy: Engine) -> None:
    with pytest.raises(InvalidRequest, match="without a surface"):
        list(roomy.rank_stream(JOB, PEOPLE[:2], explain="words"))
    with pytest.raises(UnknownAdapter):
        list(roomy.rank_stream(JOB, PEOPLE[:2], adapter="gone"))
    assert_idle(roomy)


def test_the_async_face_streams_and_is_cancelled(tiny_dir: Path, roomy: Engine) -> None:
    options: dict[str, Any] = {"surface": EXAMPLE, "job_facts": FACTS, "explain": "words", "deliberate": 8}
    expected = roomy.rank(JOB, PEOPLE[:8], **options)

    async def main() -> None:
        async with await AsyncEngine.create(tiny_dir, **(SMALL | ROOM)) as engine:
            answer = await engine.rank(JOB, PEOPLE[:8], **options)
            assert answer.assessments == expected.assessments
            events = [e async for e in engine.rank_stream(JOB, PEOPLE[:8], **options)]
            assert [e.kind for e in events][:2] == ["scores", "deliberated"]
            assert events[-1].answer.assessments == expected.assessments
            told = [e for e in events if e.kind == "sentence"]
            assert len(told) == sum(len(a.section(s)) for a in expected.assessments for s in SECTIONS)
            stream = engine.rank_stream(JOB, PEOPLE[:8], **options)
            assert (await anext(stream)).kind == "scores"
            await stream.aclose()  # type: ignore[attr-defined]
            task = asyncio.create_task(engine.rank(JOB, PEOPLE[:8], **(options | {"deliberate": 400})))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(InvalidRequest):
                async for _ in engine.rank_stream(JOB, PEOPLE[:2], explain="words"):
                    pass
            await asyncio.sleep(0.1)
            assert (await engine.rank(JOB, PEOPLE[:2])).results
            assert_idle(engine)

    asyncio.run(main())


def test_the_example_runs(tiny_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "explain.py"), str(tiny_dir)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("order: ")
    assert any("; template]" in line for line in lines)
    assert lines[-1].startswith("tau ")
