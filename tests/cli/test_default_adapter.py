"""The adapter that comes with the package: it is whole, it reads by default, and it can be left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from uma_engine import Engine
from uma_engine.adapters.shipped import names, shipped
from uma_engine.cli.main import main
from uma_engine.errors import UnknownAdapter
from uma_engine.train.artifact import adapter_digest

ROOT = Path(__file__).resolve().parents[2]
FILES = [str(ROOT / "examples" / name) for name in ("job.md", "candidates.jsonl")]


def test_they_are_what_their_cards_say() -> None:
    assert names() == ["reply-quality", "requirement-extract", "talent-match"]
    for name in names():
        path = shipped(name)
        card = json.loads((path / "data_card.json").read_text())
        assert card["adapter_digest"] == adapter_digest(path)
        assert card["name"] == name
        assert card["sources"]
        assert sum(f.stat().st_size for f in path.iterdir()) < 12 * 2**20
    with pytest.raises(UnknownAdapter, match="talent-match"):
        shipped("talent-mach")


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["rank", *FILES, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.weights
@pytest.mark.slow
def test_it_reads_by_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tuned = asked(capsys, "--record", str(tmp_path / "r.json"))
    assert tuned["stack"]["adapter"] == "talent-match"
    assert not any("zero-shot" in w for w in tuned["warnings"])
    assert main(["replay", str(tmp_path / "r.json")]) == 0
    capsys.readouterr()
    bare = asked(capsys, "--no-adapter")
    assert bare["stack"]["adapter"] is None
    assert [r["id"] for r in bare["results"]] != [r["id"] for r in tuned["results"]]
    assert asked(capsys, "--labels", "good,bad")["stack"]["adapter"] is None, "it was trained for another question"
    assert asked(capsys, "--labels", "good,bad", "--adapter", "talent-match")["stack"]["adapter"] == "talent-match"
    assert main(["rank", *FILES, "--adapter", "talent-match", "--no-adapter"]) == 2


@pytest.mark.weights
@pytest.mark.slow
def test_a_blend_has_priors_and_puts_a_developer_first(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    answer = asked(capsys, "--blend", "--top-n", "5")
    assert all([f["name"] for f in r["ledger"]] == ["read:yes", "prior"] for r in answer["results"])
    with (ROOT / "examples" / "candidates_key.csv").open(encoding="utf-8", newline="") as file:
        group = {row["id"]: row["group"] for row in csv.DictReader(file)}
    assert [group[r["id"]] for r in answer["results"]].count("relevant") >= 4
    assert main(["rank", *FILES, "--blend", "--surface", str(ROOT / "examples" / "surface.toml")]) == 2


@pytest.mark.weights
def test_an_engine_loads_it_by_its_name() -> None:
    with Engine("smollm2-135m") as engine:
        ref = engine.load_adapter("talent-match")
        assert engine.load_adapter("talent-match") == ref
        assert engine.stack_info("talent-match", ref).adapter_digest == ref.digest.hex()
