"""Declarations of surfaces: what is accepted means the same in TOML, in Python and in a record; the rest is refused with its place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.factors import Fact, Linear
from uma_engine.ranking.redaction import KINDS
from uma_engine.ranking.surface import Read, Surface

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "surface.toml"
GOOD: dict[str, Any] = {
    "name": "s",
    "facts": [{"name": "success", "field": "job_success", "curve": {"worst": 0, "best": 100}, "missing": 0.5}],
    "reads": [{"name": "skills", "probe": "Answer {labels}: do the skills match?", "adapter": "a", "weight": 2}],
}


def test_the_example_says_what_its_plain_data_says() -> None:
    surface = Surface.load(EXAMPLE)
    again = Surface.from_dict(json.loads(json.dumps(surface.to_dict())))
    assert again == surface
    assert again.digest == surface.digest
    assert [f.name for f in surface.facts][:2] == ["job success", "rate against budget"]
    assert surface.redact == KINDS, "reads see no names unless somebody says so"
    assert all(read.question.startswith("Answer yes or no: ") for read in surface.reads)


def test_toml_and_python_are_the_same() -> None:
    declared = Surface.from_dict(GOOD)
    built = Surface(
        "s",
        facts=(Fact("success", "job_success", Linear(0, 100), missing=0.5),),
        reads=[Read("skills", "Answer {labels}: do the skills match?", adapter="a", weight=2)],  # type: ignore[arg-type]
    )
    assert declared == built
    assert Surface.from_dict(GOOD | {"name": "t"}).digest != built.digest


def test_paths_begin_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'name = "s"\n[adapters]\na = "adapters/a"\n[[reads]]\nname = "r"\nadapter = "a"\ncalibration = "c.json"\n'
    )
    surface = Surface.load(tmp_path / "s.toml")
    assert surface.adapters == {"a": tmp_path / "adapters" / "a"}
    assert surface.reads[0].calibration == tmp_path / "c.json"


def with_(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return edit


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no name": (with_("name", to=None), "no `name`"),
    "a misspelt key": (with_("resolutoin", to=0.1), "`resolutoin` that is not known\nhint: did you mean `resolution`"),
    "nothing": (lambda d: d.update(facts=[], reads=[]), "has 0 factors"),
    "facts a table": (with_("facts", to={"x": 1}), "begins with `[[facts]]`"),
    "a fact a string": (with_("facts", 0, to="x"), "`facts[0]` is `'x'` but must be a table"),
    "a fact without missing": (with_("facts", 0, "missing", to=None), "`facts[0]` has no `missing`"),
    "missing zero": (with_("facts", 0, "missing", to=0), "a missing fact is neutral, never zero"),
    "missing true": (with_("facts", 0, "missing", to=True), "`missing` is `True`"),
    "no curve": (with_("facts", 0, "curve", to=None), "`facts[0]` has no `curve`"),
    "a flat curve": (with_("facts", 0, "curve", to={"worst": 1, "best": 1}), "`facts[0]`: a line"),
    "a domain the wrong way": (with_("facts", 0, "domain", to=[9, 1]), "`domain` is"),
    "a domain of one": (with_("facts", 0, "domain", to=[9]), "`domain` is `[9]`"),
    "an unknown fact key": (with_("facts", 0, "wieght", to=1), "did you mean `weight`"),
    "weight zero": (with_("facts", 0, "weight", to=0), "`weight` is `0` but must be a number above 0"),
    "weight NaN": (with_("facts", 0, "weight", to=float("nan")), "`weight` is `nan`"),
    "weight true": (with_("reads", 0, "weight", to=True), "`weight` is `True`"),
    "weight huge": (with_("reads", 0, "weight", to=1e7), "to 1e+06"),
    "a product's weight": (lambda d: d.update(aggregate="product"), "above 0 to 1"),
    "aggregate": (with_("aggregate", to="sum"), "`aggregate` is `sum`\nhint: it is `mean` or `product`"),
    "tie order": (with_("tie_order", to="name"), "`tie_order` is `name`"),
    "resolution": (with_("resolution", to=-0.1), "`resolution` is `-0.1`"),
    "redact": (with_("redact", to=["names"]), "`redact` holds `names`"),
    "redact a string": (with_("redact", to="name"), "`redact` is `'name'` but must be a list"),
    "a read without name": (with_("reads", 0, "name", to=None), "`reads[0]` has no `name`"),
    "a blank probe": (with_("reads", 0, "probe", to="  "), "`probe` is empty"),
    "a probe with our mark": (with_("reads", 0, "probe", to="\u27e6uma-job\u27e7"), "uses for itself"),
    "one label": (with_("reads", 0, "labels", to=["yes"]), "at least two words"),
    "labels a string": (with_("reads", 0, "labels", to="yes"), "must be a list of strings"),
    "labels twice": (with_("reads", 0, "labels", to=["yes", "yes"]), "must be distinct"),
    "calibration a number": (with_("reads", 0, "calibration", to=3), "is not of format"),
    "calibrated beside nothing": (
        lambda d: d["reads"][0].update(adapter=None, calibration=True),
        "beside the adapter but the read has none",
    ),
    "the same name": (with_("reads", 0, "name", to="success"), "two factors with the name `success`"),
    "the same question": (
        lambda d: d["reads"].append(d["reads"][0] | {"name": "again"}),
        "two reads that ask",
    ),
    "adapters": (with_("adapters", to={"a": 1}), "`adapters.a` is `1`"),
    "instruction": (with_("instruction", to=" "), "`instruction` is"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_declaration_is_refused_with_its_place(name: str) -> None:
    edit, says = BAD[name]
    data = copy.deepcopy(GOOD)
    edit(data)
    with pytest.raises(SurfaceError) as caught:
        Surface.from_dict(data)
    assert says in str(caught.value)
    assert isinstance(caught.value, InvalidRequest), "the caller's fault, HTTP 400"


def test_files_that_are_no_surface_are_refused_by_name(tmp_path: Path) -> None:
    bad = tmp_path / "s.toml"
    with pytest.raises(SurfaceError, match="cannot be read"):
        Surface.load(bad)
    for content, says in (
        (b"name = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b'nam = "x"', "s.toml`: the surface has a key"),
    ):
        bad.write_bytes(content)
        with pytest.raises(SurfaceError, match=says):
            Surface.load(bad)
    bad.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SurfaceError, match="more than"):
        Surface.load(bad)
