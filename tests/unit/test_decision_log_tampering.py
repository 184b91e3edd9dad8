"""What was changed in a decision log is found and named: entries, contents, bytes, order, the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from decision_log_files import ANA, copied, edit, made, problems, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uma_engine.decision_log import DecisionLog
from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return made(tmp_path_factory.mktemp("original"))


EDITS = {
    "a body": ("UPDATE entries SET body = replace(body, 'Rust', 'Java') WHERE id = 1", "entry 1: its body was changed"),
    "a header": ("UPDATE entries SET header = replace(header, '2026', '2025') WHERE id = 2", "entry 2: its seal"),
    "a kind": ("UPDATE entries SET kind = 'rank' WHERE id = 5", "entry 5: its header is that of entry 5, `forget`"),
    "a candidate's content": (
        "UPDATE parts SET content = replace(content, '40.5', '99.5') WHERE entry = 1 AND place = 1",
        "entry 1: candidate at place 1 was changed",
    ),
    "a candidate's salt": ("UPDATE parts SET salt = zeroblob(32) WHERE entry = 3", "entry 3: candidate at place 0 was changed"),
    "whose it is": ("UPDATE parts SET who = zeroblob(16) WHERE entry = 3", "entry 3: candidate at place 0 is listed as somebody else"),
    "a candidate deleted": ("DELETE FROM parts WHERE entry = 4", "place 0 was deleted, and no entry says that it was forgotten"),
    "a candidate put in": ("INSERT INTO parts SELECT entry, 9, who, salt, content FROM parts LIMIT 1", "was put in afterwards"),
    "a forgotten one back": (
        "INSERT INTO parts SELECT 2, 1, who, salt, content FROM parts WHERE entry = 4",
        "entry 2: candidate at place 1 was forgotten by entry 5 but is back",
    ),
    "an entry deleted": ("DELETE FROM entries WHERE id = 2", "entry 2 is missing"),
    "the tail cut off": ("DELETE FROM entries WHERE id >= 4", "the end was cut off: 3 entries are left of 5"),
    "the last one cut off": ("DELETE FROM entries WHERE id = 5", "the end was cut off: 4 entries are left of 5"),
    "all deleted": ("DELETE FROM entries", "the end was cut off: 0 entries are left of 5"),
    "a jump of ids": ("UPDATE entries SET id = 1152921504606846976 WHERE id = 5", "entries 5 to 1152921504606846975 are missing"),
    "text in place of bytes": ("UPDATE entries SET header = 'x' WHERE id = 3", "entry 3 is not as the log writes it"),
    "the tenants": ("DELETE FROM tenants", "the list of tenants is not that of the entries"),
    "the key": ("UPDATE meta SET value = zeroblob(32) WHERE key = 'key'", "entry 1: its seal"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_was_changed_is_found_and_named(name: str, original: tuple[Path, str], tmp_path: Path) -> None:
    path = copied(original, tmp_path)
    assert problems(path, original[1]) == []
    sql, says = EDITS[name]
    edit(path, sql.replace("replace(body, 'Rust', 'Java')", "CAST(replace(CAST(body AS TEXT), 'Rust', 'Java') AS BLOB)")
         .replace("replace(header, '2026', '2025')", "CAST(replace(CAST(header AS TEXT), '\"at\":\"20', '\"at\":\"19') AS BLOB)")
         .replace("replace(content, '40.5', '99.5')", "CAST(replace(CAST(content AS TEXT), '40.5', '99.5') AS BLOB)"))  # fmt: skip
    found = problems(path)
    assert any(says in problem for problem in found), found


def test_entries_in_another_order_are_found(original: tuple[Path, str], tmp_path: Path) -> None:
    path = copied(original, tmp_path)
    edit(
        path,
        "UPDATE entries SET id = 100 WHERE id = 1",
        "UPDATE entries SET id = 1 WHERE id = 2",
        "UPDATE entries SET id = 2 WHERE id = 100",
    )
    assert any("entry 1: its seal" in p for p in problems(path))


def reseal(path: Path, head: bool) -> None:
    """What somebody does who knows the format: every digest computed anew over what is there now."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        digest = hashlib.sha256(meta["format"] + b"\n" + meta["log_id"] + meta["key"]).digest()
        number = 0
        for number, header, body in db.execute("SELECT id, header, body FROM entries ORDER BY id").fetchall():
            data = json.loads(header) | {"body": hashlib.sha256(body).hexdigest()}
            sealed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
            digest = hashlib.sha256(digest + sealed).digest()
            db.execute("UPDATE entries SET header = ?, digest = ? WHERE id = ?", (sealed, digest, number))
        db.commit()
    if head:
        data = {"format": "uma-decision-log/1", "entries": number, "digest": digest.hex()}
        path.with_name("log.uma.head").write_text(json.dumps(data))


@pytest.mark.parametrize("head", [False, True], ids=["but for the head", "head and all"])
def test_a_chain_computed_anew_is_found_by_the_head_or_by_one_kept_elsewhere(
    head: bool, original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    edit(path, "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), 'Rust', 'Java') AS BLOB) WHERE id = 1")
    reseal(path, head)
    assert bool(problems(path)) != head, "who rewrites every file consistently is shown only by a head from elsewhere"
    assert problems(path, original[1])


def test_a_tail_cut_off_with_its_head_is_found_by_a_head_kept_elsewhere(
    original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    edit(path, "DELETE FROM entries WHERE id = 5", "DELETE FROM parts WHERE entry = 5")
    reseal(path, head=True)
    assert any("4 entries are left of the 5 that are expected" in p for p in problems(path, original[1]))
    for bad in ("5", "x:y", "5:abcd", "-1:" + "0" * 64):
        with pytest.raises(InvalidRequest, match="a head is COUNT:DIGEST"):
            problems(path, bad)


def test_entries_put_in_behind_the_head_are_found_and_nothing_is_appended_to_such_a_log(
    original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    head = path.with_name("log.uma.head")
    old = head.read_bytes()
    with DecisionLog(path) as log:
        log.append(record("x"))
        one_more = head.read_bytes()
        log.append(record("y"))
    head.write_bytes(old)
    assert problems(path) == ["2 entries were put in behind the head"]
    with pytest.raises(CorruptFile, match="the head says 5 entries"):
        DecisionLog(path)
    head.write_bytes(one_more)  # as after a kill between commit and head
    assert problems(path) == []
    with DecisionLog(path) as log:
        assert log.append(record("z")).id == 8
        assert log.verify().ok


@pytest.mark.parametrize("what", ["no head", "no log", "a broken head", "an older copy"])
def test_a_log_whose_end_is_not_as_it_was_left_is_not_written_to(
    what: str, original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    head = path.with_name("log.uma.head")
    if what == "no head":
        head.unlink()
    elif what == "no log":
        path.unlink()
    elif what == "a broken head":
        head.write_text("{")
    else:
        older = path.read_bytes()
        with DecisionLog(path) as log:
            log.append(record("x"))
        path.write_bytes(older)
    with pytest.raises(CorruptFile):
        DecisionLog(path)
    if what != "no log":
        assert problems(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_byte_changed_in_the_file_is_found_or_changes_nothing_that_is_read(
    data: st.DataObject, original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    with DecisionLog(path, readonly=True) as log:
        before = [log.get(i) for i in range(1, 6)]
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        with DecisionLog(path, readonly=True) as log:
            if log.verify(original[1]).ok:
                assert [log.get(i) for i in range(1, 6)] == before
                assert {len(log.export(name)["records"]) for name in (ANA, "bo")} == {2}
    except (CorruptFile, EngineUnavailable):
        pass  # found as well


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_rows_deleted_swapped_or_copied_are_found(
    data: st.DataObject, original: tuple[Path, str], tmp_path: Path
) -> None:
    path = copied(original, tmp_path)
    table, key = data.draw(st.sampled_from([("entries", "id"), ("parts", "rowid")]))
    with contextlib.closing(sqlite3.connect(path)) as db:
        keys = [k for (k,) in db.execute(f"SELECT {key} FROM {table}")]
        columns = [c[1] for c in db.execute(f"PRAGMA table_info({table})") if c[1] not in ("id", "entry", "place")]
        column = data.draw(st.sampled_from(columns))
        a, b = data.draw(st.lists(st.sampled_from(keys), min_size=2, max_size=2, unique=True))
        before = db.execute(f"SELECT {column} FROM {table} ORDER BY {key}").fetchall()
        how = data.draw(st.sampled_from(["delete", "swap", "copy"]))
        if how == "delete":
            db.execute(f"DELETE FROM {table} WHERE {key} = ?", (a,))
        else:
            values = {
                k: db.execute(f"SELECT {column} FROM {table} WHERE {key} = ?", (k,)).fetchone()[0] for k in (a, b)
            }
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (values[b], a))
            if how == "swap":
                db.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (values[a], b))
        db.commit()
        changed = before != db.execute(f"SELECT {column} FROM {table} ORDER BY {key}").fetchall()
    assert bool(problems(path)) == changed
