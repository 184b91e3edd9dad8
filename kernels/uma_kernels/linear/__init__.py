"""Matrix products with a packed weight, dense or block-quantised.

Knows weights and rows; does not know layers or files. A weight is packed once, for the back end in force at that time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uma_kernels.check import ShapeError, check, out_like
from uma_kernels.dispatch import choose
from uma_kernels.linear import cpp, reference
from uma_kernels.linear.formats import BlockQuantized

__all__ = ["BlockQuantized", "PackedLinear", "gather_rows", "linear", "pack"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight [N, K] prepared for `backend`; the tensors it was made from are not kept."""

    backend: str
    shape: tuple[int, int]
    data: torch.Tensor  # cpp: uint8, panels as described in csrc/cpu/linear.h; reference: fp32 [N, K]
    handle: tuple[
        int, int, int, int, int, bool
    ]  # cpp: address, N, K, bits, block size, has minima; see csrc/bindings/linear.h

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def pack(weight: torch.Tensor | BlockQuantized) -> PackedLinear:
    """
    Semantics:  keeps `weight` in the form that products read fastest; quantised blocks stay quantised (cpp)
    Shapes:     weight [N, K] fp32, or BlockQuantized of that shape; N and K at least 1
    Numerics:   EXACT: `gather_rows` gives back `weight`, or `weight.dequantize()`, bit for bit
    Errors:     ShapeError when the weight is empty, not an fp32 matrix, or quantised with K no multiple of its block size
    """
    if isinstance(weight, BlockQuantized):
        rows, width = weight.shape
        device = weight.quants.device
        if width % weight.block_size:
            raise ShapeError(f"`weight` has width {width}, which is no multiple of its block size {weight.block_size}")
    else:
        check("weight", weight, (None, None))
        rows, width = weight.shape
        device = weight.device
    if rows < 1 or width < 1:
        raise ShapeError(f"`weight` has shape {[rows, width]} but must not be empty")
    backend = choose("linear", device.type)
    data, handle = (cpp if backend == "cpp" else reference).pack(weight)
    return PackedLinear(backend, (rows, width), data, handle)


def linear(
    x: torch.Tensor, weight: PackedLinear, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Semantics:  out = x @ w.T + bias
    Shapes:     x [T, K] . weight [N, K] . bias [N] or None . out [T, N]; `out` must not overlap `x`
    Numerics:   fp32; a quantised weight counts as its dequantised fp32 value; cpp: batch-invariant: the order of summing
                depends on K alone (see csrc/cpu/linear_tile.h)
    Errors:     ShapeError when shapes or dtypes do not fit
    Source:     panels and register tiles as in BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015)
    """
    rows, width = weight.shape
    check("x", x, (None, width))
    if bias is not None:
        check("bias", bias, (rows,))
    out = out_like("out", out, (x.shape[0], rows), x)
    (cpp if weight.backend == "cpp" else reference).linear(x, weight.data, weight.handle, bias, out)
    return out


def gather_rows(weight: PackedLinear, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Semantics:  out[m] = w[ids[m]]: the embedding look-up
    Shapes:     weight [N, K] . ids [M] int64 . out [M, K] fp32
    Numerics:   EXACT
    Errors:     IndexError when an id is not in 0 .. N - 1, ShapeError when shapes or dtypes do not fit
    """
    check("ids", ids, (None,), torch.int64)
    if out is None:
        out = torch.empty(ids.shape[0], weight.shape[1], dtype=torch.float32, device=ids.device)
    else:
        check("out", out, (ids.shape[0], weight.shape[1]))
    (cpp if weight.backend == "cpp" else reference).gather_rows(weight.data, weight.handle, ids, out)
    return out
