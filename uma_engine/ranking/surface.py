"""A surface: the declaration of what a score is made of. Facts, reads, weights, ties and redaction, in TOML or in Python.

Knows declarations and checks them strictly; does not know engines or candidates. Its plain form, `to_dict`, goes into decision
records and is read back by `from_dict`: the same surface, the same digest.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from uma_engine.errors import SurfaceError
from uma_engine.ranking.calibration import Calibration
from uma_engine.ranking.factors import Fact, curve_from
from uma_engine.ranking.ledger import AGGREGATES, Aggregate
from uma_engine.ranking.presidio import check_finder
from uma_engine.ranking.redaction import KINDS, check_kinds

__all__ = ["DEFAULT_PROBE", "Read", "Surface", "TieOrder", "question_of"]

DEFAULT_PROBE = "Is the candidate a good fit for the job? Answer {labels}."  # what `rank` asks without a surface
MAX_FILE_BYTES = 2**20
MAX_FACTORS = 64
MAX_WEIGHT = 1e6
TieOrder = Literal["lot", "index"]


def question_of(probe: str, labels: Sequence[str]) -> str:
    """A probe with its label words: `yes or no`, `yes, no or maybe`."""
    return probe.strip().replace("{labels}", ", ".join(labels[:-1]) + f" or {labels[-1]}")


@dataclass(frozen=True, slots=True)
class Read:
    """A factor that a model reads: the probability of `labels[0]` among the labels after the candidate's text and `probe`.

    `{labels}` in the probe stands for the label words. Probes of one adapter share the candidate's computed text, and the words
    that they all begin with: what they have in common belongs in front. `calibration`: none, one fitted for this read, the path of
    its file, or True: it lies beside the adapter.
    """

    name: str
    probe: str = DEFAULT_PROBE
    labels: tuple[str, ...] = ("yes", "no")
    weight: float = 1.0
    adapter: str | None = None
    calibration: Calibration | Path | Literal[True] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.labels, list):
            object.__setattr__(self, "labels", tuple(self.labels))

    @property
    def question(self) -> str:
        """The probe with its label words."""
        return question_of(self.probe, self.labels)

    def to_dict(self) -> dict[str, Any]:
        calibration: Any = self.calibration
        if isinstance(calibration, Calibration):
            calibration = calibration.to_dict()
        elif calibration is not None:
            calibration = True if calibration is True else str(calibration)
        return {
            "name": self.name,
            "probe": self.probe,
            "labels": list(self.labels),
            "weight": self.weight,
            "adapter": self.adapter,
            "calibration": calibration,
        }


@dataclass(frozen=True, slots=True)
class Surface:
    """Factors in the order of the ledger, facts first, and how they make a score and an order.

    `resolution`: scores that differ by less are a tie, shown as one. `tie_order`: within a tie a `lot`, drawn from the job and the
    candidates' ids and so the same again for the same question but nobody's advantage over many; or the input's `index`.
    `redact`: what is taken out of texts before a read sees them. `name_fields`: facts that hold names the candidate goes by.
    `redact_with`: finders beside the rules, see `ranking.presidio`. `adapters` says where adapters lie, for who loads them.
    """

    name: str
    facts: tuple[Fact, ...] = ()
    reads: tuple[Read, ...] = ()
    aggregate: Aggregate = "mean"
    resolution: float = 0.0
    tie_order: TieOrder = "lot"
    instruction: str | None = None
    redact: tuple[str, ...] = KINDS
    name_fields: tuple[str, ...] = ("name",)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    redact_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _words("name", self.name)
        for key in ("facts", "reads", "redact", "name_fields", "redact_with"):
            if isinstance(getattr(self, key), str):
                raise SurfaceError(f"`{key}` is a single string but must be a list")
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for kind, items in (("Fact", self.facts), ("Read", self.reads)):
            for item in items:
                if type(item).__name__ != kind:
                    raise SurfaceError(f"a {kind.lower()} of the surface is a `{type(item).__name__}`")
        factors: tuple[Fact | Read, ...] = (*self.facts, *self.reads)
        if not 1 <= len(factors) <= MAX_FACTORS:
            raise SurfaceError(f"surface `{self.name}` has {len(factors)} factors but must have 1 to {MAX_FACTORS}")
        _choice("aggregate", self.aggregate, AGGREGATES)
        _choice("tie_order", self.tie_order, get_args(TieOrder))
        most = 1.0 if self.aggregate == "product" else MAX_WEIGHT
        for factor in factors:
            _words("a factor's `name`", factor.name)
            _check_number(f"factor `{factor.name}`: `weight`", factor.weight, 0.0, most, open_low=True)
        _distinct("factors with the name", (f.name for f in factors))
        _check_number("`resolution`", self.resolution, 0.0, 1.0)
        object.__setattr__(self, "redact", check_kinds(self.redact))
        _distinct("finders", map(check_finder, self.redact_with))
        if self.redact_with and not self.redact:
            raise SurfaceError("`redact_with` is given but `redact` is off", hint="leave one of them out")
        if self.instruction is not None:
            _words("instruction", self.instruction)
        for read in self.reads:
            _check_read(read)
        _distinct("reads that ask", (f"{r.question} {list(r.labels)} {r.adapter}" for r in self.reads))
        object.__setattr__(self, "adapters", {name: Path(path) for name, path in self.adapters.items()})

    @classmethod
    def load(cls, path: str | Path) -> Surface:
        """A surface from a TOML file; paths in it are relative to its directory. Errors: SurfaceError naming the place"""
        path = Path(path)
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise SurfaceError(f"surface `{path}` cannot be read: {error.strerror}") from None
        if len(raw) > MAX_FILE_BYTES:
            raise SurfaceError(f"surface `{path}` has more than {MAX_FILE_BYTES} bytes")
        try:
            data = tomllib.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SurfaceError(f"surface `{path}` is not TOML: {error}") from None
        try:
            return cls.from_dict(data, base=path.absolute().parent)
        except SurfaceError as error:
            raise SurfaceError(f"`{path}`: {error.message}", hint=error.hint, param="surface") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, base: Path | None = None) -> Surface:
        """A surface from plain data, as TOML or JSON have it. `base`: where relative paths begin. Errors: SurfaceError"""
        keys = ("name", "aggregate", "resolution", "tie_order", "instruction", "name_fields")
        table = _table(data, "the surface", (*keys, "facts", "reads", "redact", "redact_with", "adapters"))
        found: dict[str, Any] = {key: table[key] for key in keys if table.get(key) is not None}
        if "name" not in found:
            raise SurfaceError("the surface has no `name`")
        if "name_fields" in found:
            found["name_fields"] = _strings(found["name_fields"], "name_fields")
        found["facts"] = tuple(_fact(item, place) for place, item in _entries(table, "facts"))
        found["reads"] = tuple(_read(item, place, base) for place, item in _entries(table, "reads"))
        redact = table.get("redact", True)
        found["redact"] = (KINDS if redact else ()) if isinstance(redact, bool) else _strings(redact, "redact")
        if table.get("redact_with") is not None:
            found["redact_with"] = _strings(table["redact_with"], "redact_with")
        adapters = _table(table.get("adapters") or {}, "`adapters`", None)
        for name, path in adapters.items():
            if not isinstance(path, str):
                raise SurfaceError(f"`adapters.{name}` is `{path!r}` but must be a path")
        found["adapters"] = {name: _path(path, base) for name, path in adapters.items()}
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Where adapters lie is left out: it is no part of what the surface says."""
        finders = {"redact_with": list(self.redact_with)} if self.redact_with else {}
        return finders | {
            "name": self.name,
            "aggregate": self.aggregate,
            "resolution": self.resolution,
            "tie_order": self.tie_order,
            "instruction": self.instruction,
            "redact": list(self.redact),
            "name_fields": list(self.name_fields),
            "facts": [fact.to_dict() for fact in self.facts],
            "reads": [read.to_dict() for read in self.reads],
        }

    @property
    def digest(self) -> str:
        """Of what it says: `60` and `60.0` are one number, for a declaration read back from plain data may have either."""
        return hashlib.sha256(json.dumps(_doubles(self.to_dict()), sort_keys=True).encode()).hexdigest()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of all factors, in the order of the ledger."""
        return (*(fact.weight for fact in self.facts), *(read.weight for read in self.reads))

    def without_redaction(self) -> Surface:
        return replace(self, redact=(), redact_with=())


def _doubles(value: Any) -> Any:
    """Plain data with every number a double."""
    if isinstance(value, Mapping):
        return {key: _doubles(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_doubles(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_read(read: Read) -> None:
    where = f"read `{read.name}`"
    if not isinstance(read.probe, str) or not read.probe.strip():
        raise SurfaceError(f"{where}: `probe` is empty", hint="ask a question that the labels answer")
    if "\u27e6" in read.probe:
        raise SurfaceError(f"{where}: `probe` holds `\u27e6`, which the prompt uses for itself")
    if isinstance(read.labels, str) or len(read.labels) < 2 or not all(isinstance(x, str) and x for x in read.labels):
        raise SurfaceError(f"{where}: `labels` is `{read.labels!r}` but must be at least two words")
    if len(set(read.labels)) != len(read.labels):
        raise SurfaceError(f"{where}: `labels` are `{list(read.labels)}` but must be distinct")
    if read.adapter is not None:
        _words(f"{where}: `adapter`", read.adapter)
    if not (read.calibration is True or isinstance(read.calibration, Calibration | Path | None)):
        raise SurfaceError(f"{where}: `calibration` is a `{type(read.calibration).__name__}`")
    if read.calibration is True and read.adapter is None:
        raise SurfaceError(
            f"{where}: `calibration` is to lie beside the adapter but the read has none",
            hint="give the path of its file",
        )


def _fact(item: object, place: str) -> Fact:
    table = _table(item, place, ("name", "field", "curve", "missing", "weight", "against", "domain"))
    for key in ("field", "curve", "missing"):
        if table.get(key) is None:
            raise SurfaceError(
                f"{place} has no `{key}`",
                hint="`missing` is the neutral value of who has no such fact" if key == "missing" else None,
            )
    _words(f"{place}: `field`", table["field"])
    domain = table.get("domain")
    if domain is not None and not (isinstance(domain, list) and len(domain) == 2 and all(map(_is_number, domain))):
        raise SurfaceError(f"{place}: `domain` is `{domain!r}` but must be `[lowest, highest]`")
    if table.get("against") is not None:
        _words(f"{place}: `against`", table["against"])
    _check_number(f"{place}: `missing`", table["missing"], 0.0, 1.0)
    return _placed(
        place,
        lambda: Fact(
            name=table.get("name") or table["field"],
            field=table["field"],
            curve=curve_from(table["curve"]),
            missing=float(table["missing"]),
            weight=table.get("weight", 1.0),
            against=table.get("against"),
            domain=(float(domain[0]), float(domain[1])) if domain else None,
        ),
    )


def _read(item: object, place: str, base: Path | None) -> Read:
    table = _table(item, place, ("name", "probe", "labels", "weight", "adapter", "calibration"))
    if table.get("name") is None:
        raise SurfaceError(f"{place} has no `name`")
    given = table.get("calibration")
    calibration: Calibration | Path | Literal[True] | None
    if given is None or given is False:
        calibration = None
    elif given is True:
        calibration = True
    elif isinstance(given, str):
        calibration = _path(given, base)
    else:
        calibration = _placed(place, lambda: Calibration.from_dict(given))
    options = {key: table[key] for key in ("probe", "weight", "adapter") if table.get(key) is not None}
    if table.get("labels") is not None:
        options["labels"] = _strings(table["labels"], f"{place}: labels")
    return Read(name=table["name"], calibration=calibration, **options)


def _placed(place: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except SurfaceError as error:
        raise SurfaceError(f"{place}: {error.message}", hint=error.hint) from None


def _entries(table: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    items = table.get(key) or []
    if not isinstance(items, list):
        raise SurfaceError(f"`{key}` is `{items!r}` but must be a list", hint=f"in TOML each begins with `[[{key}]]`")
    return [(f"`{key}[{index}]`", item) for index, item in enumerate(items)]


def _table(value: object, what: str, keys: Collection[str] | None) -> Mapping[str, Any]:
    """A mapping with known keys only."""
    if not isinstance(value, Mapping):
        raise SurfaceError(f"{what} is `{value!r}` but must be a table")
    for key in value:
        if keys is not None and key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean `{near[0]}`" if near else "known are " + ", ".join(f"`{k}`" for k in keys)
            raise SurfaceError(f"{what} has a key `{key}` that is not known", hint=hint)
    return value


def _strings(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise SurfaceError(f"`{what}` is `{value!r}` but must be a list of strings")
    return tuple(value)


def _words(what: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise SurfaceError(f"{what if '`' in what else f'`{what}`'} is `{value!r}` but must be words")


def _choice(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise SurfaceError(f"`{what}` is `{value}`", hint="it is " + " or ".join(f"`{c}`" for c in choices))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _check_number(what: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if not _is_number(value) or not low <= value <= high or (open_low and value == low):
        raise SurfaceError(
            f"{what} is `{value!r}` but must be a number {'above' if open_low else 'from'} {low:g} to {high:g}"
        )


def _distinct(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SurfaceError(f"there are two {what} `{name}`")
        seen.add(name)


def _path(path: str, base: Path | None) -> Path:
    given = Path(path).expanduser()
    return given if base is None else base / given
