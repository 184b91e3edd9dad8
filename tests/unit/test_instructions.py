"""The count of instructions: what is read from valgrind's file, and when a figure has grown. `make instructions` counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import instructions
from bench.rows import versions

DUMPED = """# callgrind format
version: 1
creator: callgrind-3.19.0
part: 2

desc: I1 cache:
desc: Trigger: Client Request: near-16

positions: line
events: Ir

ob=(1) /venv/uma_kernels/_C.cpython-311-x86_64-linux-gnu.so
fl=(1) ???
fn=(1) linear
0 100
cob=(2) /usr/lib/libc.so.6
cfi=(2) ???
cfn=(2) memcpy
calls=3 0
0 50
+1 7

ob=(2)
fl=(2)
fn=(2)
0 50

ob=(3) /usr/bin/python3
fn=(3) eval
0 800
cob=(1)
cfn=(1)
calls=1 0
0 107

ob=(1)
fn=(4) rope
0 3

totals: 960
"""


def row(kernels: int = 1000, total: int = 5000, compiler: str = "c++ 12") -> dict[str, Any]:
    return {"precision": "near", "kernels": kernels, "total": total, "compiler": compiler, "versions": versions()}


def test_costs_are_counted_where_they_are_spent() -> None:
    assert instructions.read_counts(DUMPED) == {"near-16": (110, 960)}
    assert instructions.read_counts(DUMPED.replace("Client Request: near-16", "Program termination")) == {}


@pytest.mark.parametrize(
    ("now", "figures"),
    [
        (row(), []),
        (row(kernels=1030, total=5150), []),
        (row(kernels=500, total=100), []),
        (row(kernels=1031), ["kernels"]),
        (row(total=5151), ["total"]),
        (row(kernels=2000, total=6000), ["kernels", "total"]),
    ],
)
def test_more_than_three_percent_is_too_much(now: dict[str, Any], figures: list[str]) -> None:
    grown, other = instructions.compare([now], {"near": row()})
    assert [line.split(":")[0] for line in grown] == [f"near, {figure}" for figure in figures]
    assert other == []


def test_what_cannot_be_compared_is_said() -> None:
    assert instructions.compare([row()], {}) == ([], ["near: no figure is kept"])
    grown, other = instructions.compare([row(9999, 9999, compiler="c++ 13")], {"near": row()})
    assert grown == []
    assert "c++ 13" in other[0]
    kept = row() | {"versions": versions() | {"torch": "0"}}
    grown, other = instructions.compare([row(9999, 9999)], {"near": kept})
    assert [line.split(":")[0] for line in grown] == ["near, kernels"]
    assert other == ["near, total: kept of another Python or torch"]


def test_the_last_row_of_a_precision_is_the_kept_one(tmp_path: Path) -> None:
    path = tmp_path / "instructions.jsonl"
    assert instructions.kept(path) == {}
    path.write_text(
        '{"precision": "near", "kernels": 1}\n{"precision": "fast", "kernels": 2}\n{"precision": "near", "kernels": 3}\n'
    )
    assert {name: row["kernels"] for name, row in instructions.kept(path).items()} == {"near": 3, "fast": 2}
