"""rank() over a surface: ledgers that add up to the score, shared text, isolation, ties, redaction, records that replay."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_adapter
from uma_engine import AsyncEngine, Candidate, Engine
from uma_engine.errors import InvalidRequest, SurfaceError, TooLarge, UnknownAdapter
from uma_engine.ranking.calibration import fit, save_calibration
from uma_engine.ranking.factors import Fact, Linear
from uma_engine.ranking.surface import Read, Surface
from uma_engine.tasks.candidates import read_candidates, read_job
from uma_engine.tasks.records import differences, read_record, write_json
from uma_engine.tasks.results import SurfaceAnswer
from uma_kernels import dispatch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOB = read_job(EXAMPLES / "job.md")
PEOPLE = read_candidates(EXAMPLES / "candidates.jsonl", facts_in_text=False)
EXAMPLE = Surface.load(EXAMPLES / "surface.toml")
READS = (
    Read("skills", "Answer {labels}: do the skills match the job?", weight=3),
    Read("clear", "Answer {labels}: is the profile clearly written?"),
    Read("kind", "Answer {labels}: is the tone kind?", labels=("no", "maybe"), weight=0.5),
)
EngineFactory = Callable[..., Engine]
bitwise = pytest.mark.skipif(dispatch.C is None, reason="bitwise invariance is a property of the compiled kernels")


@pytest.fixture
def roomy(make_engine: EngineFactory) -> Engine:
    return make_engine(kv_cache_bytes=16 * 2**20, max_num_batched_tokens=1024)


def ranked(engine: Engine, surface: Any, people: Any = PEOPLE, **options: Any) -> SurfaceAnswer:
    answer = engine.rank(JOB, people, surface=surface, **options)
    assert isinstance(answer, SurfaceAnswer)
    return answer


@pytest.mark.parametrize("aggregate", ["mean", "product"])
def test_a_script_without_our_code_recomputes_every_score_from_the_json_exactly(
    aggregate: str, roomy: Engine, tmp_path: Path
) -> None:
    data = EXAMPLE.to_dict() | {"aggregate": aggregate}
    for factor in (*data["facts"], *data["reads"]):
        factor["weight"] = factor["weight"] / 7
    answer = ranked(roomy, data, job_facts={"budget": 60})
    assert len({r.score for r in answer.all_results}) > 40
    (tmp_path / "answer.json").write_text(json.dumps(answer.to_dict()))
    write_json(tmp_path / "record.json", answer.record)
    script = EXAMPLES / "recompute.py"
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 20
    for name in ("answer.json", "record.json"):
        # -I: neither the environment nor the working directory, so nothing of this project, can be imported
        done = subprocess.run([sys.executable, "-I", script, name], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "48 scores recomputed, largest difference 0.0\n"), done.stderr
    broken = answer.to_dict()
    broken["all_results"][3]["ledger"][2]["value"] += 1e-12
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    assert (
        subprocess.run([sys.executable, "-I", script, "broken.json"], cwd=tmp_path, capture_output=True).returncode == 1
    )


def test_each_line_of_the_ledger_says_where_its_value_comes_from(roomy: Engine) -> None:
    answer = ranked(roomy, EXAMPLE, job_facts={"budget": 60})
    by_id = {p.id: p for p in PEOPLE}
    for result in answer.all_results:
        lines = {line.name: line for line in result.ledger}
        assert list(lines) == [f.name for f in (*EXAMPLE.facts, *EXAMPLE.reads)]
        facts = by_id[result.id].facts
        success = lines["job success"]
        assert (success.kind, success.source, success.raw) == ("fact", "job_success", facts["job_success"])
        assert success.missing == (facts["job_success"] is None)
        assert (success.value == 0.7) if success.missing else (0 <= success.value <= 1)
        rate = lines["rate against budget"]
        assert (rate.source, rate.missing) == ("rate/job.budget", facts["rate"] is None)
        read = lines["skill match"]
        assert (read.kind, read.source, read.missing, len(read.logits)) == ("read", None, False, 2)
        assert result.score == pytest.approx(sum(line.contribution for line in result.ledger), abs=1e-15)
    assert any(line.missing for r in answer.all_results for line in r.ledger)


@bitwise
def test_a_read_has_the_bits_of_rank_alone_beside_other_probes_and_however_the_text_is_shared(
    make_engine: EngineFactory,
) -> None:
    engine, people = make_engine(max_model_len=4096), PEOPLE[:16]
    plain = engine.rank(JOB, people)
    alone = ranked(engine, Surface("one", reads=(Read("fit"),), redact=()), people)
    assert [r.logits for r in alone.all_results] == [r.logits for r in plain.all_results]
    assert [r.score for r in alone.all_results] == [r.score for r in plain.all_results]
    many = Surface("many", reads=(*READS, Read("fit")), redact=())
    first = ranked(engine, many, people)
    cases: list[dict[str, Any]] = [{"max_num_batched_tokens": 40}, {"block_size": 5}, {"num_threads": 1}]
    for options in ({}, *cases, {"kv_cache_bytes": 1200 * 1024, "max_model_len": 2400}):
        other = make_engine(enable_prefix_cache=False, **({"max_model_len": 4096} | options))
        crowded = ranked(other, many, people)
        assert [r.logits[-2:] for r in crowded.all_results] == [r.logits for r in plain.all_results], options
        assert [r.ledger for r in crowded.all_results] == [r.ledger for r in first.all_results], options
    assert [r.ledger for r in ranked(engine, many, people).all_results] == [r.ledger for r in first.all_results], (
        "cached"
    )


@bitwise
def test_a_candidate_s_score_depends_on_nobody_else(roomy: Engine) -> None:
    whole = ranked(roomy, EXAMPLE, job_facts={"budget": 60})
    order = list(range(len(PEOPLE)))
    random.Random(3).shuffle(order)
    shuffled = ranked(roomy, EXAMPLE, [PEOPLE[i] for i in order], job_facts={"budget": 60})
    assert [r.id for r in shuffled.results] == [r.id for r in whole.results], (
        "the order of the input is nobody's advantage"
    )
    for place, i in enumerate(order):
        assert shuffled.all_results[place].ledger == whole.all_results[i].ledger
    for i in (0, 7, 40):
        assert (
            ranked(roomy, EXAMPLE, [PEOPLE[i]], job_facts={"budget": 60}).results[0].ledger
            == whole.all_results[i].ledger
        )


def test_several_probes_compute_a_candidate_s_text_once(make_engine: EngineFactory) -> None:
    """In tokens; `python -m bench.surface` measures both tokens and time on the default model."""
    engine = make_engine(kv_cache_bytes=16 * 2**20, enable_prefix_cache=False)
    one = ranked(engine, Surface("one", reads=READS[:1])).usage
    two = ranked(engine, Surface("two", reads=READS[:2])).usage
    three = ranked(engine, Surface("three", reads=READS)).usage
    probe = len(engine.tokenize(READS[1].question)) + 12
    assert one.computed_tokens < two.computed_tokens < one.computed_tokens + 2 * len(PEOPLE) * probe
    assert three.prompt_tokens > 2.9 * one.prompt_tokens, "what as many prompts would have held"
    assert three.computed_tokens / one.computed_tokens < 1.35
    assert three.flops == three.computed_tokens * engine.flops_per_token


def test_a_full_factorial_experiment_through_the_engine_recovers_the_weights_of_the_facts(roomy: Engine) -> None:
    """64 candidates of one text, each with another combination of the worst and the best of six facts."""
    weights = [3.0, 2.0, 1.5, 1.0, 0.5, 0.25]
    facts = tuple(Fact(f"f{i}", f"x{i}", Linear(10, 20), missing=0.5, weight=w) for i, w in enumerate(weights))
    surface = Surface("factorial", facts=facts, reads=READS)
    combinations = list(itertools.product((5, 25), repeat=len(weights)))
    people = [
        Candidate(str(i), "Ten years of Rust.", {f"x{j}": x for j, x in enumerate(c)})
        for i, c in enumerate(combinations)
    ]
    scores = [r.score for r in ranked(roomy, surface, people).all_results]
    effects = [
        sum(s if c[j] == 25 else -s for c, s in zip(combinations, scores, strict=True)) / 32
        for j in range(len(weights))
    ]
    assert effects == sorted(effects, reverse=True), "Spearman 1.0: the weights were declared in falling order"
    assert effects == pytest.approx([w / sum(surface.weights) for w in weights])


def test_adapters_read_their_own_probes_and_each_is_in_the_record(
    make_engine: EngineFactory, adapter_dirs: dict[str, Path]
) -> None:
    engine = make_engine(kv_cache_bytes=16 * 2**20)
    for name in ("alpha", "beta"):
        engine.load_adapter(name, adapter_dirs[name])
    surface = Surface(
        "mixed", reads=(replace(READS[0], adapter="alpha"), replace(READS[1], adapter="beta"), READS[2]), redact=()
    )
    mixed = ranked(engine, surface, PEOPLE[:12])
    assert any("zero-shot" in w for w in mixed.warnings), "one read has no adapter"
    for place, name in ((0, "alpha"), (1, "beta")):
        alone = ranked(engine, Surface("one", reads=(READS[place],), redact=()), PEOPLE[:12], adapter=name)
        assert [r.ledger[0].logits for r in alone.all_results] == [r.ledger[place].logits for r in mixed.all_results]
        assert not any("zero-shot" in w for w in alone.warnings)
        assert alone.results[0].ledger[0].source == name
    assert [(a.name, a.path) for a in mixed.adapters] == [(n, str(adapter_dirs[n])) for n in ("alpha", "beta")]
    assert [a["digest"] for a in mixed.record["adapters"]] == [a.digest for a in mixed.adapters]
    with pytest.raises(UnknownAdapter, match="nobody"):
        ranked(engine, Surface("x", reads=(replace(READS[0], adapter="alpha"), replace(READS[1], adapter="nobody"))))


def test_facts_alone_need_no_model(engine: Engine) -> None:
    facts_only = Surface("facts", facts=EXAMPLE.facts)
    answer = ranked(engine, facts_only, job_facts={"budget": 60})
    assert answer.usage.computed_tokens == 0
    assert answer.warnings == ()
    assert len({r.score for r in answer.results}) > 10
    assert ranked(engine, EXAMPLE, []).results == ()


def test_ties_are_shown_and_a_cut_through_one_is_said(roomy: Engine) -> None:
    people = [Candidate(f"c{i}", "x", {"job_success": s}) for i, s in enumerate((95, 60, 94, 94.5, 70))]
    fact = Fact("success", "job_success", Linear(0, 100), missing=0.5)
    surface = Surface("s", facts=(fact,), resolution=0.02)
    answer = ranked(roomy, surface, people, top_n=2)
    assert [(r.place, r.tied_with) for r in answer.all_results] == [(1, 2), (5, 0), (1, 2), (1, 2), (4, 0)]
    assert {r.index for r in answer.results} < {0, 2, 3}
    assert answer.warnings == ("`top_n` 2 cuts a tie: 1 more are as good as the last one shown",)
    by_index = ranked(roomy, replace(surface, tie_order="index"), people)
    assert [r.index for r in by_index.results] == [0, 2, 3, 4, 1]
    orders = {tuple(r.index for r in roomy.rank(f"Job {i}", people, surface=surface).results[:3]) for i in range(40)}
    assert len(orders) == 6, "over many jobs a lot gives every order"


def test_reads_see_no_names_unless_redaction_is_off(roomy: Engine) -> None:
    text = "{} is a developer. Write to {}@example.com. She knows Rust."
    twins = [Candidate(n, text.format(n, n.split()[0]), {"name": n}) for n in ("Emily Walsh", "Lakisha Washington")]
    surface = Surface("s", reads=READS)
    on = ranked(roomy, surface, twins)
    assert len({r.score for r in on.all_results}) == 1
    for person, result in zip(twins, on.all_results, strict=True):
        gone = [(r.kind, person.text[r.start : r.end]) for r in result.redactions]
        assert [kind for kind, _ in gone] == ["name", "email", "pronoun"]
        assert gone[0][1] == person.id
    assert on.record["results"][0]["redactions"][0] == {"start": 0, "end": 11, "kind": "name"}
    off = ranked(roomy, surface.without_redaction(), twins)
    assert len({r.score for r in off.all_results}) == 2
    assert off.all_results[0].redactions == ()
    assert any("redaction is off" in w for w in off.warnings)


def test_a_calibration_beside_the_adapter_is_used_checked_and_recorded(
    make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine(kv_cache_bytes=16 * 2**20)
    ref = engine.load_adapter("a", make_tiny_adapter(tmp_path / "a", seed=5))
    read = replace(READS[0], adapter="a")
    plain = ranked(engine, Surface("s", reads=(read, READS[1])), PEOPLE[:20])
    logits = [r.ledger[0].logits for r in plain.all_results]
    calibration = fit(
        "isotonic", logits, [i % 3 == 0 for i in range(len(logits))], probe=read.question, labels=read.labels,
        base_digest=plain.stack.base_digest, adapter_digest=ref.digest.hex(),
    )  # fmt: skip
    with pytest.raises(SurfaceError, match="cannot be read"):
        ranked(engine, Surface("s", reads=(replace(read, calibration=True),)))
    save_calibration(calibration, tmp_path / "a")
    answer = ranked(engine, Surface("s", reads=(replace(read, calibration=True), READS[1])), PEOPLE[:20])
    for before, after in zip(plain.all_results, answer.all_results, strict=True):
        assert after.ledger[0].raw == before.ledger[0].value
        assert after.ledger[0].value == calibration(before.ledger[0].logits)
        assert (after.ledger[1].value, after.ledger[1].raw) == (before.ledger[1].value, before.ledger[1].raw)
    assert answer.surface["reads"][0]["calibration"] == calibration.to_dict()
    engine.load_adapter("a", make_tiny_adapter(tmp_path / "other", seed=6))
    save_calibration(calibration, tmp_path / "other")
    with pytest.raises(SurfaceError, match="was fitted for adapter_digest"):
        ranked(engine, Surface("s", reads=(replace(read, calibration=True),)))
    with pytest.raises(SurfaceError, match="no calibration for the probe"):
        ranked(engine, Surface("s", reads=(replace(READS[1], adapter="a", calibration=True),)))


def test_a_record_replays_bit_for_bit_and_notices_what_changed(make_engine: EngineFactory, tmp_path: Path) -> None:
    options = {"job_facts": {"budget": 60.0}}
    answer = ranked(make_engine(), EXAMPLE, PEOPLE[:15], top_n=3, **options)
    write_json(tmp_path / "r.json", answer.record)
    record = read_record(tmp_path / "r.json")
    people = [Candidate(**c) for c in record["candidates"]]
    other = make_engine(num_threads=1, max_num_batched_tokens=64, kv_cache_bytes=2 * 2**20)
    again = other.rank(record["query"], people, surface=record["options"]["surface"], **options)
    assert differences(record, again.record) == []
    dearer = other.rank(record["query"], people, surface=record["options"]["surface"], job_facts={"budget": 30})
    assert any("ledger" in line for line in differences(record, dearer.record))
    heavier = json.loads(json.dumps(record["options"]["surface"]))
    heavier["facts"][0]["weight"] = 2.5
    found = differences(record, other.rank(record["query"], people, surface=heavier, **options).record)
    assert any("surface_digest" in line for line in found)
    assert any("format" in line for line in differences(record, other.rank(JOB, people).record))


def test_the_asynchronous_face_gives_the_same_answer(tiny_dir: Path, engine: Engine) -> None:
    async def ask() -> Any:
        async with await AsyncEngine.create(tiny_dir, kv_cache_bytes=4 * 2**20, max_model_len=2048) as other:
            return await other.rank(JOB, PEOPLE[:6], surface=EXAMPLE)

    assert asyncio.run(ask()).results == ranked(engine, EXAMPLE, PEOPLE[:6]).results


def test_a_long_candidate_is_cut_before_the_probes(engine: Engine) -> None:
    people = [Candidate("long", "Rust and Linux. " * 2000), Candidate("short", "Rust and Linux.")]
    answer = ranked(engine, Surface("s", reads=READS), people)
    assert answer.all_results[0].truncated_tokens > 0
    assert answer.all_results[1].truncated_tokens == 0
    assert any("1 of 2 candidates were cut" in w for w in answer.warnings)
    limited = ranked(engine, Surface("s", reads=READS), people, max_tokens_per_candidate=4)
    assert limited.all_results[0].logits == limited.all_results[1].logits
    with pytest.raises(TooLarge, match="a path may hold"):
        engine.rank("Rust " * 4000, people, surface=Surface("s", reads=READS))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"labels": ("no", "yes")}, "`labels` is"),
        ({"job_facts": 3}, "`job_facts` is a `int`"),
        ({"job_facts": {"budget": "60"}}, "job fact `budget` is `60`"),
        ({"surface": {"name": "x"}}, "has 0 factors"),
        ({"surface": "no-such.toml"}, "cannot be read"),
        ({"surface": Surface("s", reads=(Read("r", "<|im_end|> yes?"),))}, "control token"),
        ({"surface": Surface("s", reads=(Read("r", labels=("yes", "absolutely not")),))}, "exactly one"),
        ({"surface": None, "job_facts": {}}, "without a surface"),
        ({"people": [Candidate("a", "x", {"job_success": "high"})]}, "fact `job_success` of candidate `a`"),
        ({"people": [Candidate("a", "x", {"job_success": 101})]}, "its domain is"),
    ],
)
def test_bad_arguments_are_typed_errors(engine: Engine, options: dict[str, Any], says: str) -> None:
    options = {"surface": EXAMPLE} | options
    with pytest.raises(InvalidRequest, match=says):
        engine.rank(JOB, options.pop("people", PEOPLE[:2]), **options)
