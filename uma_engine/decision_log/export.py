"""What one person gets: every decision about them, with what was asked and what answered, and nothing of anybody else.

Knows entries; does not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uma_engine.decision_log.types import Entry

__all__ = ["export_of"]

FORMAT = "uma-candidate-export/1"
_SHARED = ("format", "created_at", "query", "options", "stack", "adapters", "warnings")


def export_of(
    candidate_id: str,
    tenant: str,
    parts: Sequence[tuple[Entry, int, dict[str, Any], tuple[str, str]]],
    forgets: Sequence[Entry],
) -> dict[str, Any]:
    """`parts`: entry, place in it, content, and its salt and commitment: with these two anyone can check the content against the log."""
    records = []
    for entry, place, part, (salt, sealed) in parts:
        records.append(
            {
                "record": entry.id,
                "at": entry.at,
                "digest": entry.digest,
                "asked": {key: entry.record[key] for key in _SHARED if key in entry.record},
                "candidates": entry.num_candidates,
                "place": _place(entry, place),
                "about": part["items"],
                "salt": salt,
                "commitment": sealed,
            }
        )
    forgotten = [{"entry": e.id, "at": e.at, "records": sorted({n for n, _ in e.record["parts"]})} for e in forgets]
    return {
        "format": FORMAT,
        "candidate": candidate_id,
        "tenant": tenant,
        "records": records,
        "forgotten": forgotten,
    }


def _place(entry: Entry, index: int) -> int | None:
    """1 for the best score; None where others were forgotten since and the record does not say it itself."""
    results = entry.record.get("results") or []
    if index >= len(results):
        return None
    if "place" in results[index]:
        return results[index]["place"]
    if any("score" not in result for result in results):
        return None
    scores = [float.fromhex(result["score"]) for result in results]
    return 1 + sum(score > scores[index] for score in scores)
