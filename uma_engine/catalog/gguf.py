"""Reads GGUF files: metadata, the table of tensors, and single tensors on demand.

Knows the container's layout and trusts nothing it says; does not know architectures, tensor names or tokenizers.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from uma_engine.catalog.gguf_blocks import BLOCK_TYPES, DENSE_TYPES, read_blocks, read_dense
from uma_engine.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from uma_kernels.linear.formats import BlockQuantized

__all__ = ["GGUFFile", "Strings", "TensorInfo"]

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7
# Far above any real file, low enough that a lying count cannot make us allocate or loop for long.
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 14
MAX_STRINGS = 1 << 22  # in one array
MAX_NAME_BYTES = 1 << 10
MAX_ELEMENTS = 1 << 40  # in one tensor
MAX_ALIGNMENT = 1 << 20
HINT = "the file is damaged or was not downloaded whole: fetch it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table. `shape` is in torch's order, outermost first; `start` is a file position."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    num_bytes: int


class _Cursor:
    """Reads little-endian values from the mapped file and refuses to step over its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def fail(self, message: str) -> CorruptFile:
        return CorruptFile(f"`{self.path}`: {message} (byte {self.position} of {self.size})", hint=HINT)

    def claim(self, num_bytes: int, what: str) -> int:
        """Moves past `num_bytes` bytes and returns where they begin."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.fail(f"{what} needs {num_bytes} bytes but {self.size - start} are left")
        self.position = start + num_bytes
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(code, self.data, self.claim(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        length = self.scalar("<Q", what)
        start = self.claim(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def strings(self, count: int, what: str) -> Strings:
        # Vocabularies hold hundreds of thousands: only where each begins is looked at now.
        data, size, position, starts = self.data, self.size, self.position, array("q")
        unpack, append = struct.Struct("<Q").unpack_from, starts.append
        for _ in range(count):
            if size - position < 8:
                raise self.fail(f"{what} ends in the middle of its {count} strings")
            position += 8
            append(position)
            position += unpack(data, position - 8)[0]
            if position > size:
                raise self.fail(f"{what} holds a string of {position - starts[-1]} bytes, more than the file has left")
        self.position = position
        return Strings(self, starts, position, what)

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise self.fail(f"{what} has the unknown value type {kind}")
        return self.scalar(SCALARS[kind], what)

    def array(self, what: str) -> Strings | np.ndarray:
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if kind == STRING:
            if count > min(MAX_STRINGS, (self.size - self.position) // 8):
                raise self.fail(f"{what} claims {count} strings")
            return self.strings(count, what)
        if kind not in SCALARS:  # arrays of arrays are legal on paper, used by no model, and a way to nest without end
            raise self.fail(f"{what} is an array of value type {kind}")
        dtype = np.dtype(np.uint8 if kind == BOOL else SCALARS[kind][1]).newbyteorder("<")
        start = self.claim(count * dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, count, start).copy()
        return values != 0 if kind == BOOL else values


class Strings(Sequence[str]):
    """An array of strings in a file, each decoded when it is asked for. Errors: CorruptFile for one that is not UTF-8"""

    def __init__(self, cursor: _Cursor, starts: array[int], end: int, what: str) -> None:
        self._cursor, self._starts, self._end, self._what = cursor, starts, end, what

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self._starts))[place]
        stop = self._starts[place + 1] - 8 if place + 1 < len(self._starts) else self._end
        return self._decoded(self._cursor.data[self._starts[place] : stop])

    def __iter__(self) -> Iterator[str]:
        data, ends = self._cursor.data, [*(start - 8 for start in self._starts[1:]), self._end]
        for start, stop in zip(self._starts, ends, strict=True):
            yield self._decoded(data[start:stop])

    def _decoded(self, found: bytes) -> str:
        try:
            return found.decode()
        except UnicodeDecodeError:
            raise self._cursor.fail(f"{self._what} holds a string that is not UTF-8") from None


class GGUFFile:
    """An open GGUF file, version 2 or 3, little-endian.

    Semantics:  `metadata` maps keys to int, float, bool, str, Strings or a numpy array; `tensors` maps names to
                TensorInfo. Opening reads the header alone; `read` maps in what it needs.
    Errors:     CorruptFile when the file contradicts itself; UnsupportedModel for a tensor type that is not read
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CorruptFile(f"`{self.path}` cannot be read: {error}", hint=HINT) from None
        cursor = _Cursor(self.path, self._map)
        self.version, num_tensors, num_keys = _read_header(cursor)
        self.metadata = _read_metadata(cursor, num_keys)
        self.tensors = _read_tensor_table(cursor, num_tensors, _alignment(cursor, self.metadata))

    def read(self, name: str) -> torch.Tensor | BlockQuantized:
        """The tensor as dense fp32, or as its quantised blocks, value for value what ggml reads.

        Errors:  CorruptFile for NaN or infinity among values or scales; UnsupportedModel for quantised tensors that
                 are not matrices
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, info.num_bytes, info.start)
        if info.type_name in DENSE_TYPES:
            return read_dense(raw, info.type_name, info.shape, f"`{self.path}`: tensor `{name}`")
        return read_blocks(raw, info.type_name, info.shape, f"`{self.path}`: tensor `{name}`")


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    start = cursor.claim(4, "the magic")
    if (magic := cursor.data[start : start + 4]) != MAGIC:
        raise CorruptFile(f"`{cursor.path}` begins with {magic!r} but a GGUF file begins with {MAGIC!r}", hint=HINT)
    version = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        if version == 1 or version & 0xFFFF == 0:
            kind = "version 1" if version == 1 else "big-endian"
            raise UnsupportedModel(
                f"`{cursor.path}` is a {kind} GGUF file", hint="convert it to little-endian version 3"
            )
        raise cursor.fail(f"the GGUF version is {version}")
    num_tensors, num_keys = cursor.scalar("<Q", "the tensor count"), cursor.scalar("<Q", "the key count")
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise cursor.fail(f"the header claims {num_tensors} tensors and {num_keys} keys")
    return version, num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata or not key or len(key) > MAX_NAME_BYTES:
            raise cursor.fail(f"the metadata key `{key[:80]}` is repeated, empty or too long")
        metadata[key] = cursor.value(cursor.scalar("<I", f"`{key}`"), f"`{key}`")
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"`general.alignment` is `{alignment!r}`, not a power of two")
    return alignment


def _read_tensor_table(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    rows: list[tuple[str, tuple[int, ...], str, int, int]] = []
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        if len(name) > MAX_NAME_BYTES or not name:
            raise cursor.fail(f"a tensor name is {len(name)} characters long")
        num_dims = cursor.scalar("<I", f"tensor `{name}`")
        if not 1 <= num_dims <= 4:
            raise cursor.fail(f"tensor `{name}` has {num_dims} dimensions")
        shape = tuple(cursor.scalar("<Q", f"tensor `{name}`") for _ in range(num_dims))[::-1]
        type_id, offset = cursor.scalar("<I", f"tensor `{name}`"), cursor.scalar("<Q", f"tensor `{name}`")
        if 0 in shape or prod(shape) > MAX_ELEMENTS:
            raise cursor.fail(f"tensor `{name}` has the shape {shape}")
        rows.append((name, shape, *_storage(cursor, name, shape, type_id), offset))
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_name, num_bytes, offset in rows:
        if name in tensors:
            raise cursor.fail(f"tensor `{name}` is listed twice")
        if offset % alignment:
            raise cursor.fail(f"tensor `{name}` starts at {offset}, not at a multiple of {alignment}")
        if data_start + offset + num_bytes > cursor.size:
            raise cursor.fail(f"tensor `{name}` ends at {data_start + offset + num_bytes}, beyond the end of the file")
        tensors[name] = TensorInfo(name, shape, type_name, data_start + offset, num_bytes)
    _refuse_overlap(cursor, tensors)
    return tensors


def _storage(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int) -> tuple[str, int]:
    """(type name, bytes) of a tensor, from the table of types."""
    for type_name, dense in DENSE_TYPES.items():
        if dense.type_id == type_id:
            return type_name, prod(shape) * dense.item_bytes
    for type_name, block in BLOCK_TYPES.items():
        if block.type_id == type_id:
            if shape[-1] % block.width:
                raise cursor.fail(f"tensor `{name}` has rows of {shape[-1]}, not a multiple of {block.width}")
            return type_name, prod(shape) // block.width * block.num_bytes
    raise UnsupportedModel(
        f"`{cursor.path}`: tensor `{name}` has the ggml type {type_id}, which is not read",
        hint=f"read are {', '.join([*DENSE_TYPES, *BLOCK_TYPES])}: quantise the model again, to Q4_K_M or Q8_0",
    )


def _refuse_overlap(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    in_order = sorted(tensors.values(), key=lambda info: info.start)
    for before, after in pairwise(in_order):
        if before.start + before.num_bytes > after.start:
            raise cursor.fail(f"tensors `{before.name}` and `{after.name}` overlap")
