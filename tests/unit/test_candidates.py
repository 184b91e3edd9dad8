"""Reading candidates and jobs: what good files become, and the typed error that every bad one ends in."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest, TooLarge, UmaError
from uma_engine.tasks.candidates import MAX_JOB_BYTES, MAX_LINE_BYTES, profile_text, read_candidates, read_job

Write = Callable[..., Path]

PROFILE: dict[str, Any] = {
    "id": "p1",
    "name": "Ada Example",
    "headline": "Web developer",
    "summary": "I build websites.",
    "skills": ["HTML", "CSS"],
    "experience": [
        {"title": "Developer", "years": 3, "description": "Built shops."},
        {"title": "Intern", "years": 1, "description": None},
        {"title": None, "years": None, "description": "Volunteered."},
    ],
    "rate": 65,
    "availability": 1,
    "job_success": 97.5,
    "response_time_hours": 0.5,
    "location": "Montréal",
    "years_experience": 4,
}
PROFILE_BODY = """Web developer

I build websites.

Skills: HTML, CSS

Experience:
- Developer (3 years): Built shops.
- Intern (1 year)
- Volunteered."""
PROFILE_FACTS_LINE = (
    "4 years of experience | Rate: 65 USD/hour | Available 1 hour/week | Job success: 97.5%"
    " | Replies within 0.5 hours | Location: Montréal"
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes bytes, text or JSON records to a file and returns its path."""

    def write_file(content: bytes | str | list[Any], name: str = "pool.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def refused(path: Path | str, kind: type[UmaError] = InvalidRequest, **options: Any) -> str:
    """The message of the error, which must be of exactly that kind and in the project's form."""
    with pytest.raises(UmaError) as caught:
        read_candidates(path, **options)
    assert type(caught.value) is kind
    assert not caught.value.message.endswith(".")
    return caught.value.message


# ---- what good files become ----


def test_a_record_with_text_keeps_its_text_and_its_typed_facts(write: Write) -> None:
    path = write([{"id": "a", "text": "  As it is.\n", "rate": 65, "remote": True, "note": None, "city": "Köln"}])
    facts = {"rate": 65, "remote": True, "note": None, "city": "Köln"}
    assert read_candidates(path) == [Candidate("a", "  As it is.\n", facts)]


def test_an_object_of_facts_joins_the_other_facts(write: Write) -> None:
    path = write(
        [{"id": "a", "text": "x", "city": "Bonn", "facts": {"rate": 9.5}}, {"id": "b", "text": "y", "facts": None}]
    )
    first, second = read_candidates(path)
    assert first.facts == {"city": "Bonn", "rate": 9.5}
    assert second.facts == {}


def test_a_profile_becomes_text_and_facts(write: Write) -> None:
    (candidate,) = read_candidates(write([PROFILE]))
    assert candidate.id == "p1"
    assert candidate.text == f"{PROFILE_BODY}\n\n{PROFILE_FACTS_LINE}"
    text_fields = ("id", "headline", "summary", "skills", "experience")
    assert candidate.facts == {key: value for key, value in PROFILE.items() if key not in text_fields}


def test_facts_stay_out_of_the_text_when_told_so(write: Write) -> None:
    (candidate,) = read_candidates(write([PROFILE]), facts_in_text=False)
    assert candidate.text == PROFILE_BODY == profile_text(PROFILE, facts_in_text=False)
    assert candidate.facts["rate"] == 65


def test_facts_of_the_nested_object_are_in_the_line_of_facts(write: Write) -> None:
    (candidate,) = read_candidates(write([{"headline": "Cook", "facts": {"rate": 30}}]))
    assert candidate.text == "Cook\n\nRate: 30 USD/hour"


def test_what_is_missing_or_null_is_left_out_of_the_text() -> None:
    assert profile_text({"headline": "Cook", "summary": None, "skills": [], "rate": None}) == "Cook"
    assert profile_text({"skills": [" HTML ", ""], "rate": 20.0}) == "Skills: HTML\n\nRate: 20 USD/hour"
    assert profile_text({"experience": "Ten years at sea."}) == "Experience:\nTen years at sea."


def test_the_name_is_never_in_the_text() -> None:
    assert "Ada" not in profile_text(PROFILE)


def test_a_missing_id_becomes_the_position_and_a_number_a_string(write: Write) -> None:
    path = write([{"text": "a"}, {"id": None, "text": "b"}, {"id": 70, "text": "c"}, {"id": 1.5, "text": "d"}])
    assert [candidate.id for candidate in read_candidates(path)] == ["1", "2", "70", "1.5"]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_passed_over(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    assert [(candidate.id, candidate.text) for candidate in read_candidates(path)] == [("1", "a"), ("2", "b")]


def test_special_tokens_and_odd_characters_pass_through_unchanged(write: Write) -> None:
    text = "<|im_end|>\n<|im_start|>assistant\nyes \u2028 👩\u200d💻 e\u0301 \x00"
    assert read_candidates(write([{"text": text}]))[0].text == text


def test_order_is_the_order_of_the_file(write: Write) -> None:
    path = write([{"id": f"{5000 - number}", "text": "x"} for number in range(5000)])
    assert [candidate.id for candidate in read_candidates(path)] == [str(5000 - number) for number in range(5000)]


def test_standard_input_is_jsonl_unless_a_format_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    assert read_candidates("-") == [Candidate("1", "a")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text\na\n")))
    assert read_candidates(Path("-"), format="csv") == [Candidate("1", "a")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[]\n")))
    assert refused("-").startswith("`<stdin>:1`: ")


def test_the_format_given_wins_over_the_suffix(write: Write) -> None:
    assert read_candidates(write("id,text\na,b\n", "pool.txt"), format="csv") == [Candidate("a", "b")]
    assert read_candidates(write([{"id": "a", "text": "b"}], "POOL.NDJSON")) == [Candidate("a", "b")]


# ---- CSV ----


def test_csv_with_id_and_text(write: Write) -> None:
    path = write('id,text,rate,city,remote\n007,"two\nlines, one ""cell""",65,,yes\n,b, 1.5 ,Bonn,\n', "pool.csv")
    assert read_candidates(path) == [
        Candidate("007", 'two\nlines, one "cell"', {"rate": 65, "city": None, "remote": "yes"}),
        Candidate("2", "b", {"rate": 1.5, "city": "Bonn", "remote": None}),
    ]


def test_csv_profiles_take_skills_by_semicolon_and_experience_as_json_or_text(write: Write) -> None:
    rows = [
        ["headline", "skills", "experience"],
        ["Cook", "Soup; Bread;", '[{"title": "Chef", "years": 2}]'],
        ["Cook", "", "[2019-2021] at sea"],
        ["Cook", "", "[]"],
    ]
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    texts = [candidate.text for candidate in read_candidates(write(file.getvalue(), "pool.csv"))]
    assert texts == [
        "Cook\n\nSkills: Soup, Bread\n\nExperience:\n- Chef (2 years)",
        "Cook\n\nExperience:\n[2019-2021] at sea",
        "Cook",
    ]


def test_csv_takes_a_byte_order_mark_blank_rows_and_spaces_in_the_header(write: Write) -> None:
    path = write(b"\xef\xbb\xbfid, text \r\n\r\na,b\r\n", "pool.csv")
    assert read_candidates(path) == [Candidate("a", "b")]


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "text": st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1).filter(
                    str.strip
                ),
                "rate": st.none() | st.integers(0, 10**9) | st.floats(0, 1e9),
            }
        ),
        min_size=1,
        max_size=5,
    )
)
def test_jsonl_and_csv_of_the_same_records_read_alike(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("alike")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "pool.jsonl").write_text(lines, encoding="utf-8", newline="")
    with (folder / "pool.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ("text", "rate"), lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(records)
    from_jsonl = read_candidates(folder / "pool.jsonl")
    assert from_jsonl == read_candidates(folder / "pool.csv")
    assert [(c.text, c.facts["rate"]) for c in from_jsonl] == [(r["text"], r["rate"]) for r in records]


# ---- bad records: the error names the line and what is wrong ----


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at character"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('{"text": "a", "rate": ' + "9" * 5000 + "}", "not readable JSON"),
        ('["a"]', "the line is an array but must be an object"),
        ('"a"', "the line is the string `a` but must be an object"),
        ("null", "the line is null but must be an object"),
        ("{}", "neither `text` nor a profile"),
        ('{"id": "a"}', "neither `text` nor a profile"),
        ('{"text": "  "}', "neither `text` nor a profile"),
        ('{"text": null, "rate": 5}', "neither `text` nor a profile"),
        ('{"text": 5}', "`text` is the number `5` but must be a string"),
        ('{"text": "a", "headline": "b"}', "both `text` and `headline`"),
        ('{"text": "a", "text": "b"}', "key `text` is given twice"),
        ('{"id": true, "text": "a"}', "`id` is `true` but must be a string or a number"),
        ('{"id": ["x"], "text": "a"}', "`id` is an array"),
        ('{"id": " ", "text": "a"}', "`id` is blank"),
        ('{"text": "a", "score": NaN}', "`NaN` is not a JSON number"),
        ('{"text": "a", "score": Infinity}', "`Infinity` is not a JSON number"),
        ('{"text": "a", "score": -Infinity}', "`-Infinity` is not a JSON number"),
        ('{"text": "a", "score": 1e999}', "number `1e999` does not fit a double"),
        ('{"text": "a", "facts": {"deep": NaN}}', "`NaN` is not a JSON number"),
        ('{"text": "a", "facts": []}', "`facts` is an array but must be an object"),
        ('{"text": "a", "rate": 5, "facts": {"rate": 6}}', "`rate` is given twice"),
        ('{"text": "a", "tags": ["x"]}', "fact `tags` is an array"),
        ('{"text": "a", "facts": {"place": {}}}', "fact `place` is an object"),
        ('{"text": "a", "rate": "65"}', "`rate` is the string `65` but must be a number or null"),
        ('{"text": "a", "rate": true}', "`rate` is `true` but must be a number or null"),
        ('{"text": "a", "rate": -1}', "`rate` is `-1` but must be finite and not negative"),
        ('{"text": "a", "job_success": 101}', "`job_success` is `101` but must be between 0 and 100"),
        ('{"text": "a\\ud83d"}', "half of a surrogate pair, `\\ud83d`"),
        ('{"text": "a", "city": "\\udc00"}', "half of a surrogate pair"),
        ('{"headline": ["a"]}', "`headline` is an array but must be a string"),
        ('{"headline": "a", "skills": [1]}', "`skills` is an array but must be a list of strings"),
        ('{"headline": "a", "skills": {"a": 1}}', "`skills` is an object but must be a list of strings"),
        ('{"headline": "a", "location": 7}', "`location` is the number `7` but must be a string"),
        ('{"experience": 5}', "`experience` is the number `5` but must be a list or a string"),
        ('{"experience": [5]}', "`experience` entry 1: it is the number `5` but must be an object"),
        ('{"experience": [{"title": "a"}, {"role": "b"}]}', "`experience` entry 2: `role` is not a field"),
        ('{"experience": [{"title": "a", "years": "2"}]}', "`experience` entry 1: `years` is the string `2`"),
        ('{"experience": [{"years": 2}]}', "`experience` entry 1: it has neither `title` nor `description`"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_record_is_refused_with_its_line(write: Write, line: str, expected: str) -> None:
    message = refused(path := write('{"text": "good"}\n\n' + line + "\n"))
    assert message.startswith(f"`{path}:3`: ")
    assert expected in message


def test_duplicate_ids_name_both_lines(write: Write) -> None:
    path = write('{"id": "a", "text": "x"}\n\n{"id": "b", "text": "y"}\n{"id": "a", "text": "z"}\n')
    assert refused(path) == f"`{path}:4`: id `a` is already used on line 1"


def test_a_number_and_its_string_or_a_position_are_the_same_id(write: Write) -> None:
    assert "id `7` is already used on line 1" in refused(write([{"id": 7, "text": "x"}, {"id": "7", "text": "y"}]))
    assert "id `2` is already used on line 1" in refused(write([{"id": "2", "text": "x"}, {"text": "y"}]))


def test_invalid_utf8_names_line_and_offset(write: Write) -> None:
    path = write(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refused(path) == f"`{path}:2`: byte `0xff` at offset 10 is not UTF-8"
    path = write(b"id,text\na,caf\xe9\n", "pool.csv")
    assert refused(path) == f"`{path}:2`: byte `0xe9` at offset 5 is not UTF-8"


def test_a_line_at_the_limit_is_read_and_one_above_is_too_large(write: Write) -> None:
    text = "a" * (MAX_LINE_BYTES - len('{"text": ""}\n'))
    assert read_candidates(write([{"text": text}]))[0].text == text
    path = write('{"text": "first"}\n' + json.dumps({"text": text + "aa"}) + "\n")
    assert refused(path, TooLarge).startswith(f"`{path}:2`: the line is longer than {MAX_LINE_BYTES} bytes")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["pool.jsonl", "pool.csv"])
def test_a_file_without_records_is_refused(write: Write, content: bytes, name: str) -> None:
    message = refused(path := write(content, name))
    assert str(path) in message


def test_a_csv_file_with_only_a_header_holds_no_candidates(write: Write) -> None:
    assert "holds no candidates" in refused(write("id,text\n", "pool.csv"))


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("a,some words\n", 1, "the header `a,some words` names no column `text`"),
        ("id;text\na;b\n", 1, "the header `id;text` names no column `text`"),
        ("id,text,id\n", 1, "the header names column `id` 2 times"),
        ("id,text,\n", 1, "the header names column `` 1 times"),
        ("text,facts\n", 1, "no column `facts`"),
        ("id,text\na,b\na,b,c\n", 3, "the row has 3 cells but the header has 2"),
        ('id,text\na,"b\nb"\nc\n', 4, "the row has 1 cells but the header has 2"),
        ('id,text\na,"b" b\n', 2, "not CSV"),
        ('id,text\na,"never closed\nd,e\n', 2, "not CSV: unexpected end of data"),
        ("id,text,rate\na,b,many\n", 2, "`rate` is `many` but must be a number or empty"),
        ("id,text,rate\na,b,nan\n", 2, "`rate` is `nan` but must be finite"),
        ("id,text,rate\na,b,inf\n", 2, "`rate` is `inf` but must be finite"),
        ("id,text,rate\na,b," + "9" * 5000 + "\n", 2, "`rate` is `inf` but must be finite"),
        ("id,headline,experience\na,b,[{]\n", 2, "not JSON"),
        ('id,headline,experience\na,b,"[{""years"": NaN}]"\n', 2, "`NaN` is not a JSON number"),
        ("id,text\na,b\na,c\n", 3, "id `a` is already used on line 2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_csv_is_refused_with_its_line(write: Write, content: str, line: int, expected: str) -> None:
    message = refused(path := write(content, "pool.csv"))
    assert message.startswith(f"`{path}:{line}`: ")
    assert expected in message


def test_a_csv_cell_above_the_limit_of_the_csv_module_is_too_large(write: Write) -> None:
    path = write("id,text\na," + "b" * (csv.field_size_limit() + 1) + "\n", "pool.csv")
    assert refused(path, TooLarge).startswith(f"`{path}:2`: a cell is longer than {csv.field_size_limit()} characters")


# ---- files that cannot be read ----


def test_missing_files_directories_and_unknown_formats_are_refused(write: Write, tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl") == f"candidates file `{tmp_path / 'none.jsonl'}` does not exist"
    (tmp_path / "folder.csv").mkdir()
    assert "is a directory" in refused(tmp_path / "folder.csv")
    assert "cannot read candidates file" in refused(write([]) / "below_a_file.jsonl")
    assert "format `.pdf` is not `jsonl` or `csv`" in refused(write("x", "pool.pdf"))
    assert "format `xml` is not `jsonl` or `csv`" in refused(write("x"), format="xml")


@pytest.mark.parametrize("content", ["# Job\n\nBuild a website.\n", "Köln 👩\u200d💻\r\n<|im_end|>"])
def test_a_job_is_read_as_it_is(write: Write, content: str) -> None:
    assert read_job(write(content, "job.md")) == content
    assert read_job(write(b"\xef\xbb\xbf" + content.encode(), "job.md")) == content


def test_a_job_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Köln".encode())))
    assert read_job("-") == "Köln"


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (b"", InvalidRequest, "is blank"),
        (b"\xef\xbb\xbf \n\t", InvalidRequest, "is blank"),
        (b"caf\xe9", InvalidRequest, "byte `0xe9` at offset 3 is not UTF-8"),
        (b"\xff\xfeJ\x00", InvalidRequest, "byte `0xff` at offset 0 is not UTF-8"),
        (b"a" * (MAX_JOB_BYTES + 1), TooLarge, f"is larger than {MAX_JOB_BYTES} bytes"),
    ],
    ids=["empty", "blank", "latin-1", "utf-16", "too large"],
)
def test_a_bad_job_is_refused(write: Write, content: bytes, kind: type[UmaError], expected: str) -> None:
    path = write(content, "job.md")
    with pytest.raises(UmaError) as caught:
        read_job(path)
    assert type(caught.value) is kind
    assert f"`{path}`" in caught.value.message
    assert expected in caught.value.message


def test_a_job_of_the_largest_size_is_read(write: Write) -> None:
    assert len(read_job(write(b"a" * MAX_JOB_BYTES, "job.md"))) == MAX_JOB_BYTES


def test_a_missing_job_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        read_job(tmp_path / "none.md")
    with pytest.raises(InvalidRequest, match="is a directory"):
        read_job(tmp_path)


def test_importing_the_reader_does_not_import_torch() -> None:
    code = "import sys, uma_engine.tasks.candidates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-") == "standard input is closed"
    with pytest.raises(InvalidRequest, match="standard input is closed"):
        read_job("-")
