"""Shapes of matrix products that tests and benches share: awkward ones first, then those of real layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_kernels.linear.formats import BlockQuantized


@dataclass(frozen=True)
class WeightFormat:
    """`bits` 32 is dense; a quantised format has blocks of `block_size` with or without minima."""

    bits: int
    block_size: int = 32
    has_mins: bool = False

    @property
    def id(self) -> str:
        if self.bits == 32:
            return "fp32"
        return f"q{self.bits}-b{self.block_size}" + ("-min" if self.has_mins else "")

    def random(self, rows: int, width: int) -> torch.Tensor | BlockQuantized:
        """A weight [rows, width] of this format, its values of the size of a real layer's."""
        if self.bits == 32:
            return torch.randn(rows, width) * width**-0.5
        if self.bits == 4:
            quants = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8)
        else:
            quants = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        blocks = (rows, width // self.block_size)
        scales = (torch.rand(blocks) + 0.5) * width**-0.5 / (8 if self.bits == 4 else 128)
        mins = torch.randn(blocks) * width**-0.5 if self.has_mins else None
        return BlockQuantized(self.bits, self.block_size, quants, scales, mins)


FORMATS = [WeightFormat(32)] + [
    WeightFormat(bits, block_size, has_mins) for bits in (4, 8) for block_size in (32, 16) for has_mins in (False, True)
]


@dataclass(frozen=True)
class LinearCase:
    tokens: int
    rows: int
    width: int
    bias: bool = False

    @property
    def id(self) -> str:
        return f"T{self.tokens}-N{self.rows}-K{self.width}" + ("-bias" if self.bias else "")

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.rows * self.width

    def bytes(self, weight_bytes: int) -> int:
        return weight_bytes + 4 * self.tokens * (self.rows + self.width)


# Each awkward number of tokens, rows out and width in at least once; a width of 1 or 7 fits dense weights alone.
CASES = [
    LinearCase(*shape)
    for shape in (
        (0, 5, 32),
        (1, 1, 1),
        (2, 31, 7, True),
        (3, 32, 32),
        (5, 33, 96, True),
        (7, 33, 64, True),
        (64, 1, 64),
        (13, 65, 32),
        (17, 31, 96, True),
        (64, 33, 32),
        (129, 70, 608, True),
        (1, 576, 1536, True),
        (64, 96, 1536),
        (3, 40, 4864),
        (20, 40, 4864),
        (513, 33, 32, True),
    )
]

# Layers of SmolLM2-135M and Qwen2.5-0.5B: prefill, a decode batch, one token.
BENCH_CASES = [
    LinearCase(tokens, rows, width)
    for tokens in (512, 8, 1)
    for rows, width in ((576, 576), (1536, 576), (576, 1536), (896, 4864))
]
# All their matrices, at a prefill step's rows, a decode batch's and one.
FAST_BENCH_CASES = [
    LinearCase(tokens, rows, width)
    for tokens in (1024, 256, 16, 1)
    for rows, width in (
        (576, 576),
        (192, 576),
        (1536, 576),
        (576, 1536),
        (896, 896),
        (128, 896),
        (4864, 896),
        (896, 4864),
    )
]
