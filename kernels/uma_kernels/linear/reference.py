"""Matrix products in plain torch: the specification. A quantised weight is dequantised once, when it is packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uma_kernels.linear.formats import BlockQuantized

Handle = tuple[int, int, int, int, int, bool]


def pack(weight: torch.Tensor | BlockQuantized) -> tuple[torch.Tensor, Handle]:
    dense = weight.dequantize() if isinstance(weight, BlockQuantized) else weight.clone()
    return dense, (0, *dense.shape, 32, 32, False)


def linear(x: torch.Tensor, data: torch.Tensor, handle: Handle, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    out.copy_(F.linear(x, data, bias))


def gather_rows(data: torch.Tensor, handle: Handle, ids: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(data.index_select(0, ids))
