"""Packed weights kept on disk: a second start maps them in and packs nothing.

Knows what a WeightReader handed out and how to hand it out again; does not know where weights come from or where caches live.

A key names one source and one layout. `KEY.bin` holds the matrices as the kernels read them and the vectors in fp32, each
from a multiple of 64 bytes on; `KEY.json`, written last, says what lies where and the sha256 of `KEY.bin`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from uma_engine.models.weights import Placement
from uma_kernels.linear import LAYOUT, PackedLinear

__all__ = ["PackedCache", "PackedReader", "Recorder"]

logger = logging.getLogger("uma_engine")
ALIGNMENT = 64
SMALLEST = 16 * 2**20  # bytes: packing less takes no time worth a file


class PackedCache:
    """The place of one base's packed weights. `digest_of(path)` is the sha256 of a file (it may remember it)."""

    def __init__(self, directory: Path, source_digest: str, digest_of: Callable[[Path], str]) -> None:
        key = hashlib.sha256(f"{source_digest} {LAYOUT}".encode()).hexdigest()[:32]
        self._table, self._data = directory / f"{key}.json", directory / f"{key}.bin"
        self._digest_of = digest_of

    def open(self) -> PackedReader | None:
        """What was saved, mapped in; None when there is nothing or it is not what was written."""
        try:
            table = json.loads(self._table.read_text())
            if self._digest_of(self._data) != table["sha256"]:
                raise ValueError("the bytes are not those that were written")
            return PackedReader(table["entries"], np.memmap(self._data, np.uint8, "c"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the packed weights in %s are not used and will be written again: %s", self._data, error)
            return None

    def save(self, recorder: Recorder) -> None:
        """Write what was handed out. A cache that cannot be written costs time at the next start, nothing else."""
        if recorder.num_bytes < SMALLEST:
            return
        data, table = (path.with_suffix(f"{path.suffix}.{os.getpid()}.part") for path in (self._data, self._table))
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True)
            with data.open("wb") as file:
                entries, digest = recorder.write(file)
            table.write_text(json.dumps({"sha256": digest, "entries": entries}))
            self._table.unlink(missing_ok=True)  # never a table beside another's data
            data.replace(self._data)
            table.replace(self._table)
            self._digest_of(self._data)
        except OSError as error:
            logger.warning("the packed weights were not saved: %s", error)
        finally:
            for part in (data, table):
                with contextlib.suppress(OSError):
                    part.unlink()


class Recorder:
    """What a WeightReader handed out, by the name of the first tensor in it."""

    def __init__(self) -> None:
        self._matrices: dict[str, list[PackedLinear]] = {}
        self._vectors: dict[str, torch.Tensor] = {}

    def matrices(self, name: str, packed: list[PackedLinear]) -> None:
        self._matrices[name] = packed

    def vector(self, name: str, value: torch.Tensor) -> None:
        self._vectors[name] = value

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for group in self._matrices.values() for weight in group)

    def write(self, file: IO[bytes]) -> tuple[dict[str, Any], str]:
        """The table of entries and the digest of what was written."""
        digest, end = hashlib.sha256(), 0

        def put(tensor: torch.Tensor) -> tuple[int, int]:
            nonlocal end
            padding = bytes(-end % ALIGNMENT)
            values = tensor.view(torch.uint8).numpy()
            for part in (padding, values.data):
                file.write(part)
                digest.update(part)
            start, end = end + len(padding), end + len(padding) + values.nbytes
            return start, values.nbytes

        matrices = {
            name: [[*put(weight.data), *weight.handle[1:]] for weight in group]
            for name, group in self._matrices.items()
        }
        vectors = {name: put(value) for name, value in self._vectors.items()}
        return {"matrices": matrices, "vectors": vectors}, digest.hexdigest()


class PackedReader:
    """Hands out mapped weights as a WeightReader does; pages are read from disk when a kernel first touches them."""

    placement = Placement()

    def __init__(self, entries: dict[str, Any], data: np.ndarray) -> None:
        self._matrices: dict[str, list[list[Any]]] = dict(entries["matrices"])
        self._vectors: dict[str, list[int]] = dict(entries["vectors"])
        self._data = torch.from_numpy(data)
        self.num_bytes = 0

    def linear(self, name: str, shape: tuple[int, int], *, of_block: bool = True) -> PackedLinear:
        return self.linears([(name, shape)])[0]

    def linears(self, matrices: Sequence[tuple[str, tuple[int, int]]]) -> list[PackedLinear]:
        packed = []
        for start, count, rows, width, bits, block_size, has_mins in self._matrices.pop(matrices[0][0]):
            data = self._data[start : start + count]
            handle = (data.data_ptr(), rows, width, bits, block_size, has_mins)
            packed.append(PackedLinear("cpp", (rows, width), data, handle))
            self.num_bytes += count
        return packed

    def vector(self, name: str, size: int) -> torch.Tensor:
        start, count = self._vectors.pop(name)
        self.num_bytes += count
        return self._data[start : start + count].view(torch.float32)

    def finish(self) -> None:
        """Everything was asked for: the table was written from what this same model asked."""
        assert not self._matrices, f"{next(iter(self._matrices))} was packed but not asked for"
        assert not self._vectors, f"{next(iter(self._vectors))} was kept but not asked for"
