"""Hard filters over typed fields: who may be found at all, before anything is scored.

Knows fields, comparisons and columns of values; does not know texts, vectors or files. Who lacks a field does not pass a filter on it
unless the filter says so: a missing number is nobody's fault, and dropping people for it must be somebody's decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from uma_engine.errors import InvalidRequest

__all__ = ["Column", "Condition", "Where", "allowed", "columns_of", "parse_where"]

Kind = Literal["number", "text", "flag"]
Where = Mapping[str, Any]

_KINDS: dict[type, Kind] = {bool: "flag", int: "number", float: "number", str: "text"}
_ORDER = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
OPERATORS = ("=", "!=", "in", *_ORDER)


@dataclass(frozen=True)
class Column:
    """One field of everybody: `values` [N] fp64, a number, 0 or 1, or the place of a text in `texts`; NaN where it is missing."""

    kind: Kind
    values: np.ndarray
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """`field` compared with `value`; `or_missing`: who lacks the field passes."""

    field: str
    operator: str
    value: Any
    or_missing: bool = False


def columns_of(facts: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> dict[str, Column]:
    """The fields of everybody's facts. Lists and objects cannot be filtered by and make no column.

    Errors:  InvalidRequest where a field has one kind of value for one candidate and another for another
    """
    kinds: dict[str, tuple[Kind, str]] = {}
    values: dict[str, np.ndarray] = {}
    texts: dict[str, dict[str, int]] = {}
    for row, of_one in enumerate(facts):
        for field, value in of_one.items():
            kind = _KINDS.get(type(value))
            if kind is None:
                continue
            known, first = kinds.setdefault(field, (kind, ids[row]))
            if known != kind:
                raise InvalidRequest(
                    f"field `{field}` is a {known} for candidate `{first}` but a {kind} for `{ids[row]}`",
                    hint="give a field one type for everybody",
                    param=field,
                )
            if field not in values:
                values[field] = np.full(len(facts), np.nan)
            values[field][row] = (
                texts.setdefault(field, {}).setdefault(value, len(texts[field])) if kind == "text" else value
            )
    return {f: Column(kinds[f][0], values[f], tuple(texts.get(f, ()))) for f in sorted(values)}


def parse_where(where: Where | None) -> tuple[Condition, ...]:
    """`{"rate": {"<=": 60}, "country": ["DE", "AT"], "remote": True}`: all must hold. A bare value must be equal, a list must hold it;
    `{"<=": 60, "or_missing": True}` lets who lacks the field pass.

    Errors:  InvalidRequest
    """
    if where is None:
        return ()
    if not isinstance(where, Mapping):
        raise InvalidRequest(f"`where` is a `{type(where).__name__}` but must be a mapping of fields", param="where")
    found: list[Condition] = []
    for field, wanted in where.items():
        if isinstance(wanted, Mapping):
            or_missing = wanted.get("or_missing", False)
            if not isinstance(or_missing, bool):
                raise InvalidRequest(f"`or_missing` of `{field}` is `{or_missing!r}` but must be a bool", param="where")
            comparisons = {op: value for op, value in wanted.items() if op != "or_missing"}
        else:
            or_missing, comparisons = False, {"in" if isinstance(wanted, list | tuple) else "=": wanted}
        if not comparisons:
            raise InvalidRequest(f"the filter on `{field}` compares with nothing", param="where")
        for operator, value in comparisons.items():
            if operator not in OPERATORS:
                raise InvalidRequest(
                    f"`{operator}` in the filter on `{field}` is no comparison",
                    hint=f"use one of {' '.join(OPERATORS)}",
                    param="where",
                )
            many = value if operator == "in" and isinstance(value, list | tuple) else [value]
            if (operator == "in") != isinstance(value, list | tuple) or not all(_plain(v) for v in many):
                raise InvalidRequest(
                    f"the filter on `{field}` compares with `{value!r}`",
                    hint="compare with a finite number, a text or a bool, and `in` with a list of them",
                    param="where",
                )
            found.append(Condition(field, operator, value, or_missing))
    return tuple(found)


def _plain(value: Any) -> bool:
    return type(value) in _KINDS and (not isinstance(value, float) or math.isfinite(value))


def allowed(conditions: Sequence[Condition], columns: Mapping[str, Column], count: int) -> np.ndarray:
    """Who passes: [count] bool. Errors: InvalidRequest for a field that nobody has, or a comparison of another kind"""
    passes = np.ones(count, bool)
    for condition in conditions:
        column = columns.get(condition.field)
        if column is None:
            raise InvalidRequest(
                f"nobody in the index has a field `{condition.field}`",
                hint=f"fields are: {', '.join(columns) or 'none'}",
                param="where",
            )
        missing = np.isnan(column.values)
        passes &= np.where(missing, condition.or_missing, _holds(condition, column))
    return passes


def _holds(condition: Condition, column: Column) -> np.ndarray:
    wanted = condition.value if condition.operator == "in" else [condition.value]
    for value in wanted:
        if _KINDS[type(value)] != column.kind or (condition.operator in _ORDER and column.kind != "number"):
            raise InvalidRequest(
                f"field `{condition.field}` is a {column.kind} and cannot be compared by `{condition.operator}` with `{value!r}`",
                param="where",
            )
    if condition.operator in _ORDER:
        with np.errstate(invalid="ignore"):
            return np.asarray(_ORDER[condition.operator](column.values, float(condition.value)))
    places = {text: place for place, text in enumerate(column.texts)}
    numbers = [places.get(v, -1) if column.kind == "text" else float(v) for v in wanted]
    found = np.isin(column.values, numbers)
    return ~found if condition.operator == "!=" else found
