"""Names, paths and hub ids: what is meant, and what to say when nothing is."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uma_engine.catalog as catalog
from uma_engine.catalog import DEFAULT_MODEL, cache_dir, list_models, resolve
from uma_engine.catalog.catalog import CatalogEntry
from uma_engine.catalog.download import PackageSource, PinnedFile
from uma_engine.errors import DownloadError, UnknownModel

NAMES = ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "minilm-l6"]


def test_the_catalog_lists_every_model_with_its_pins():
    entries = list_models()
    assert [entry.name for entry in entries] == NAMES
    assert DEFAULT_MODEL in NAMES
    for entry in entries:
        assert entry.licence
        assert entry.description
        for pinned in [entry.file] + ([entry.tokenizer] if entry.tokenizer else []):
            assert re.fullmatch(r"[0-9a-f]{64}", pinned.sha256), entry.name
            for source in pinned.sources:
                if isinstance(source, PackageSource):
                    assert sum(part.member_size for part in source.parts) == pinned.size
                    assert len({part.wheel for part in source.parts}) == len(source.parts)
                    assert all(re.fullmatch(r"[0-9a-f]{64}", part.wheel_sha256) for part in source.parts)
                else:
                    assert source.revision


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UMA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "uma-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "uma-engine"
    monkeypatch.setenv("UMA_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_a_cached_file_is_found_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("UMA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    content = b"a model" * 1000
    pinned = PinnedFile("tiny.gguf", len(content), hashlib.sha256(content).hexdigest(), ())
    entry = CatalogEntry("tiny", "for a test", "MIT", "language", pinned)
    monkeypatch.setattr("uma_engine.catalog.catalog._entries", lambda: {"tiny": entry})
    assert not entry.cached
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(content)
    assert entry.cached
    assert resolve("tiny") == entry.path
    entry.path.write_bytes(content[:-1] + b"L")  # as many bytes, but others
    with pytest.raises(DownloadError, match="could not be fetched"):
        resolve("tiny")


def test_paths_are_taken_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert resolve("m.gguf") == Path("m.gguf")
    assert resolve("org/name") == Path("org/name")  # a directory that is there comes before a hub id


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("smollm2", "smollm2-135m"), ("Gemma3-270M", "gemma3-270m"), ("qwen2.5-coder", "qwen2.5-coder-0.5b")],
)
def test_an_unknown_name_is_answered_with_near_ones(wrong, near):
    with pytest.raises(UnknownModel) as caught:
        resolve(wrong)
    assert f"`{near}`" in caught.value.hint


@pytest.mark.parametrize(
    "wrong", ["", "no/such/path", "models/none.gguf", "../x", "a b/c", "x" * 5000, "\0", "~nobody-here/x", "http://h/x"]
)
def test_what_is_nothing_at_all_is_unknown(monkeypatch, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel) as caught:
        resolve(wrong)
    assert caught.value.hint
    assert len(caught.value.message) < 400


def test_a_path_that_is_not_there_is_unknown(tmp_path):
    with pytest.raises(UnknownModel):
        resolve(tmp_path / "missing.gguf")


@pytest.mark.parametrize("name", ["org/name", "org/name/file.gguf"])
def test_a_hub_id_without_the_hub_extra_says_what_to_install(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError) as caught:
        resolve(name)
    assert "uma-engine[hub]" in caught.value.hint


def test_listing_models_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from uma_engine.catalog import list_models, resolve; list_models(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_of_the_package_is_there():
    for name in catalog.__all__:
        assert getattr(catalog, name) is not None
    with pytest.raises(AttributeError):
        _ = catalog.nothing
    assert catalog.CatalogEntry is CatalogEntry
