"""The decision log without an engine: what is kept, what is gone after forgetting, kills and second writers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from decision_log_files import ANA, PLANTED, edit, problems, record
from hypothesis import given
from hypothesis import strategies as st

from uma_engine.decision_log import FORGOTTEN, DecisionLog
from uma_engine.decision_log.inputs import as_digests, needs_inputs, with_inputs
from uma_engine.decision_log.parts import join, split
from uma_engine.decision_log.scan import patterns_of, scan
from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest


@pytest.fixture
def log(tmp_path: Path) -> Iterator[DecisionLog]:
    with DecisionLog(tmp_path / "log.uma") as log:
        yield log


# ---- what is kept ----


def test_what_was_appended_comes_back_with_its_id_and_a_chain_that_verifies(log: DecisionLog) -> None:
    records = [record(ANA, "bo"), record("bo", query="ünïcödé 東京"), record()]
    heads = [log.append(r) for r in records]
    assert [h.id for h in heads] == [1, 2, 3]
    assert [log.get(i).record for i in (1, 2, 3)] == records
    found = log.verify()
    assert (found.ok, found.entries, found.candidates, found.forgotten) == (True, 3, 3, 0)
    assert found.head == heads[-1].head
    for head in heads:
        assert log.verify(head.head).ok
    with pytest.raises(InvalidRequest, match="no entry 4 but 1 to 3"):
        log.get(4)


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
plain = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(min_size=1), inner, max_size=3)),
)


@given(
    ids=st.lists(st.text(min_size=1), unique=True, max_size=4),
    extra=st.dictionaries(st.sampled_from(["cut", "notes", "words"]), plain),
    data=st.data(),
)
def test_a_record_taken_apart_and_joined_is_the_record(
    ids: list[str], extra: dict[str, Any], data: st.DataObject
) -> None:
    """With ids all over the place: as strings, as keys, in objects."""
    whole = record(*ids) | extra
    if ids:
        some = data.draw(st.lists(st.sampled_from(ids), max_size=4))
        whole |= {
            "names": some,
            "by": {name: {"id": name, "note": [name]} for name in some},
            "mixed": {"who": some[:1]},
        }
    body, parts = split(whole)
    body = json.loads(json.dumps(body))
    assert join(body, dict(enumerate(parts))) == whole
    assert [p["id"] for p in parts] == ids


def test_without_its_part_nothing_of_a_candidate_is_left_and_others_stay(log: DecisionLog) -> None:
    whole = record(ANA, "bo", cut={"left": ["bo", ANA], "by": {ANA: "a note on ana", "bo": 3}})
    body, parts = split(whole)
    assert "ana" not in json.dumps(body)
    left = join(body, {1: parts[1]})
    assert left["candidates"] == [{"id": FORGOTTEN}, whole["candidates"][1]]
    assert left["results"] == [{"id": FORGOTTEN}, whole["results"][1]]
    assert left["cut"] == {"left": ["bo", FORGOTTEN], "by": {FORGOTTEN: {"id": FORGOTTEN}, "bo": 3}}
    assert left["options"] == whole["options"], "what was asked of everybody may look like an id"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"query": "q"}, "`candidates` is not a list"),
        ({"candidates": [{"id": "a"}, {"id": "a"}]}, "have one id"),
        ({"candidates": [{"id": 3}]}, "`candidates` is not a list"),
        ({"candidates": [], "cut": {"$part": 1}}, "has a key among"),
        ({"candidates": [{"id": "a", "facts": {"x": object()}}]}, "not plain JSON data"),
        ({"candidates": [], "cut": float("nan")}, "not plain JSON data"),
    ],
)
def test_what_is_no_record_is_refused_and_nothing_is_kept(log: DecisionLog, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        log.append(bad)
    assert len(log) == 0
    assert log.verify().ok


def test_a_full_disk_keeps_the_log_whole(tmp_path: Path) -> None:
    with DecisionLog(tmp_path / "log.uma") as log:
        log.append(record("bo"))
        log._connection().execute("PRAGMA max_page_count = 20")
        with pytest.raises(EngineUnavailable, match="full"):
            log.append(record(*(f"person-{i}" for i in range(2000))))
        log._connection().execute("PRAGMA max_page_count = 100000")
        assert log.append(record("cy")).id == 2
        assert log.verify().ok


# ---- inputs by digest ----


def test_with_content_by_digest_no_word_is_in_any_file_and_who_has_the_words_puts_them_back(tmp_path: Path) -> None:
    whole = record(ANA, "bo")
    with DecisionLog(tmp_path / "log.uma", content="digest") as log:
        log.append(whole)
        kept = log.get(1).record
        assert needs_inputs(kept)
        assert not needs_inputs(whole)
        assert needs_inputs(as_digests(record()))
        for text in (PLANTED, "Rust engineer", "bo Q.", "the text of bo"):
            assert not any(text.encode() in f.read_bytes() for f in tmp_path.iterdir())
        people = list(reversed(whole["candidates"]))
        assert with_inputs(kept, whole["query"] + "\n", people) == whole
        assert log.texts_of(ANA) == []
        with pytest.raises(InvalidRequest, match="the job is not the one"):
            with_inputs(kept, "another", people)
        with pytest.raises(InvalidRequest, match="`bo` is not as recorded"):
            with_inputs(kept, whole["query"], [people[1], people[0] | {"text": "another"}])
        with pytest.raises(InvalidRequest, match="`bo` was recorded but is not given"):
            with_inputs(kept, whole["query"], people[1:])
        log.append(whole)
        assert log.get(2).record["query"] != kept["query"], "each digest has a salt of its own"
        log.forget("bo")
        assert with_inputs(log.get(1).record, whole["query"], people[1:])["candidates"][1] == {"id": FORGOTTEN}


# ---- one person: export and forget ----


def test_an_export_has_everything_about_one_candidate_and_nothing_about_another(log: DecisionLog) -> None:
    log.append(
        record("bo", ANA, "cy", words=[{"id": ANA, "note": "knows Rust"}, {"id": "bo", "note": "no Rust, bo-secret"}])
    )
    log.append(record("cy"))
    log.append(record(ANA, query="Another job"))
    found = log.export(ANA)
    assert [r["record"] for r in found["records"]] == [1, 3]
    first = found["records"][0]
    assert [item.get("text", item.get("note", item.get("score"))) for item in first["about"]] == [
        PLANTED * 30,
        (0.9 - 1 / 16).hex(),
        "knows Rust",
    ]
    assert (first["place"], first["candidates"], first["asked"]["query"]) == (2, 3, "We need a Rust engineer")
    text = json.dumps(found)
    for other in ("bo Q.", "cy Q.", "bo-secret", "the text of"):
        assert other not in text
    content = json.dumps({"id": ANA, "items": first["about"]}, ensure_ascii=False, separators=(",", ":")).encode()
    assert hashlib.sha256(bytes.fromhex(first["salt"]) + content).hexdigest() == first["commitment"], (
        "anyone can check it"
    )
    log.forget("cy")
    again = log.export(ANA)["records"][0]
    assert again["place"] is None, "a place among people of whom one is unknown now"
    assert log.export("cy")["forgotten"][0]["records"] == [1, 2]
    with pytest.raises(InvalidRequest, match="holds nothing about `nobody`"):
        log.export("nobody")


def everywhere(folder: Path, text: str) -> list[str]:
    """Files that hold a text in some form, looked for apart from the log's own scan."""
    forms = {
        "utf-8": text.encode(),
        "utf-16-le": text.encode("utf-16-le"),
        "utf-16-be": text.encode("utf-16-be"),
        "utf-32": text.encode("utf-32-le"),
        "json": json.dumps(text)[1:-1].encode(),
        "base64": base64.b64encode(text.encode())[:-4],
        "hex": text.encode().hex().encode(),
    }
    return [
        f"{f.name}: {form}"
        for f in folder.rglob("*")
        if f.is_file()
        for form, raw in forms.items()
        if raw in f.read_bytes()
    ]


def test_after_forgetting_no_byte_of_them_is_in_any_file_and_the_chain_is_whole(tmp_path: Path) -> None:
    """Records large and small, so that their bytes were in leaf pages, overflow pages and pages freed in between."""
    with DecisionLog(tmp_path / "log.uma") as log:
        for round in range(12):
            others = [f"other-{round}-{i}" for i in range(round * 5)]
            log.append(
                record(*others[::2], ANA, *others[1::2], words=[{"id": ANA, "note": f"{PLANTED}, wrote a model"}])
            )
            if round % 4 == 3:
                log.forget(f"other-{round}-1")
        head = log.verify().head
        assert everywhere(tmp_path, PLANTED)
        assert everywhere(tmp_path, ANA)
        gone = log.forget(ANA)
        assert (len(gone.records), gone.found_elsewhere, gone.clean) == (12, (), True)
        assert gone.scanned_bytes >= log.path.stat().st_size
        for text in (PLANTED, PLANTED[:12], "wrote a model", ANA, f"{ANA} Q."):
            assert everywhere(tmp_path, text) == [], "while the log is open"
        found = log.verify(head)
        assert (found.ok, found.forgotten) == (True, 15)
        assert all(entry.record["candidates"] for entry in log.entries("rank") if entry.id != 1)
        assert gone.entry is not None
        said = log.get(gone.entry.id)
        assert (said.kind, said.record["who"], len(said.record["parts"])) == ("forget", gone.who, 12)
        assert said.at.startswith(time.strftime("%Y-%m", time.gmtime()))
        assert log.export(ANA)["forgotten"] == [{"entry": gone.entry.id, "at": said.at, "records": list(gone.records)}]
        assert log.forget(ANA).entry is None, "nothing is left to forget"
        assert log.append(record(ANA)).id == gone.entry.id + 1, "who comes back is known again"
        assert log.forget(ANA).records == (gone.entry.id + 1,)
    assert everywhere(tmp_path, ANA) == []
    assert problems(tmp_path / "log.uma", head) == []


def test_who_was_only_named_is_forgotten_too(tmp_path: Path) -> None:
    with DecisionLog(tmp_path / "log.uma") as log:
        given = record("bo", left_out=[ANA, "cy"], not_looked_at=["dee"])
        kept = log.append(given)
        assert log.get(kept.id).record == given
        assert log.get(kept.id).num_candidates == 4
        assert log.export(ANA)["records"][0]["place"] is None
        done = log.forget(ANA)
        assert (done.records, done.clean) == ((kept.id,), True)
        assert log.get(kept.id).record["left_out"] == [FORGOTTEN, "cy"]
        assert log.verify().ok
        assert not any(ANA.encode() in file.read_bytes() for file in log.files if file.is_file())


def test_words_that_are_others_too_are_named_and_stay(log: DecisionLog) -> None:
    both = record(ANA, "bo")
    both["candidates"][1]["text"] = both["candidates"][0]["text"]
    log.append(both)
    log.append(record("cy", query=f"Who wrote this: {PLANTED * 30}"))
    gone = log.forget(ANA)
    assert not gone.clean
    assert gone.found_elsewhere == ("record 1, candidate at place 1", "entry 2, what was asked of everybody")
    assert log.export("bo")["records"][0]["about"][0]["text"] == PLANTED * 30


def test_bytes_that_stay_in_a_file_are_an_error(log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebuild that does not happen, over pages that are not overwritten: the scan sees it."""
    log.append(record(ANA, *(f"other-{i}" for i in range(30))))
    log._connection().execute("PRAGMA secure_delete = OFF")
    with monkeypatch.context() as patch:
        patch.setattr(DecisionLog, "_scrub", lambda self: None)
        with pytest.raises(EngineUnavailable, match="still holds bytes of who was to be forgotten"):
            log.forget(ANA)
    assert log.verify().problems == ("forgetting was interrupted: open the log for writing to finish it",)
    assert everywhere(log.path.parent, PLANTED)
    path = log.path
    log.close()
    with DecisionLog(path) as again:  # finishes it
        assert again.verify().ok
    assert everywhere(path.parent, PLANTED) == []


def test_one_id_in_two_tenants_is_two_people(log: DecisionLog) -> None:
    log.append(record("bo", ANA), tenant="north")
    log.append(record("bo"), tenant="south")
    for call in (log.export, log.forget, log.texts_of):
        with pytest.raises(InvalidRequest, match="`bo` is known in 2 tenants: `north`, `south`"):
            call("bo")
    assert log.export(ANA)["tenant"] == "north"
    assert log.forget("bo", tenant="north").records == (1,)
    assert [r["record"] for r in log.export("bo", tenant="south")["records"]] == [2]
    assert log.verify().ok


def test_the_scan_finds_every_form_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uma_engine.decision_log.scan.CHUNK", 64)
    patterns = patterns_of([PLANTED, "short"])
    for form in ("utf-8", "utf-16-le", "utf-16-be"):
        for offset in range(0, 80, 7):
            (tmp_path / "f").write_bytes(b"." * offset + PLANTED.encode(form) + b"." * 9)
            total, found = scan([tmp_path / "f", tmp_path / "absent"], patterns)
            assert total == (tmp_path / "f").stat().st_size
            assert found, (form, offset)
    (tmp_path / "f").write_bytes(json.dumps({"x": PLANTED}).encode())
    assert scan([tmp_path / "f"], patterns)[1]
    (tmp_path / "f").write_bytes(base64.b64encode(PLANTED.encode()))
    assert scan([tmp_path / "f"], patterns)[1]
    (tmp_path / "f").write_bytes(b"short " * 100)
    assert not scan([tmp_path / "f"], patterns)[1]


# ---- processes ----


def run(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


APPENDS = """
import sys
from uma_engine.decision_log import DecisionLog
from tests.unit.decision_log_files import record
with DecisionLog(sys.argv[1]) as log:
    for i in range(10**6):
        made = log.append(record(*(f"person {n} " + "x" * 300 for n in range(40)), query=f"job {len(log) + 1}"))
        print(made.head, flush=True)
"""
FORGETS = """
import sys
from uma_engine.decision_log import DecisionLog
with DecisionLog(sys.argv[1]) as log:
    print("open", flush=True)
    for i in range(10**6):
        log.forget(sys.argv[2 + i])
        print(sys.argv[2 + i], flush=True)
"""


def test_after_kills_at_any_point_of_appending_every_acknowledged_record_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log.uma"
    seen = 0
    for round in range(8):
        child = run(APPENDS, str(path))
        assert child.stdout is not None
        heads = [child.stdout.readline().strip()]
        deadline = time.monotonic() + 0.02 * (round + 1)
        while time.monotonic() < deadline:
            heads.append(child.stdout.readline().strip())
        time.sleep(0.003 * round)  # into the middle of one
        child.send_signal(signal.SIGKILL)
        heads += [line.strip() for line in child.stdout.readlines() if line.endswith("\n")]
        child.wait()
        with DecisionLog(path) as log:
            for head in heads:
                assert log.verify(head).ok, head
            count = int(heads[-1].partition(":")[0])
            assert count <= len(log) <= count + 1
            assert [e.record["query"] for e in log.entries()] == [f"job {i + 1}" for i in range(len(log))]
            seen = len(log)
    assert seen > 8


def test_after_a_kill_while_forgetting_the_next_opening_finishes(tmp_path: Path) -> None:
    path = tmp_path / "log.uma"
    people = [f"person-to-be-forgotten-{i:03}" for i in range(60)]
    with DecisionLog(path) as log:
        for first in range(0, 60, 20):
            log.append(record(*people[first : first + 20], ANA))
    for round in range(5):
        child = run(FORGETS, str(path), *people)
        assert child.stdout is not None
        child.stdout.readline()
        for _ in range(round):
            child.stdout.readline()
        time.sleep(0.004 * round)
        child.send_signal(signal.SIGKILL)
        done = [line.strip() for line in child.stdout.readlines() if line.endswith("\n")]
        child.wait()
        with DecisionLog(path) as log:
            assert log.verify().ok
            for name in done:
                assert everywhere(tmp_path, name) == []
            said = sum(len(e.record["parts"]) for e in log.entries("forget"))
            left = sum(any(name.encode() in f.read_bytes() for f in log.files if f.exists()) for name in people)
            assert left == 60 - said, "what an entry calls forgotten is gone, and nothing else"


def test_a_second_writer_is_refused_a_reader_is_not(tmp_path: Path) -> None:
    path = tmp_path / "log.uma"
    child = run(APPENDS, str(path))
    assert child.stdout is not None
    child.stdout.readline()
    try:
        with pytest.raises(EngineUnavailable, match=f"being written by process {child.pid}"):
            DecisionLog(path)
        for _ in range(20):
            with DecisionLog(path, readonly=True) as reader:
                assert reader.verify().ok
                with pytest.raises(InvalidRequest, match="opened for reading"):
                    reader.append(record("x"))
    finally:
        child.kill()
        child.wait()
    with DecisionLog(path) as log:
        with pytest.raises(EngineUnavailable, match=f"by process {os.getpid()}"):
            DecisionLog(path)
        assert log.verify().ok


def test_threads_of_one_process_take_turns(log: DecisionLog) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                log.append(record(f"p-{number}-{i}"))
                assert log.verify().ok
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(log) == 40
    assert {e.record["candidates"][0]["id"] for e in log.entries()} == {
        f"p-{n}-{i}" for n in range(4) for i in range(10)
    }


@pytest.mark.parametrize("what", ["text", "database", "directory"])
def test_what_is_no_log_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "text":
        path.write_text("something else, and long enough to be no header of a database" * 20)
    elif what == "database":
        edit(path, "CREATE TABLE t (x)")
    else:
        path.mkdir()
    before = path.read_bytes() if path.is_file() else b""
    for readonly in (True, False):
        with pytest.raises((CorruptFile, EngineUnavailable, InvalidRequest)):
            DecisionLog(path, readonly=readonly)
    assert (path.read_bytes() if path.is_file() else b"") == before
    with pytest.raises(InvalidRequest, match="no decision log"):
        DecisionLog(tmp_path / "absent", readonly=True)
    with pytest.raises(EngineUnavailable, match="cannot be opened"):
        DecisionLog(tmp_path / "absent" / "x")
