"""Turns ggml's dense and block formats into tensors, value for value.

Knows the bits inside a block; does not know files, names or how the values are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from uma_engine.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from uma_kernels.linear.formats import BlockQuantized

__all__ = ["BLOCK_TYPES", "DENSE_TYPES", "BlockType", "DenseType", "read_blocks", "read_dense"]

CHUNK_ELEMENTS = 1 << 22  # decoded at a time: temporaries stay small beside the model
DAMAGED = "the weights are damaged: fetch the file again, or report it to whoever made it"


class Decoded(NamedTuple):
    """B blocks: quants [B, width] (uint8 below 16, or int8), scales and mins fp32 [B, sub-blocks]."""

    quants: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None


@dataclass(frozen=True, slots=True)
class DenseType:
    type_id: int  # ggml's number
    item_bytes: int


@dataclass(frozen=True, slots=True)
class BlockType:
    type_id: int  # ggml's number
    width: int  # elements in a block
    num_bytes: int  # bytes in a block
    bits: int  # how BlockQuantized keeps it
    block_size: int
    has_mins: bool
    decode: Callable[[np.ndarray], Decoded]  # uint8 [B, num_bytes] -> Decoded


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 at byte `at` of each block, as fp32 [B, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray, group: int) -> np.ndarray:
    """ggml's order: a run of `group` bytes holds 2 * group elements, all the low nibbles before all the high ones."""
    runs = packed.reshape(len(packed), -1, 1, group)
    return np.concatenate((runs & 15, runs >> 4), axis=2).reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """[B, 4] bytes -> the 32 high bits, moved to value 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Decoded:
    scale = _half(blocks, 0)
    return Decoded(_nibbles(blocks[:, 2:], 16), scale, scale * np.float32(-8))


def _q4_1(blocks: np.ndarray) -> Decoded:
    return Decoded(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: np.ndarray) -> Decoded:
    quants = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return Decoded(quants.astype(np.int8) - np.int8(16), _half(blocks, 0), None)


def _q5_1(blocks: np.ndarray) -> Decoded:
    quants = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return Decoded(quants.astype(np.int8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> Decoded:
    return Decoded(blocks[:, 2:].view(np.int8), _half(blocks, 0), None)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima fp32 [B, 8] of a Q4_K or Q5_K super-block: 6-bit numbers times two fp16 factors."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 2 & 48)), axis=1)
    mins = np.concatenate((middle & 63, (high >> 4) | (middle >> 2 & 48)), axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * mins.astype(np.float32))


def _q4_k(blocks: np.ndarray) -> Decoded:
    return Decoded(_nibbles(blocks[:, 16:], 32), *_k_scales(blocks))


def _q5_k(blocks: np.ndarray) -> Decoded:
    # Byte j of the high bits serves element j of every group of 32: bit g for group g.
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    quants = _nibbles(blocks[:, 48:], 32) | (high.reshape(-1, 256) << 4)
    return Decoded(quants.astype(np.int8), *_k_scales(blocks))


def _q6_k(blocks: np.ndarray) -> Decoded:
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)
    quants = (low | high << 4).astype(np.int8) - np.int8(32)
    return Decoded(quants, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None)


DENSE_TYPES = {"F32": DenseType(0, 4), "F16": DenseType(1, 2), "BF16": DenseType(30, 2)}
BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, 4, 32, True, _q4_0),
    "Q4_1": BlockType(3, 32, 20, 4, 32, True, _q4_1),
    "Q5_0": BlockType(6, 32, 22, 8, 32, False, _q5_0),
    "Q5_1": BlockType(7, 32, 24, 8, 32, True, _q5_1),
    "Q8_0": BlockType(8, 32, 34, 8, 32, False, _q8_0),
    "Q4_K": BlockType(12, 256, 144, 4, 32, True, _q4_k),
    "Q5_K": BlockType(13, 256, 176, 8, 32, True, _q5_k),
    "Q6_K": BlockType(14, 256, 210, 8, 16, False, _q6_k),
}


def read_dense(raw: np.ndarray, type_name: str, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """Bytes of a dense tensor -> fp32. `what` names the tensor in errors.

    Errors:  CorruptFile for NaN or infinity
    """
    import torch

    if type_name == "BF16":
        values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.view(np.float32 if type_name == "F32" else np.float16).astype(np.float32)
    if not np.isfinite(values).all():
        raise CorruptFile(f"{what} holds NaN or infinity", hint=DAMAGED)
    return torch.from_numpy(values.reshape(shape))


def read_blocks(raw: np.ndarray, type_name: str, shape: tuple[int, ...], what: str) -> BlockQuantized:
    """Bytes of a block-quantised matrix [N, K] -> the same numbers in our block layout.

    Errors:  CorruptFile for NaN or infinity among scales and minima; UnsupportedModel unless it is a matrix
    """
    import torch

    from uma_kernels.linear.formats import BlockQuantized

    kind = BLOCK_TYPES[type_name]
    if len(shape) != 2:
        raise UnsupportedModel(f"{what} is quantised ({type_name}) with the shape {shape}", hint="only matrices may be")
    rows, width = shape
    quants = np.empty((rows, width // 2 if kind.bits == 4 else width), np.uint8 if kind.bits == 4 else np.int8)
    scales = np.empty((rows, width // kind.block_size), np.float32)
    mins = np.empty_like(scales) if kind.has_mins else None
    blocks = raw.reshape(rows, -1, kind.num_bytes)
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are found below
            decoded = kind.decode(np.ascontiguousarray(blocks[part]).reshape(-1, kind.num_bytes))
        if kind.bits == 4:
            quants[part] = (decoded.quants[:, 0::2] | decoded.quants[:, 1::2] << 4).reshape(-1, width // 2)
        else:
            quants[part] = decoded.quants.reshape(-1, width)
        scales[part] = decoded.scales.reshape(-1, scales.shape[1])
        if mins is not None and decoded.mins is not None:
            mins[part] = decoded.mins.reshape(-1, scales.shape[1])
    if not np.isfinite(scales).all() or (mins is not None and not np.isfinite(mins).all()):
        raise CorruptFile(f"{what} holds NaN or infinity", hint=DAMAGED)
    as_tensor = torch.from_numpy
    return BlockQuantized(
        kind.bits, kind.block_size, as_tensor(quants), as_tensor(scales), None if mins is None else as_tensor(mins)
    )
