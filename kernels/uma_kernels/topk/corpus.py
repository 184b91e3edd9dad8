"""A corpus of embeddings as `topk` scans it: rows in one of five formats, padded to 64 bytes, in flat buffers.

Knows how rows lie in memory; does not know how they are scored. `data`, `scales` and the few numbers beside them are all
there is: a file that holds them can be mapped into memory and handed to `Corpus` as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_kernels.check import ShapeError, check

__all__ = ["FORMATS", "Corpus", "pack_corpus", "pack_filter"]

FORMATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
SCALED = {"int8": 127.0, "fp8": 448.0}  # formats with a scale a row, and the largest value of one
ROW_BYTES = 64  # rows are padded with zeros to a multiple of this
MOST_ROWS = 2**32 - 1


@dataclass(slots=True, eq=False)
class Corpus:
    """N rows of `width` values; make one with `pack_corpus`, or from buffers that one was made of.

    Shapes:   data [capacity, stride] of the format's dtype, a row's bytes a multiple of 64, 0 from `width` on .
              scales [capacity] fp32 (int8, fp8), else None . originals: the same rows in fp32 or fp16, or None
    Numerics: row i is data[i] (times scales[i]). Every value is finite
    Errors:   ShapeError when shapes, dtypes or devices do not fit
    """

    format: str
    width: int
    count: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    originals: Corpus | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ShapeError(f"`format` is `{self.format}` but must be one of {', '.join(FORMATS)}")
        check("data", self.data, (None, padded_width(self.width, self.format)), FORMATS[self.format])
        if self.count < 0 or self.count > self.data.shape[0]:
            raise ShapeError(f"`count` is {self.count} but `data` has {self.data.shape[0]} rows")
        if (self.scales is not None) != (self.format in SCALED):
            raise ShapeError(
                f"`scales` must be given for {' and '.join(SCALED)} only, and the format is `{self.format}`"
            )
        if self.scales is not None:
            check("scales", self.scales, (self.data.shape[0],))
        if self.originals is not None:
            other = self.originals
            if (other.count, other.width) != (self.count, self.width) or other.format not in ("fp32", "fp16"):
                raise ShapeError(
                    f"`originals` is {other.format} [{other.count}, {other.width}] but must be fp32 or fp16"
                    f" [{self.count}, {self.width}]"
                )

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes a scan reads."""
        scales = 4 * self.count if self.scales is not None else 0
        return self.count * self.data.shape[1] * self.data.element_size() + scales

    def rows(self) -> torch.Tensor:
        """The rows as they are scored, [N, width] fp32."""
        rows = self.data[: self.count, : self.width].float()
        return rows if self.scales is None else rows * self.scales[: self.count, None]

    def append(self, rows: torch.Tensor) -> None:
        """Add rows [M, width] fp32 behind the others. Buffers that are full are replaced by ones twice as large."""
        added = pack_corpus(rows, self.format)
        if added.width != self.width:
            raise ShapeError(f"`rows` has width {added.width} but the corpus has {self.width}")
        if self.originals is not None:
            self.originals.append(rows)
        count = self.count + added.count
        if count > MOST_ROWS:
            raise ShapeError(f"{count} rows are more than {MOST_ROWS}, the most that a corpus can have")
        if count > self.data.shape[0]:
            capacity = max(count, 2 * self.data.shape[0])
            self.data = _grown(self.data, capacity)
            self.scales = _grown(self.scales, capacity) if self.scales is not None else None
        self.data[self.count : count] = added.data.to(self.device)
        if self.scales is not None and added.scales is not None:
            self.scales[self.count : count] = added.scales.to(self.device)
        self.count = count


def padded_width(width: int, format: str) -> int:
    """Elements of a row with its padding."""
    unit = ROW_BYTES // FORMATS[format].itemsize
    return -(-width // unit) * unit


def pack_corpus(rows: torch.Tensor, format: str = "fp32", originals: str | None = None) -> Corpus:
    """
    Semantics:  the rows in `format`; int8 and fp8: rows scaled so that the largest magnitude of each is the format's largest.
                originals: `fp32` or `fp16`: keep the rows in that, too, to score exactly what an int8 or fp8 scan finds
    Shapes:     rows [N, D] fp32, D at least 1, on the device that will scan them
    Numerics:   rounded to nearest; fp8 is e4m3
    Errors:     ShapeError when the shape, dtype or format does not fit . ValueError when a value is not finite, or not in
                the format
    """
    check("rows", rows, (None, None), strided=True)
    count, width = rows.shape
    if format not in FORMATS:
        raise ShapeError(f"`format` is `{format}` but must be one of {', '.join(FORMATS)}")
    if width == 0:
        raise ShapeError("`rows` has width 0 but must have at least 1")
    if count > MOST_ROWS:
        raise ShapeError(f"{count} rows are more than {MOST_ROWS}, the most that a corpus can have")
    data = torch.zeros(count, padded_width(width, format), dtype=FORMATS[format], device=rows.device)
    scales = torch.empty(count, dtype=torch.float32, device=rows.device) if format in SCALED else None
    step = max(1, 2**24 // width)  # rows at a time: temporaries stay small
    for first in range(0, count, step):
        part = rows[first : first + step]
        if not torch.isfinite(part).all():
            bad = (~torch.isfinite(part)).nonzero()[0]
            raise ValueError(f"`rows[{first + int(bad[0])}, {int(bad[1])}]` is {part[tuple(bad)]}, not a finite number")
        if scales is not None:
            scale = part.abs().amax(dim=1) / SCALED[format]
            # A row so small that its scale is subnormal is rounded to zeros.
            inverse = torch.where(scale > 1e-37, 1.0 / scale, 0.0)
            part = part * inverse[:, None]
            scales[first : first + step] = scale
            if format == "int8":
                part = part.round()
        elif format == "fp16" and part.numel() and float(part.abs().max()) >= 65520.0:
            raise ValueError(f"`rows` has a value of magnitude {float(part.abs().max())}, beyond fp16's largest, 65504")
        data[first : first + step, :width] = part.to(FORMATS[format])
    kept = pack_corpus(rows, originals) if originals is not None else None
    return Corpus(format, width, count, data, scales, kept)


def pack_filter(mask: torch.Tensor) -> torch.Tensor:
    """Words of a bitmask from booleans [N]: bit i % 32 of word i // 32 is mask[i]. Returns [ceil(N / 32)] int32."""
    check("mask", mask, (None,), torch.bool)
    words = -(-mask.shape[0] // 32)
    bits = torch.zeros(words * 32, dtype=torch.int64, device=mask.device)
    bits[: mask.shape[0]] = mask
    weights = torch.ones(32, dtype=torch.int64, device=mask.device) << torch.arange(32, device=mask.device)
    values = (bits.view(words, 32) * weights).sum(dim=1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def unpack_filter(words: torch.Tensor, count: int) -> torch.Tensor:
    """Booleans [count] of a bitmask."""
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten()[:count]


def _grown(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = torch.zeros(capacity, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    grown[: tensor.shape[0]] = tensor
    return grown
