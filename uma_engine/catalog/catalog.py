"""From what a person calls a model to where it lies: a path, a name of ours, or an id of the model hub.

Knows the names and their pinned files; does not know how a model is read or run.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from uma_engine.catalog.cache import cache_dir
from uma_engine.catalog.download import HubSource, PackagePart, PackageSource, PinnedFile, ensure_file
from uma_engine.catalog.package_index import Progress
from uma_engine.errors import DownloadError, InvalidRequest, UnknownModel

__all__ = ["DEFAULT_ADAPTER", "DEFAULT_MODEL", "CatalogEntry", "list_models", "resolve"]

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_ADAPTER = "talent-match"  # comes with the package, for the default model
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w./-]+\.gguf))?")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that can be asked for by name."""

    name: str
    description: str
    licence: str
    kind: str  # "language" or "embedding"
    file: PinnedFile
    tokenizer: PinnedFile | None = None  # where the file does not hold one

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.size

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache."""
        return _models_dir() / self.file.filename

    @property
    def cached(self) -> bool:
        files = [self.file] if self.tokenizer is None else [self.file, self.tokenizer]
        paths = [(_models_dir() / file.filename, file.size) for file in files]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _models_dir() -> Path:
    return cache_dir() / "models"


@functools.cache
def _entries() -> dict[str, CatalogEntry]:
    text = resources.files("uma_engine.catalog").joinpath("sources.toml").read_text("utf-8")
    return {name: _entry(name, table) for name, table in tomllib.loads(text).items()}


def _entry(name: str, table: dict[str, Any]) -> CatalogEntry:
    tokenizer = _pinned(table["tokenizer"]) if "tokenizer" in table else None
    return CatalogEntry(name, table["description"], table["licence"], table["kind"], _pinned(table), tokenizer)


def _pinned(table: dict[str, Any]) -> PinnedFile:
    sources: list[PackageSource | HubSource] = []
    for source in table["sources"]:
        if source["kind"] == "package":
            sources.append(PackageSource(tuple(PackagePart(**part) for part in source["parts"])))
        else:
            sources.append(HubSource(source["repo"], source["filename"], source["revision"]))
    return PinnedFile(table["file"], table["size"], table["sha256"], tuple(sources))


def list_models() -> list[CatalogEntry]:
    """All names of the catalog, in its order."""
    return list(_entries().values())


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """The file or directory of a model, fetched first if need be.

    Semantics:  a Path is taken as it is. A string is a catalog name, an existing path, or a hub id: `org/name` for
                safetensors, `org/name/file.gguf` for one GGUF file. `progress(bytes_done, bytes_total, label)` is
                called while a catalog file is fetched. A tokenizer that is a file of its own is put beside the model's.
    Errors:     UnknownModel, with near names, when it is none of these; DownloadError when it cannot be fetched
    """
    if isinstance(model, str) and model in _entries():
        entry = _entries()[model]
        if entry.tokenizer is not None:
            ensure_file(entry.tokenizer, _models_dir(), progress)
        return ensure_file(entry.file, _models_dir(), progress)
    try:
        if str(model) and (path := Path(model).expanduser()).exists():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, no such user
        pass
    if isinstance(model, str) and (found := HUB_ID.fullmatch(model)) and not _looks_local(model):
        return _from_hub(found[1], found[2])
    near = difflib.get_close_matches(str(model).lower(), _entries(), n=3, cutoff=0.4)
    raise UnknownModel(
        f"`{str(model)[:200]}` is neither a catalog name, nor a path, nor a hub id",
        hint=f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
        if near
        else f"known are {', '.join(_entries())}",
        param="model",
    )


def _looks_local(model: str) -> bool:
    """`dir/file.gguf` and the like were meant as paths; a hub id has an owner, a name, and at most a file in it."""
    return model.count("/") == 1 and Path(model).suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def _from_hub(repo: str, filename: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
    except ImportError:
        raise DownloadError(
            f"`{repo}` is on the model hub, which needs `huggingface_hub`",
            hint="install it: `pip install 'uma-engine[hub]'`; or give a catalog name or a path",
            param="model",
        ) from None
    try:
        if filename is not None:
            return Path(hf_hub_download(repo, filename))
        path = Path(snapshot_download(repo, allow_patterns=HUB_PATTERNS))
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError):
        raise UnknownModel(f"the model hub has no `{repo}`" + (f" with `{filename}`" if filename else "")) from None
    except Exception as error:  # the library has dozens of its own, and those of its HTTP client
        first_line = str(error).strip().partition("\n")[0]
        raise DownloadError(f"the model hub does not give `{repo}`: {first_line}") from None
    if not any(path.glob("*.safetensors")):
        raise InvalidRequest(
            f"`{repo}` has no safetensors", hint=f"name one GGUF file: `{repo}/FILE.gguf`", param="model"
        )
    return path
