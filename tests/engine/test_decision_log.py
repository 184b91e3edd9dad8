"""An engine with a decision log: every answer is in it, replays from it, and people are forgotten in it and in every cache."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uma_engine import AsyncEngine, Candidate, Engine
from uma_engine.cli.main import main
from uma_engine.decision_log import FORGOTTEN, DecisionLog
from uma_engine.errors import EngineUnavailable, InvalidRequest
from uma_engine.ranking.factors import Fact, Linear
from uma_engine.ranking.surface import Read, Surface
from uma_engine.retrieval.vector_cache import VectorCache

JOB = "We need a Rust engineer who knows databases."
PLANTED = "planted-4711-zürich: ten years of Rust, and databases since 2009"
PEOPLE = [
    Candidate("ana-id-7f3a91", PLANTED, {"success": 91, "name": "Anastasia Planted"}),
    Candidate("bo-id-113", "A careful nurse in a hospital", {"success": 70}),
    Candidate("cy-id-900", "Python and Linux, some Rust", {"success": None}),
]
SURFACE = Surface(
    "logged",
    facts=(Fact("success", "success", Linear(60, 100), missing=0.5),),
    reads=(
        Read("skills", "Answer {labels}: do the skills match?"),
        Read("years", "Answer {labels}: are the years enough?"),
    ),
    resolution=0.2,
)
MakeEngine = Callable[..., Engine]


def test_every_answer_is_in_the_log_with_its_id_and_other_calls_are_not(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    answers = [
        engine.rank(JOB, PEOPLE),
        engine.rank(JOB, PEOPLE, surface=SURFACE, tenant="north"),
        engine.rank(JOB, []),
    ]
    engine.score(JOB, ["a", "b"])
    engine.audit.counterfactual(JOB, PEOPLE, surface=SURFACE, top_k=1)
    engine.audit.paraphrase(JOB + " Remote.\n\n- Rust\n- Linux", PEOPLE, 2, top_k=1)
    engine.calibrate(SURFACE, "skills", [(JOB, p, i == 0) for i, p in enumerate(PEOPLE * 20)])
    log = engine.decision_log
    assert log is not None
    assert len(log) == 3
    for number, answer in enumerate(answers, 1):
        assert answer.logged is not None
        assert answer.logged.id == number
        entry = log.get(number)
        assert entry.record == json.loads(json.dumps(answer.record))
        assert entry.digest == answer.logged.digest
        assert answer.to_dict()["logged"] == {"id": number, "digest": entry.digest}
        assert log.verify(answer.logged.head).ok
    assert [log.get(i).tenant for i in (1, 2, 3)] == ["", "north", ""]
    plain = make_engine().rank(JOB, PEOPLE)
    assert plain.logged is None
    assert "logged" not in plain.to_dict()
    assert [r.score for r in plain.all_results] == [r.score for r in answers[0].all_results]


def test_what_cannot_be_kept_is_not_answered(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    assert engine.decision_log is not None
    engine.decision_log._connection().execute("PRAGMA query_only = ON")
    with pytest.raises(EngineUnavailable, match=r"log.uma` cannot be written"):
        engine.rank(JOB, PEOPLE)
    engine.decision_log._connection().execute("PRAGMA query_only = OFF")
    logged = engine.rank(JOB, PEOPLE).logged
    assert logged is not None
    assert logged.id == 1


def test_two_engines_do_not_share_a_log_and_a_failed_start_lets_go_of_it(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "log.uma"
    with pytest.raises(Exception, match="no-such-model"):
        Engine("no-such-model", decision_log=path)
    engine = make_engine(decision_log=path)
    with pytest.raises(EngineUnavailable, match="being written by process"):
        make_engine(decision_log=str(path))
    engine.close()
    closed = engine.decision_log
    assert closed is not None
    with pytest.raises(EngineUnavailable, match="closed"):
        closed.verify()
    again = make_engine(decision_log=path).decision_log
    assert again is not None
    assert len(again) == 0
    for name, value in (("decision_log", 3), ("decision_log", ""), ("decision_log_content", "half")):
        with pytest.raises(InvalidRequest, match=name):
            Engine("never-opened", **{name: value})


def test_many_threads_and_both_faces_log_each_answer_once(
    make_engine: MakeEngine, tiny_dir: Path, tmp_path: Path
) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    ids: list[int] = []

    def work(number: int) -> None:
        for i in range(5):
            logged = engine.rank(f"{JOB} {number} {i}", PEOPLE[: 1 + i % 3]).logged
            assert logged is not None
            ids.append(logged.id)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == list(range(1, 21))
    assert engine.decision_log is not None
    assert engine.decision_log.verify().ok

    async def both() -> None:
        options = {"kv_cache_bytes": 4 * 2**20, "max_num_batched_tokens": 256, "decision_log": tmp_path / "second.uma"}
        async with await AsyncEngine.create(tiny_dir, **options) as aengine:
            answers = await asyncio.gather(*(aengine.rank(f"{JOB} {i}", PEOPLE) for i in range(6)))
            assert sorted(a.logged.id for a in answers if a.logged) == [1, 2, 3, 4, 5, 6]
            gone = await aengine.forget(PEOPLE[0].id)
            assert (len(gone.records), gone.clean) == (6, True)
            assert aengine.decision_log is not None
            assert aengine.decision_log.verify().ok

    asyncio.run(both())
    assert PLANTED.encode() not in (tmp_path / "second.uma").read_bytes()


# ---- replay ----


def test_a_log_replays_bit_for_bit_one_or_all_and_after_forgetting_the_rest(
    make_engine: MakeEngine, adapter_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "log.uma")
    engine = make_engine(decision_log=path)
    engine.load_adapter("alpha", adapter_dirs["alpha"])
    engine.rank(JOB, PEOPLE)
    engine.rank(JOB, PEOPLE, adapter="alpha", top_n=1)
    engine.rank(JOB, PEOPLE, surface=SURFACE, adapter="alpha")
    engine.rank(JOB, PEOPLE[:1])
    assert main(["replay", path, "2"]) == 0, "beside the engine that writes it"
    assert capsys.readouterr().out == "identical: 3 candidates, every logit and score bit for bit\n"
    assert main(["replay", path, "--all"]) == 0
    assert capsys.readouterr().out.endswith("4 of 4 records are identical\n")
    engine.forget(PEOPLE[0].id)
    assert main(["replay", path, "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("identical: 2 candidates, every logit and score bit for bit; 1 were forgotten since") == 3
    assert "identical: 0 candidates" in out
    for wrong, says in (
        (["replay", path], "a log of many records"),
        (["replay", path, "2", "--all"], "a log of many records"),
        (["replay", path, "9"], "no entry 9"),
        (["replay", path, "5"], "is of kind `forget` and no ranking"),
        (["replay", str(adapter_dirs["alpha"] / "adapter_config.json"), "3"], "is not a decision log"),
    ):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def test_a_replay_sees_another_base(
    make_engine: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import make_tiny_model

    engine = make_engine(decision_log=tmp_path / "log.uma")
    engine.rank(JOB, PEOPLE)
    other = make_tiny_model(tmp_path / "other", seed=9)
    assert main(["replay", str(tmp_path / "log.uma"), "--all", "--model", str(other)]) == 1
    out = capsys.readouterr().out
    assert "base_digest" in out
    assert "0 of 1 records are identical" in out


def test_a_log_of_digests_replays_with_the_files_that_were_ranked(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.md").write_text(JOB + "\n")
    (tmp_path / "people.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "text": p.text, **p.facts}) + "\n" for p in PEOPLE)
    )
    files = [str(tmp_path / "job.md"), str(tmp_path / "people.jsonl")]
    log = str(tmp_path / "log.uma")
    logged = ["--log", log, "--log-content", "digest", "--model", str(tiny_dir)]
    surface = tmp_path / "s.toml"
    surface.write_text('name = "s"\n[[facts]]\nname = "success"\nfield = "success"\ncurve = {worst = 60, best = 100}\n'
                       'missing = 0.5\n[[reads]]\nname = "fit"\n')  # fmt: skip
    assert main(["rank", *files, *logged]) == 0
    assert "record 1 of the decision log, head 1:" in " ".join(capsys.readouterr().out.split())
    assert main(["rank", *files, *logged, "--surface", str(surface)]) == 0
    for text in (PLANTED, "careful nurse", "Rust engineer", "Anastasia"):
        assert text.encode() not in Path(log).read_bytes()
    capsys.readouterr()
    assert main(["replay", log, "--all", "--job", files[0], "--candidates", files[1]]) == 0
    assert "2 of 2 records are identical" in capsys.readouterr().out
    assert main(["replay", log, "1"]) == 2
    assert "give what was ranked with `--job` and `--candidates`" in capsys.readouterr().err
    (tmp_path / "people.jsonl").write_text((tmp_path / "people.jsonl").read_text().replace("nurse", "nurser"))
    assert main(["replay", log, "1", "--job", files[0], "--candidates", files[1]]) == 2
    assert "`bo-id-113` is not as recorded" in capsys.readouterr().err


# ---- the command ----


def test_the_command_lists_shows_verifies_exports_and_forgets(
    make_engine: MakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "log.uma")
    engine = make_engine(decision_log=path)
    heads = [engine.rank(JOB, PEOPLE).logged, engine.rank("# Nurses\n\nNights.", PEOPLE[1:], tenant="north").logged]

    def out(*args: str, status: int = 0) -> str:
        assert main(["record", *args]) == status
        return capsys.readouterr().out

    lines = out("list", path).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert lines[1].endswith("rank    2 candidates                  Nurses")
    assert [json.loads(line)["tenant"] for line in out("list", path, "--json").splitlines()] == ["", "north"]
    assert json.loads(out("show", path, "2"))["query"] == "# Nurses\n\nNights."
    assert heads[1] is not None
    assert f"head {heads[1].head}" in out("verify", path)
    assert json.loads(out("verify", path, "--json", "--expect", heads[1].head))["ok"]
    export = json.loads(out("export", path, "--candidate", PEOPLE[0].id))
    assert export["records"][0]["about"][0] == {"id": PEOPLE[0].id, "text": PLANTED, "facts": dict(PEOPLE[0].facts)}
    assert "nurse" not in json.dumps(export)
    assert main(["record", "forget", path, "--candidate", PEOPLE[0].id]) == 1
    assert "ask that one (`engine.forget`)" in capsys.readouterr().err
    engine.close()
    assert "none is there" in out("forget", path, "--candidate", PEOPLE[0].id)
    assert "the log holds nothing about them" in out("forget", path, "--candidate", PEOPLE[0].id)
    assert main(["record", "forget", path, "--candidate", PEOPLE[1].id]) == 2
    assert "known in 2 tenants" in capsys.readouterr().err
    assert json.loads(out("forget", path, "--candidate", PEOPLE[1].id, "--tenant", "north", "--json"))["records"] == [2]
    assert "whole: 4 entries about 5 candidates, 2 of them forgotten" in out("verify", path)
    assert json.loads(out("show", path, "1"))["results"][0] == {"id": FORGOTTEN}
    raw = Path(path).read_bytes()
    place = raw.index(b"some Rust")
    Path(path).write_bytes(raw[:place] + b"some Java" + raw[place + 9 :])
    assert ": candidate at place " in out("verify", path, status=1)
    assert not json.loads(out("verify", path, "--json", status=1))["ok"]


# ---- forgetting beyond the log ----


class Index:
    """What any index does: knows candidates by id."""

    def __init__(self, people: Sequence[Candidate]) -> None:
        self.people = {p.id: p.text for p in people}

    def delete(self, candidate_id: str) -> bool:
        return self.people.pop(candidate_id, None) is not None


class Vectors:
    """An embedder's cache without the embedder: a real `VectorCache`, keyed as `Embedder` does."""

    def __init__(self, path: Path, texts: Sequence[str]) -> None:
        self.cache = VectorCache(path, 4)
        self.cache.put({self.key(text): (np.full(4, 0.7215, np.float32), 0) for text in texts})

    @staticmethod
    def key(text: str) -> bytes:
        import hashlib

        return hashlib.sha256(text.encode()).digest()

    def forget(self, texts: Sequence[str]) -> int:
        return self.cache.forget([self.key(text) for text in texts])


def test_forgetting_reaches_indexes_vectors_and_the_kv_cache(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    first = engine.rank(JOB, PEOPLE, surface=SURFACE)  # two probes: the candidates' own text gets blocks
    again = engine.rank(JOB, PEOPLE, surface=SURFACE)
    assert again.usage.cached_tokens > first.usage.cached_tokens
    stack: Any = engine._stack
    kv = stack.runner._kv
    written = sorted(stack.block_pool._written)  # other memory is as it came, and nobody's
    size = engine.config.block_size

    def held() -> list[int]:  # numbers that are not zero, uninitialised ones included
        return [int((t.view(-1, size, *t.shape[1:])[written] != 0).sum()) for t in (*kv.k, *kv.v)]

    assert written
    assert all(total > 0 for total in held())
    index = Index(PEOPLE)
    vectors = Vectors(tmp_path / "vectors.sqlite", [p.text for p in PEOPLE])
    gone = engine.forget(PEOPLE[0].id, also=[index, vectors])
    assert dict(gone.stores) == {"Index": 1, "Vectors": 1, "KV cache": gone.stores["KV cache"]}
    assert gone.stores["KV cache"] > 0
    assert held() == [0] * len(held()), "no key or value of anybody is left"
    assert list(index.people) == [p.id for p in PEOPLE[1:]]
    assert vectors.cache.get([vectors.key(PLANTED)]) == {}
    assert len(vectors.cache.get([vectors.key(p.text) for p in PEOPLE])) == 2
    vectors.cache.close()
    for file in tmp_path.iterdir():
        assert vectors.key(PLANTED) not in file.read_bytes()
        assert PLANTED.encode() not in file.read_bytes()
    after = engine.rank(JOB, PEOPLE[1:], surface=SURFACE)
    assert after.usage.cached_tokens == 0
    assert [r.score for r in after.all_results] == [r.score for r in first.all_results[1:]], (
        "the same bits, computed anew"
    )


def test_forgetting_without_a_log_and_with_what_cannot_forget(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.rank(JOB, PEOPLE)
    index = Index(PEOPLE)
    gone = engine.forget("bo-id-113", texts=["A careful nurse in a hospital"], also=[index])
    assert gone.entry is None
    assert gone.stores["Index"] == 1
    assert engine.forget("bo-id-113", also=[index]).stores["Index"] == 0
    with pytest.raises(InvalidRequest, match="`also` holds a `dict`, which has neither"):
        engine.forget("bo-id-113", also=[{}])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="`candidate_id` is"):
        engine.forget("")
    with pytest.raises(InvalidRequest, match="`texts` must be a list"):
        engine.forget("x", texts="y")
    engine.close()
    with pytest.raises(EngineUnavailable):
        engine.forget("x")


def test_forgetting_while_others_rank_disturbs_nobody(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    expected = [r.score for r in engine.rank(JOB, PEOPLE[1:], surface=SURFACE).all_results]
    wrong: list[Any] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            found = [r.score for r in engine.rank(JOB, PEOPLE[1:], surface=SURFACE).all_results]
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(6):
        person = Candidate(f"somebody-{i}-4711", f"{PLANTED} {i}", {})
        engine.rank(JOB, [person])
        assert engine.forget(person.id).clean or i
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert engine.decision_log is not None
    assert engine.decision_log.verify().ok


def test_after_a_kill_in_mid_service_every_answer_given_is_in_the_log(tiny_dir: Path, tmp_path: Path) -> None:
    code = """
import sys
from uma_engine import Candidate, Engine
with Engine(sys.argv[1], kv_cache_bytes=4 * 2**20, decision_log=sys.argv[2]) as engine:
    for i in range(10**6):
        answer = engine.rank(f"Job {i}", [Candidate("a", "Rust"), Candidate("b", "Nursing")])
        print(answer.logged.head, flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_dir), str(tmp_path / "log.uma")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    heads = [child.stdout.readline().strip() for _ in range(5)]
    child.send_signal(signal.SIGKILL)
    heads += [line.strip() for line in child.stdout.readlines() if line.endswith("\n")]
    child.wait()
    with DecisionLog(tmp_path / "log.uma") as log:
        assert len(heads) <= len(log) <= len(heads) + 1
        for head in heads:
            assert log.verify(head).ok
    assert main(["replay", str(tmp_path / "log.uma"), str(len(heads))]) == 0
