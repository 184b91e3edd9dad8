"""Packed weights on disk: the same bits at the second start, and nothing believed that is not what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_model
from uma_engine.catalog import open_model
from uma_engine.catalog.cache import file_digest
from uma_engine.layers.batch_input import BatchInput, KVCacheTensors
from uma_engine.models import DecoderModel, PackedCache, load_model, packed_cache
from uma_kernels import dispatch
from uma_kernels.attention import AttentionBatch
from uma_kernels.testing import assert_invariant

pytestmark = pytest.mark.skipif(dispatch.C is None, reason="only the compiled kernels have a packed form")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(packed_cache, "SMALLEST", 0)
    monkeypatch.setenv("UMA_CACHE", str(tmp_path / "cache"))
    return open_model(make_tiny_model(tmp_path / "model"))


def load(files: Any, directory: Path, digest: str | None = None) -> DecoderModel:
    return load_model(files, max_positions=64, packed=PackedCache(directory, digest or files.digest, file_digest))


def hidden(model: DecoderModel) -> torch.Tensor:
    c, n = model.config, 9
    ends = torch.tensor([0, n], dtype=torch.int32)
    empty = [torch.zeros(1, c.num_kv_heads, c.head_dim) for _ in range(c.num_layers)]
    batch = BatchInput(
        input_ids=torch.arange(3, 3 + n),
        positions=torch.arange(n),
        attention=AttentionBatch(ends, -1 - torch.arange(n, dtype=torch.int32), ends),
        slot_mapping=torch.full((n,), -1, dtype=torch.int32),
        output_rows=torch.arange(n),
    )
    return model.forward(batch, KVCacheTensors(empty, empty))


class Untouchable:
    """A source whose tensors nobody may read."""

    def __init__(self, files: Any) -> None:
        self.config, self.digest, self.names = files.config, files.digest, files.names

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(f"`{name}` was read although its packed form is there")


def test_the_second_start_packs_nothing_and_has_the_same_bits(files: Any, tmp_path: Path) -> None:
    first = load(files, tmp_path / "packed")
    second = load(Untouchable(files), tmp_path / "packed")
    assert_invariant(hidden(second), hidden(first))
    assert second.num_bytes == first.num_bytes
    assert sorted(p.suffix for p in (tmp_path / "packed").iterdir()) == [".bin", ".json"]


def test_another_source_or_layout_is_not_served(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(files, tmp_path / "packed")
    assert PackedCache(tmp_path / "packed", "another digest", file_digest).open() is None
    monkeypatch.setattr(packed_cache, "LAYOUT", -1)
    assert PackedCache(tmp_path / "packed", files.digest, file_digest).open() is None


@pytest.mark.parametrize("damage", ["a bit", "the end", "the table", "the data gone"])
def test_what_is_damaged_is_written_again(
    files: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = hidden(load(files, tmp_path / "packed"))
    data, table = (next((tmp_path / "packed").glob(pattern)) for pattern in ("*.bin", "*.json"))
    if damage == "a bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "the end":
        data.write_bytes(data.read_bytes()[:-64])
    elif damage == "the table":
        table.write_text("{")
    else:
        data.unlink()
    assert_invariant(hidden(load(files, tmp_path / "packed")), expected)
    if damage != "the data gone":
        assert "not used" in caplog.text
    assert_invariant(hidden(load(Untouchable(files), tmp_path / "packed")), expected)


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    files: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert np.isfinite(hidden(load(files, tmp_path / "file" / "packed")).numpy()).all()
    assert "not saved" in caplog.text
