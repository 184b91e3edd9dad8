"""The decision log by itself: what goes in comes out, changes are found, what is forgotten is gone from every byte."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uma_engine.errors import EngineUnavailable, InvalidRequest
from uma_engine.tasks.decision_log import DecisionLog
from uma_engine.tasks.results import LogReceipt

SECRET = "Plötzlich Ölmühle 'quoted \"twice\"' \\ back — never seen elsewhere 7319"


def a_record(n: int = 3, job: str = "a job nobody else has", tag: str = "") -> dict:
    people = [
        {"id": f"person-{tag}{i}", "text": f"text of {tag}{i}\nwith {SECRET} {tag}{i}", "facts": {"years": i}}
        for i in range(n)
    ]
    return {
        "format": "uma-decision-record/1",
        "query": job,
        "candidates": people,
        "options": {"adapter": None, "top_n": 2},
        "stack": {"model": "m", "base_digest": "d"},
        "results": [
            {"id": p["id"], "score": (0.1 * i).hex(), "logits": [], "ledger": [{"name": "fact", "raw": i}]}
            for i, p in enumerate(people)
        ],
        "usage": {"computed_tokens": 3},
        "warnings": ["zero-shot"],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.log"


@pytest.fixture
def log(path: Path):
    log = DecisionLog(path)
    yield log
    log.close()


def test_a_record_comes_back_as_it_was(log):
    record = a_record()
    receipt = log.append(record)
    assert log.record(receipt.id) == record | {"forgotten": 0}
    assert log.verify([receipt]).ok
    assert log.verify().head == receipt


def test_the_log_outlives_its_process(path):
    receipts = []
    for round_ in range(3):
        log = DecisionLog(path)
        receipts.append(log.append(a_record(tag=str(round_))))
        log.close()
    log = DecisionLog(path, create=False)
    assert [e.sequence for e in log.entries()] == [1, 2, 3]
    assert log.verify(receipts).ok
    log.close()


def test_only_the_owner_reads_it(log, path):
    assert path.stat().st_mode & 0o077 == 0


def test_digests_instead_of_texts(path):
    log = DecisionLog(path, inputs="digest")
    receipt = log.append(a_record())
    record = log.record(receipt.id)
    assert set(record["query"]) == {"sha256"}
    assert all(set(c["text"]) == {"sha256"} for c in record["candidates"])
    log.close()
    assert SECRET.encode() not in path.read_bytes()


def _edit(path: Path, statement: str, *values) -> None:
    """As somebody with the file and a database program would."""
    db = sqlite3.connect(path)
    for name in ("entries_stay", "entries_remain", "contents_stay"):
        db.execute(f"DROP TRIGGER IF EXISTS {name}")
    db.execute(statement, values)
    db.commit()
    db.close()


EDITS = {
    "a score": "UPDATE contents SET body = replace(body, '0x1.99', '0x1.9a') WHERE sequence = 2 AND position = 1",
    "a text": "UPDATE contents SET body = replace(body, 'never', 'always') WHERE sequence = 2 AND position = 0",
    "the job": "UPDATE contents SET body = replace(body, 'nobody', 'somebody') WHERE sequence = 2 AND position = -1",
    "a content is deleted": "DELETE FROM contents WHERE sequence = 2 AND position = 2",
    "a content is added": "INSERT INTO contents VALUES (2, 9, 'x', x'00', '{}')",
    "contents change places": "UPDATE contents SET position = position + 10 WHERE sequence = 2 AND position >= 0",
    "a body": "UPDATE entries SET body = replace(body, 'zero-shot', 'tuned') WHERE sequence = 2",
    "a time": "UPDATE entries SET created_at = '2020' WHERE sequence = 2",
    "an id": "UPDATE entries SET id = 'another' WHERE sequence = 2",
    "a kind": "UPDATE entries SET kind = 'forget' WHERE sequence = 2",
    "an entry is deleted": "DELETE FROM entries WHERE sequence = 2",
    "the first entry is deleted": "DELETE FROM entries WHERE sequence = 1",
    "the entries change places": "UPDATE entries SET sequence = 5 - sequence WHERE sequence IN (2, 3)",
    "a link": "UPDATE entries SET chain = x'00' WHERE sequence = 2",
}


@pytest.mark.parametrize("edit", EDITS)
def test_tampering_is_found(path, edit):
    log = DecisionLog(path)
    receipts = [log.append(a_record(tag=str(i))) for i in range(4)]
    log.close()
    if edit == "the entries change places":
        _edit(path, "UPDATE entries SET sequence = 9 WHERE sequence = 2")
        _edit(path, "UPDATE entries SET sequence = 2 WHERE sequence = 3")
        _edit(path, "UPDATE entries SET sequence = 3 WHERE sequence = 9")
    else:
        _edit(path, EDITS[edit])
    log = DecisionLog(path, create=False)
    assert not log.verify().ok
    assert not log.verify(receipts).ok
    log.close()


def test_a_cut_tail_is_found_by_a_receipt(path):
    log = DecisionLog(path)
    receipts = [log.append(a_record(tag=str(i))) for i in range(3)]
    log.close()
    _edit(path, "DELETE FROM entries WHERE sequence = 3")
    _edit(path, "DELETE FROM contents WHERE sequence = 3")
    log = DecisionLog(path, create=False)
    assert log.verify(receipts[:2]).ok  # nothing in the file can tell
    assert not log.verify(receipts).ok
    log.close()


def test_the_connection_itself_changes_nothing(log):
    log.append(a_record())
    for statement in ("UPDATE entries SET kind = 'x'", "DELETE FROM entries", "UPDATE contents SET body = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            log._connection.execute(statement)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=4),
    number=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_text_comes_back(tmp_path_factory, texts, number):
    log = DecisionLog(tmp_path_factory.mktemp("log") / "log")
    record = a_record(len(texts))
    for person, text in zip(record["candidates"], texts, strict=True):
        person["text"] = text
    record["usage"] = {"flops": number}
    receipt = log.append(record)
    assert log.record(receipt.id) == record | {"forgotten": 0}
    assert log.verify().ok
    log.close()


def _all_bytes(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


def test_forgetting_leaves_no_byte_and_a_whole_chain(log, path):
    receipts = [log.append(a_record(tag=f"{i}-")) for i in range(3)]
    shared = a_record(tag="1-")
    receipts.append(log.append(shared))
    assert b"7319 1-1" in _all_bytes(path)
    done = log.forget("person-1-1")
    assert (done.contents, done.still_found) == (2, ())
    assert done.scanned_bytes >= path.stat().st_size
    data = _all_bytes(path)
    for needle in ("7319 1-1", "person-1-1"):
        assert needle.encode() not in data
        assert needle.encode("utf-16-le") not in data
    assert log.verify(receipts).ok
    record = log.record(receipts[1].id)
    assert record["forgotten"] == 1
    assert [c["id"] for c in record["candidates"]] == ["person-1-0", "person-1-2"]
    assert [r["id"] for r in record["results"]] == ["person-1-0", "person-1-2"]
    assert log.export("person-1-1") == []
    last = list(log.entries())[-1]
    assert last.kind == "forget"


def test_forgotten_content_that_comes_back_is_found(log, path):
    log.append(a_record())
    stolen = log._connection.execute("SELECT * FROM contents WHERE candidate = 'person-1'").fetchone()
    log.forget("person-1")
    _edit(path, "INSERT INTO contents VALUES (?, ?, ?, ?, ?)", *stolen)
    assert any("is there again" in problem for problem in log.verify().problems)


def test_forgetting_somebody_unknown_changes_nothing(log):
    receipt = log.append(a_record())
    assert log.forget("nobody at all").contents == 0
    assert log.verify().head == receipt


def test_forgetting_reaches_what_is_given_beside(log):
    class Index:
        def forget_candidate(self, candidate_id, texts):
            self.seen = candidate_id, texts
            return 2

    index = Index()
    log.append(a_record())
    assert log.forget("person-2", elsewhere=[index]).elsewhere == 2
    assert index.seen == ("person-2", [a_record()["candidates"][2]["text"]])


def test_a_reader_in_another_process_delays_forgetting_with_a_typed_error(log, path):
    log.append(a_record())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM contents").fetchone()
    log._connection.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(EngineUnavailable, match="may still hold"):
        log.forget("person-1")
    other.execute("ROLLBACK")
    other.close()
    assert log.forget("person-1").still_found == ()
    assert b"7319 1" not in _all_bytes(path)


def test_export_is_about_one_candidate_only(log):
    receipt = log.append(a_record())
    (decision,) = log.export("person-1")
    text = json.dumps(decision, ensure_ascii=False)
    assert decision["entry"] == receipt.id
    assert decision["candidate"]["facts"] == {"years": 1}
    assert decision["pool"] == 3
    assert "person-0" not in text
    assert "person-2" not in text


def test_threads_and_processes_share_one_chain(path):
    code = (
        "import sys; from uma_engine.tasks.decision_log import DecisionLog; from tests.unit.test_decision_log import a_record\n"
        "log = DecisionLog(sys.argv[1])\nfor i in range(20): log.append(a_record(tag=sys.argv[2] + str(i)))"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    log = DecisionLog(path)
    receipts: list[LogReceipt] = []
    threads = [
        threading.Thread(target=lambda: receipts.extend(log.append(a_record()) for _ in range(10))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.wait() for p in others] == [0, 0]
    found = log.verify(receipts)
    assert found.problems == ()
    assert found.entries == 70
    log.close()


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1, 0.2])
def test_a_kill_loses_no_receipt(path, delay):
    """Whoever got a receipt finds its entry, whenever the process died."""
    code = (
        "import sys, json; from dataclasses import astuple; from uma_engine.tasks.decision_log import DecisionLog\n"
        "from tests.unit.test_decision_log import a_record\nlog = DecisionLog(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True: print(json.dumps(astuple(log.append(a_record(8)))), flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(delay)
    os.kill(process.pid, signal.SIGKILL)
    lines = process.stdout.read().splitlines()
    process.wait()
    receipts = [LogReceipt(*json.loads(line)) for line in lines if line.endswith("]")]
    log = DecisionLog(path)
    found = log.verify(receipts)
    assert found.problems == ()
    assert len(receipts) <= found.entries <= len(receipts) + 1
    log.append(a_record())
    log.close()


def test_what_is_no_log_is_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("something else entirely, longer than a header of a database would be" * 20)
    other = tmp_path / "other.db"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE t (x)")
    db.commit()
    db.close()
    for path in (text, other, tmp_path, tmp_path / "no" / "such" / "directory"):
        with pytest.raises(InvalidRequest, match="decision log"):
            DecisionLog(path)
    with pytest.raises(InvalidRequest, match="does not exist"):
        DecisionLog(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_a_log_that_cannot_be_written_says_so(log):
    log._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(EngineUnavailable, match="cannot be written"):
        log.append(a_record())
    log._connection.execute("PRAGMA query_only = OFF")
    assert log.verify().entries == 0


def test_unknown_entries_are_refused(log):
    with pytest.raises(InvalidRequest, match="no entry"):
        log.record("nothing")
    log.append(a_record())
    log.forget("person-0")
    (_, forget) = log.entries()
    with pytest.raises(InvalidRequest, match="not a decision"):
        log.record(forget.id)
