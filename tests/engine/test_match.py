"""Match: the language model's answer about those whom the index found, with what was cut and what both stages cost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.engine.conftest import SMALL
from tests.retrieval.test_index import people
from uma_engine import AsyncEngine, Engine
from uma_engine.cli.main import main
from uma_engine.errors import InvalidRequest
from uma_engine.retrieval import CandidateIndex

pytest.importorskip("bm25s")
JOB = "rust linux kernel"


@pytest.fixture(scope="module")
def pool_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "index"
    with CandidateIndex(path) as index:
        index.add(people(80))
        index.commit()
    return path


def test_the_model_ranks_who_was_found(engine: Engine, pool_dir: Path) -> None:
    with CandidateIndex.open(pool_dir) as index:
        found = index.search(JOB, 12, where={"rate": {"<=": 70}})
        answer = engine.match(JOB, index, 5, first=12, where={"rate": {"<=": 70}})
    plain = engine.rank(JOB, [h.candidate for h in found.hits], top_n=5)
    assert [r.id for r in answer.results] == [r.id for r in plain.results]
    assert [r.logits for r in answer.ranking.all_results] == [r.logits for r in plain.all_results]
    assert answer.cut == found.cut
    assert dict(answer.hits) == {h.candidate.id: h for h in found.hits}
    assert [s.name for s in answer.usage.stages] == ["first stage", "tokenize", "score"]
    assert answer.ranking.record["cut"]["filtered"] == found.cut.filtered > 0
    assert any("never measured" in w for w in answer.warnings)
    data = json.loads(json.dumps(answer.to_dict()))
    assert data["cut"]["first"] == 12
    assert len(data["first_stage"]) == len(found.hits)
    with pytest.raises(InvalidRequest, match="cannot be searched"):
        engine.match(JOB, people(3))  # type: ignore[arg-type]


def test_an_event_loop_has_the_same_answer(tiny_dir: Path, engine: Engine, pool_dir: Path) -> None:
    async def ask() -> list[tuple[str, float]]:
        async with AsyncEngine(tiny_dir, **SMALL) as other:
            with CandidateIndex.open(pool_dir) as index:
                return [(r.id, r.score) for r in await other.match(JOB, index, first=9)]

    with CandidateIndex.open(pool_dir) as index:
        assert asyncio.run(ask()) == [(r.id, r.score) for r in engine.match(JOB, index, first=9)]


def test_nobody_passes_the_filters(engine: Engine, pool_dir: Path) -> None:
    with CandidateIndex.open(pool_dir) as index:
        answer = engine.match(JOB, index, where={"rate": {">": 1000}})
    assert answer.results == ()
    assert answer.cut.considered == 0


def test_the_commands(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"id": p.id, "text": p.text, "facts": dict(p.facts)} for p in people(40)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "job.md").write_text(JOB)
    index, file = str(tmp_path / "index"), str(tmp_path / "people.jsonl")
    assert main(["index", "add", index, file]) == 2
    assert main(["index", "build", index, file, "--words-only"]) == 0
    assert main(["index", "build", index, file, "--words-only"]) == 2
    assert main(["index", "add", index, file, "--words-only"]) == 0
    assert "0 added, 0 changed, 40 in all; version 2" in capsys.readouterr().out
    match = ["match", str(tmp_path / "job.md"), index, "--model", str(tiny_dir), "--first", "9", "--json"]
    assert main([*match, "--where", "rate<=70", "--where", "country=DE|AT", "--where", "remote=true"]) == 0
    data = json.loads(capsys.readouterr().out)
    facts = {p.id: p.facts for p in people(40)}
    assert data["results"]
    for result in data["results"]:
        of_one = facts[result["id"]]
        assert of_one["rate"] <= 70
        assert of_one["country"] in ("DE", "AT")
        assert of_one["remote"]
    assert main(match[:-1]) == 0
    shown = capsys.readouterr().out
    assert "40 considered, 0 filtered out, 9 ranked; recall of the cut: not measured" in shown
    assert main([*match, "--where", "rate"]) == 2
    assert main(["index", "delete", index, "c1", "nobody"]) == 1
    assert main(["index", "info", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"] == 39
