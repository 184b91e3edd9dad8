"""Redaction with Presidio's recognisers beside the rules: what they find, with and without a language model, and what a record says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uma_engine import Candidate, Engine
from uma_engine.cli.main import main
from uma_engine.errors import MissingPackage, SurfaceError
from uma_engine.ranking.presidio import finder
from uma_engine.ranking.redaction import redact
from uma_engine.ranking.surface import Read, Surface

JOB = "We need a Rust engineer."
READ = Read("fit")
TEXT = "Rust since 2015-2019, paid to DE89 3704 0044 0532 0130 00 or RSSMRA85T10A562S; 16,384 rows; version 3.11.2; Zyx Qwv leads"


def test_without_the_package_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["presidio_analyzer"] = None
from uma_engine.errors import MissingPackage
from uma_engine.ranking.presidio import finder
try:
    finder("presidio")
except MissingPackage as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "`presidio-analyzer` is not installed" in said
    assert "uma-engine[pii]" in said


def test_declarations_are_checked_and_survive_plain_data() -> None:
    surface = Surface("s", reads=(READ,), redact_with=("presidio",))
    assert Surface.from_dict(json.loads(json.dumps(surface.to_dict()))) == surface
    assert "redact_with" not in Surface("s", reads=(READ,)).to_dict()
    assert surface.without_redaction().redact_with == ()
    for bad in ("presidio:", "regex", "Presidio"):
        with pytest.raises(SurfaceError, match="`redact_with` holds"):
            Surface("s", reads=(READ,), redact_with=(bad,))
    with pytest.raises(SurfaceError, match="but `redact` is off"):
        Surface("s", reads=(READ,), redact=(), redact_with=("presidio",))
    with pytest.raises(SurfaceError, match="two finders"):
        Surface("s", reads=(READ,), redact_with=("presidio", "presidio"))


@pytest.fixture(scope="module")
def presidio() -> str:
    pytest.importorskip("presidio_analyzer", reason="the extra `pii` is not installed")
    return "presidio"


@pytest.fixture(scope="module")
def language_model(presidio: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline of spaCy that knows one person and one group: a real one in form, made here because none can be had by pip."""
    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Zyx Qwv"}, {"label": "NORP", "pattern": "Ruritanian"}])
    folder = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(folder)
    return f"presidio:{folder}"


def test_numbers_of_accounts_and_documents_go_and_other_numbers_stay(presidio: str) -> None:
    find, versions = finder(presidio)
    assert versions.startswith("presidio-analyzer 2.")
    text, spans = redact(TEXT, finders=[find])
    assert text == "Rust since 2015-2019, paid to [id] or [id]; 16,384 rows; version 3.11.2; Zyx Qwv leads"
    assert [TEXT[s.start : s.end] for s in spans] == ["DE89 3704 0044 0532 0130 00", "RSSMRA85T10A562S"]
    assert redact(TEXT)[0] != text, "the rules alone do not know them"
    for other, expected in (
        ("NINO AB 12 34 56 C", "NINO [id]"),
        ("Card 4111 1111 1111 1111", "Card [phone]"),  # gone by the rules already, under the name that came first
        ("Call +44 20 7946 0958 now", "Call [phone] now"),
        ("Nothing here", "Nothing here"),
    ):
        assert redact(other, finders=[find])[0] == expected


def test_a_language_model_finds_names_that_no_rule_knows(language_model: str) -> None:
    find, versions = finder(language_model)
    assert "spacy 3." in versions
    assert redact("Zyx Qwv, a Ruritanian, writes Rust", finders=[find])[0] == "[name], a [group], writes Rust"
    with pytest.raises(MissingPackage, match="spaCy has none of that name"):
        finder("presidio:no_such_model")


def test_what_presidio_finds_changes_no_score_and_is_in_a_record_that_replays(
    presidio: str,
    language_model: str,
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = make_engine(decision_log=tmp_path / "log.uma")
    people = [
        Candidate("a", "Rust, paid to DE89 3704 0044 0532 0130 00, says Zyx Qwv"),
        Candidate("b", "Rust, paid to GB82 WEST 1234 5698 7654 32, says Zyx Qwv"),
    ]
    plain = engine.rank(JOB, people, surface=Surface("s", reads=(READ,)))
    assert plain.results[0].score != plain.results[1].score
    answer = engine.rank(JOB, people, surface=Surface("s", reads=(READ,), redact_with=(language_model,)))
    assert answer.all_results[0].score == answer.all_results[1].score
    assert [r.kind for r in answer.all_results[0].redactions] == ["id", "name"]
    assert list(answer.record["options"]["finders"]) == [language_model]
    assert main(["replay", str(tmp_path / "log.uma"), "--all"]) == 0
    assert "2 of 2 records are identical" in capsys.readouterr().out
    record = json.loads(json.dumps(answer.record))
    record["options"]["finders"][language_model] = "presidio-analyzer 1.0"
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "r.json")]) == 1
    assert f"finder `{language_model}`: `presidio-analyzer 1.0` then" in capsys.readouterr().out
