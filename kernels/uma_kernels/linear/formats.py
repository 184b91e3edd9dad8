"""How a block-quantised weight is stored in memory.

Knows the layout of quants, scales and minima; does not know files, ggml block formats or matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["BlockQuantized"]


@dataclass(frozen=True, slots=True, eq=False)
class BlockQuantized:
    """A weight [N, K] quantised in blocks along K: w = q * scale + min (min omitted: 0).

    Shapes:  quants uint8 [N, K // 2] when `bits` is 4: element 2j in the low nibble of byte j, 2j + 1 in the high one,
             values 0..15; int8 [N, K] when `bits` is 8 . scales, mins fp32 [N, K // block_size]
    Errors:  ValueError when the parts do not fit together
    """

    bits: int
    block_size: int
    quants: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block_size not in (16, 32):
            raise ValueError(
                f"`bits` is {self.bits} and `block_size` {self.block_size}; 4 or 8 and 16 or 32 are stored"
            )
        if self.quants.dtype is not (torch.uint8 if self.bits == 4 else torch.int8) or self.quants.dim() != 2:
            raise ValueError(f"quants are {self.quants.dtype} {tuple(self.quants.shape)} with `bits` {self.bits}")
        rows, width = self.shape
        expected = (rows, width // self.block_size)
        for name, part in (("scales", self.scales), ("mins", self.mins)):
            if part is None:
                continue
            if width % self.block_size or tuple(part.shape) != expected or part.dtype is not torch.float32:
                raise ValueError(
                    f"{name} are {part.dtype} {tuple(part.shape)} but a weight {self.shape} needs {expected}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight itself."""
        rows, stored = self.quants.shape
        return rows, stored * (8 // self.bits)

    def unpacked(self) -> torch.Tensor:
        """The quants [N, K], one a byte."""
        if self.bits == 8:
            return self.quants
        return torch.stack((self.quants & 15, self.quants >> 4), dim=-1).reshape(self.shape)

    def dequantize(self) -> torch.Tensor:
        """The weight as fp32 [N, K]: the product, then the sum, each rounded to fp32 as ggml does it."""
        rows, width = self.shape
        weight = self.unpacked().reshape(rows, -1, self.block_size).to(torch.float32) * self.scales[:, :, None]
        if self.mins is not None:
            weight = weight + self.mins[:, :, None]
        return weight.reshape(rows, width)

    @classmethod
    def cat(cls, parts: Sequence[BlockQuantized]) -> BlockQuantized:
        """The rows of weights of one format and width, one after the other."""
        first = parts[0]
        mins = None if first.mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
        quants, scales = torch.cat([part.quants for part in parts]), torch.cat([part.scales for part in parts])
        return cls(first.bits, first.block_size, quants, scales, mins)

    def rows(self, index: torch.Tensor) -> BlockQuantized:
        """The rows `index` [M] int64, in that order: a selection, or a permutation of the output features."""
        mins = None if self.mins is None else self.mins.index_select(0, index)
        return BlockQuantized(
            self.bits, self.block_size, self.quants.index_select(0, index), self.scales.index_select(0, index), mins
        )
