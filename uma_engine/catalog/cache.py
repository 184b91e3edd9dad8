"""Where cached files live, and the digests of files that are already on this machine.

Knows the cache directory and sha256; does not know models, sources or networks.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

__all__ = ["cache_dir", "file_digest", "files_digest", "remember_digest"]


def cache_dir() -> Path:
    """`UMA_CACHE`, else `$XDG_CACHE_HOME/uma-engine`, else `~/.cache/uma-engine`. It need not exist yet."""
    if own := os.environ.get("UMA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "uma-engine"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex.

    The answer is remembered in the cache under the file's path, size and change times, so that asking again costs
    nothing while the file is untouched.
    """
    memo, stamp = _memo(path)
    try:
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked before, or the note is unusable: compute
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write(memo, {"stamp": stamp, "sha256": digest})
    return digest


def remember_digest(path: Path, digest: str) -> None:
    """Note the sha256 of a file that the caller has just read as a whole, so that `file_digest` need not."""
    memo, stamp = _memo(path)
    _write(memo, {"stamp": stamp, "sha256": digest})


def _memo(path: Path) -> tuple[Path, list[str | int]]:
    """(where a file's digest is noted, what must be unchanged for the note to hold)"""
    path = path.resolve()
    stat = path.stat()
    stamp: list[str | int] = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json", stamp


def _write(memo: Path, note: dict[str, object]) -> None:
    scratch = memo.with_suffix(f".{os.getpid()}.tmp")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(note))
        scratch.replace(memo)
    except OSError:  # a cache that cannot be written only costs time
        scratch.unlink(missing_ok=True)


def files_digest(paths: list[Path]) -> str:
    """One digest over the names and contents of several files, hex; their order does not matter."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        total.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return total.hexdigest()
