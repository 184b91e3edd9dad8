"""Records and logs for the tests of the decision log, and what somebody with the file and a database program would do."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from uma_engine.decision_log import DecisionLog

ANA = "ana-id-7f3a91"
PLANTED = "Zürich-Oerlikon planted-4711 東京の人 \U0001f469\u200d\U0001f4bb, ten years of Rust"


def record(*names: str, query: str = "We need a Rust engineer", **more: Any) -> dict[str, Any]:
    people = [
        {
            "id": name,
            "text": PLANTED * 30 if name == ANA else f"the text of {name}",
            "facts": {"name": f"{name} Q.", "rate": 40.5},
        }
        for name in names
    ]
    results = [
        {"id": name, "score": (0.9 - i / 16).hex(), "logits": ["0x1p-1"], "truncated_tokens": 0, "ledger": []}
        for i, name in enumerate(names)
    ]
    return {
        "format": "uma-decision-record/1",
        "query": query,
        "candidates": people,
        "options": {"labels": ["yes", "no"], "bo": "bo"},
        "results": results,
        "warnings": [],
    } | more


def made(folder: Path) -> tuple[Path, str]:
    """A log of four records and a forgetting; its path and head."""
    with DecisionLog(folder / "log.uma") as log:
        for names in ((ANA, "bo"), ("bo", "cy"), (ANA,), ("dee",)):
            log.append(record(*names))
        log.forget("cy")
        return log.path, log.verify().head


def copied(original: tuple[Path, str], folder: Path) -> Path:
    for file in original[0].parent.iterdir():
        shutil.copy(file, folder)
    return folder / "log.uma"


def problems(path: Path, expect: str | None = None) -> list[str]:
    with DecisionLog(path, readonly=True) as log:
        return list(log.verify(expect).problems)


def edit(path: Path, *statements: tuple[str, tuple[Any, ...]] | str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            sql, values = (statement, ()) if isinstance(statement, str) else statement
            db.execute(sql, values)
        db.commit()
