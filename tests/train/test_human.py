"""People's marks: the statistics of the papers' own examples, the form of the data, and an importer that keeps dialogues together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from uma_engine.cli.main import main
from uma_engine.errors import InvalidRequest
from uma_engine.train.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from uma_engine.train.groups import read_groups
from uma_engine.train.human import (
    Conversation,
    Mark,
    Reply,
    Turn,
    import_upheld,
    read_conversations,
    split_of,
    to_groups,
    write_conversations,
)

# Krippendorff 2011, section C: four observers, twelve units, missing marks.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
# Fleiss 1971, as worked out in the literature: ten things, fourteen raters, five categories; kappa 0.210.
FLEISS = (
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip


def test_published_examples() -> None:
    units = [[m for m in unit if m is not None] for unit in zip(*OBSERVERS, strict=True)]
    for level, value in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)):
        assert krippendorff_alpha(units, level) == pytest.approx(value, abs=5e-4), level  # type: ignore[arg-type]
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)
    # Two readers of fifty proposals: 20 both yes, 15 both no, 5 and 10 apart; kappa 0.4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa("aab", "aab") == 1
    assert krippendorff_alpha([[3, 3], [1, 1, 1]]) == 1
    with pytest.raises(ValueError, match="nothing"):
        krippendorff_alpha([[1], [2]])
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa([[1, 2], [1, 1]])


def conversation(number: str, marks: tuple[float, ...] = (5, 1)) -> Conversation:
    replies = tuple(Reply(f"r{i}", "person", f"reply {i}", (Mark("1", "content", v),)) for i, v in enumerate(marks))
    return Conversation(number, "test", "CC0", "given", (Turn("user", "hello"),), replies)


def test_the_form_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    good = [conversation("a-1"), conversation("a-2")]
    write_conversations(path, good)
    assert read_conversations(path) == good
    for bad in (
        {"licence": ""}, {"consent": " "}, {"turns": []}, {"turns": [{"role": "boss", "text": "x"}]},
        {"replies": [{"id": "a", "author": "b", "text": "c", "marks": [{"by": "1", "of": "x", "value": True}]}]},
        {"replies": [{"id": "a", "author": "b", "text": "c"}] * 2}, {"id": 5},
    ):  # fmt: skip
        data = json.loads(path.read_text().splitlines()[0]) | bad
        (tmp_path / "bad.jsonl").write_text(json.dumps(data))
        with pytest.raises(InvalidRequest, match="line 1"):
            read_conversations(tmp_path / "bad.jsonl")
    write_conversations(path, [good[0], good[0]])
    with pytest.raises(InvalidRequest, match="line 2"):
        read_conversations(path)


def test_marks_become_grades() -> None:
    (group,) = to_groups([conversation("a-1", (1, 3, 5)), conversation("a-2", (2, 2))])
    assert [c.grade for c in group.candidates] == [0, 2, 4]
    assert group.job == "user: hello"
    planted = replace(conversation("b-1", (1, 3, 5)))
    planted = replace(planted, replies=(replace(planted.replies[0], author="random"), *planted.replies[1:]))
    (group,) = to_groups([planted], without=["random"])
    assert [c.id for c in group.candidates] == ["r1", "r2"]


def test_upheld_is_imported_and_split_by_dialogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for n in range(40):
        for turn in range(2):
            marks = {"annotators": [1, 2], "content": [5, 4], "style": [3, 3], "reasonable": [5, 5]}
            bad = {"annotators": [1, 2], "content": [1, 1], "style": [1, 3], "reasonable": [1, None]}
            candidates = [{"model": "m", "text": "good", **marks}, {"model": "random", "text": "bad", **bad}]
            messages = [{"role": "user", "content": f"question {n} {turn}"}]
            rows.append(
                {
                    "id": f"{n}-{turn}",
                    "source": "human-written",
                    "messages": messages,
                    "reference": "x",
                    "candidates": candidates,
                }
            )
    path = tmp_path / "upheld.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = import_upheld(path)
    assert len(found) == 80
    assert found[0].replies[1].mean("reasonable") == 1
    assert main(["data", "human", str(path), "--format", "upheld", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "alpha" in said
    ids = {s: {g.id for g in read_groups(tmp_path / "out" / f"{s}.jsonl")} for s in ("train", "dev", "test")}
    assert sum(map(len, ids.values())) == 80
    dialogues = [{i.partition("-")[0] for i in part} for part in ids.values()]
    assert sum(map(len, dialogues)) == len(set().union(*dialogues)), "no dialogue is in two of them"
    assert split_of("7-1") == split_of("7-2")
    path.write_text(json.dumps({"id": "1"}))
    with pytest.raises(InvalidRequest, match="not UPHELD"):
        import_upheld(path)
