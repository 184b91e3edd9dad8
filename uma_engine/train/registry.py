"""A local registry: adapters by content, reports beside them, and which one each surface uses; every change in a chain.

Knows files, digests and aliases; does not know models. `objects/DIGEST/` holds an adapter as it was added, `log.jsonl` one line for each
change, whose digest covers the line before: an edited or missing line shows. Aliases are what the log says, so nothing else can be changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from uma_engine.errors import CorruptFile, InvalidRequest
from uma_engine.train.artifact import adapter_digest
from uma_engine.train.gates import Gates, report_digest, verdict

__all__ = ["AdapterHistory", "Refused"]

START = "0" * 64


class Refused(InvalidRequest):
    """A promotion that the gates do not allow."""

    status = 409


class AdapterHistory:
    """A registry in a directory, which is made if need be. One writer at a time; readers need no lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        (self.path / "objects").mkdir(parents=True, exist_ok=True)
        self._log = self.path / "log.jsonl"
        self._log.touch(exist_ok=True)

    def add(self, adapter: str | Path) -> str:
        """Copy an adapter's directory in; its digest. Adding the same content again changes nothing."""
        source = Path(adapter)
        if not (source / "adapter_config.json").is_file():
            raise InvalidRequest(
                f"`{source}` is no adapter", hint="give the directory that `uma train` made", param="adapter"
            )
        digest = adapter_digest(source)
        with self._writing():
            target = self.path / "objects" / digest
            if not target.exists():
                partial = target.with_name(f".{digest}.part")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source, partial)
                partial.replace(target)
                self._append({"event": "added", "adapter": digest})
        return digest

    def promote(self, surface: str, digest: str, report: Mapping[str, Any] | None, gates: Gates | None = None) -> None:
        """Let `surface` use an adapter. `report` is about it and the one that the surface uses now (the bare base at first).

        Errors:  Refused, saying why; InvalidRequest for a report about something else
        """
        with self._writing():
            current = self.aliases().get(surface)
            if not (self.path / "objects" / digest).is_dir():
                raise InvalidRequest(f"there is no adapter `{digest[:12]}`", hint="add it first", param="adapter")
            if report is None:
                raise Refused("there is no report", hint="`uma evaluate` makes one")
            if report_digest(report) != report.get("digest"):
                raise InvalidRequest("the report is not as it was written", hint="evaluate again", param="report")
            if report.get("adapter_files") != digest or report.get("against_files") != current:
                raise InvalidRequest(
                    f"the report is about `{str(report.get('adapter_files'))[:12]}` against `{str(report.get('against_files'))[:12]}`"
                    f" but `{digest[:12]}` would follow `{str(current)[:12]}`",
                    hint="evaluate against what the surface uses now",
                    param="report",
                )
            found = verdict(report, gates or Gates())
            self._append(
                {"event": "judged", "surface": surface, "adapter": digest, "decision": found.decision, "report": report}
            )
            if found.decision != "allow":
                raise Refused(f"{found.decision}: {'; '.join(found.reasons)}", hint="the surface uses what it used")
            self._append({"event": "promoted", "surface": surface, "adapter": digest, "from": current})

    def rollback(self, surface: str) -> str | None:
        """Back to what the surface used before its last promotion; that adapter's digest, None for the bare base. Errors: InvalidRequest"""
        with self._writing():
            used = self._used().get(surface)
            if not used:
                raise InvalidRequest(f"surface `{surface}` has nothing to go back to", param="surface")
            before = used[-2] if len(used) > 1 else None
            self._append({"event": "rolled back", "surface": surface, "adapter": before, "from": used[-1]})
        return before

    def aliases(self) -> dict[str, str]:
        """Which adapter each surface uses; who is not there uses the bare base."""
        return {surface: used[-1] for surface, used in self._used().items() if used}

    def _used(self) -> dict[str, list[str]]:
        """What each surface has used, the last of it now, without what was rolled back."""
        found: dict[str, list[str]] = {}
        for line in self.lines():
            if line["event"] == "promoted":
                found.setdefault(line["surface"], []).append(line["adapter"])
            elif line["event"] == "rolled back":
                found[line["surface"]].pop()
        return found

    def directory(self, digest: str) -> Path:
        """Where an adapter is; its bytes are compared with its digest. Errors: CorruptFile, InvalidRequest"""
        path = self.path / "objects" / digest
        if not path.is_dir():
            raise InvalidRequest(f"there is no adapter `{digest[:12]}`", param="adapter")
        if adapter_digest(path) != digest:
            raise CorruptFile(f"the adapter in `{path}` is not what it was when it was added")
        return path

    def lines(self) -> Iterator[dict[str, Any]]:
        """The log, checked as it is read. Errors: CorruptFile, naming the line"""
        last = START
        for number, text in enumerate(self._log.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                told = line.pop("digest")
            except (ValueError, KeyError, AttributeError):
                raise CorruptFile(f"`{self._log}`, line {number} is damaged") from None
            if line.get("after") != last or _digest(line) != told:
                raise CorruptFile(f"`{self._log}`, line {number} was changed, or one before it is missing")
            last = told
            yield line

    @property
    def head(self) -> str:
        """The last line's digest: kept elsewhere it shows that lines at the end are missing."""
        last = START
        for line in self.lines():
            last = _digest(line)
        return last

    def _append(self, line: dict[str, Any]) -> None:
        line = {**line, "time": datetime.now(UTC).isoformat(timespec="seconds"), "after": self.head}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"digest": _digest(line)}, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()
