"""Matrix products with a packed weight, dense or block-quantised.

Knows weights and rows; does not know layers or files. A weight is packed once, for the back end in force at that time;
the same packed weight serves every precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.check import FLOATS, ShapeError, check, check_indices, out_like
from uma_kernels.dispatch import choose
from uma_kernels.linear import cpp, reference
from uma_kernels.linear.formats import BlockQuantized

__all__ = [
    "FP8",
    "LAYOUT",
    "MODES",
    "PRECISIONS",
    "BlockQuantized",
    "PackedLinear",
    "gated_linear",
    "gather_rows",
    "linear",
    "pack",
]

PRECISIONS = ("exact", "near", "fast")  # see `linear`
MODES = ("audit", "fast")  # see `pack`
FP8 = reference.FP8
LAYOUT = (
    1  # of packed weights in cpp (csrc/cpu/linear.h): another number for another layout, since they are kept on disk
)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight [N, K] prepared for `backend`. A dense one, and any in cpp, is a copy: what it was made from is not kept."""

    backend: str
    shape: tuple[int, int]
    data: torch.Tensor  # cpp: uint8, panels as described in csrc/cpu/linear.h; reference: fp32 [N, K]
    handle: tuple[
        int, int, int, int, int, bool
    ]  # cpp: address, N, K, bits, block size, has minima; see csrc/bindings/linear.h
    blocks: BlockQuantized | None = (
        None  # reference: the blocks of a quantised weight, which `near` and `fast` multiply
    )
    scales: torch.Tensor | None = None  # of an 8-bit floating-point weight: fp32, one a row [N]
    mode: str = "audit"  # triton: see `pack`

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """What rows in and out are: an 8-bit weight takes and gives bf16."""
        if self.backend == "cpp":
            return torch.float32
        return torch.bfloat16 if self.data.dtype is FP8 else self.data.dtype


def pack(weight: torch.Tensor | BlockQuantized, dtype: torch.dtype | None = None, mode: str = "audit") -> PackedLinear:
    """
    Semantics:  keeps `weight` in the form that products read fastest; quantised blocks stay quantised (cpp), or are
                dequantised here, once (reference, triton). `dtype`: what it is kept as and computed with, None: as it is,
                blocks in fp32. FP8 (e4m3): w = q * scale, scale = max |w| / 448 of the row; rows of x are quantised in the
                same way, each with its own scale. `mode`, which triton alone looks at: `audit`, a row has the same bits in
                every batch; `fast`, cuBLAS chooses by the number of rows
    Shapes:     weight [N, K] fp32, bf16 or fp16, or BlockQuantized of that shape; N and K at least 1
    Numerics:   EXACT: `gather_rows` gives back `weight`, or `weight.dequantize()`, bit for bit
    Errors:     ShapeError when the weight is empty, not such a matrix, or quantised with K no multiple of its block size
                . ValueError for another dtype or mode
    """
    if isinstance(weight, BlockQuantized):
        rows, width = weight.shape
        device = weight.quants.device
        if width % weight.block_size:
            raise ShapeError(f"`weight` has width {width}, which is no multiple of its block size {weight.block_size}")
    else:
        check("weight", weight, (None, None), FLOATS)
        rows, width = weight.shape
        device = weight.device
    dtype = dtype or (torch.float32 if isinstance(weight, BlockQuantized) else weight.dtype)
    if dtype not in (*FLOATS, FP8):
        raise ValueError(f"`dtype` is {dtype} but must be one of {', '.join(map(str, (*FLOATS, FP8)))}")
    if mode not in MODES:
        raise ValueError(f"`mode` is `{mode}` but must be one of {', '.join(MODES)}")
    if rows < 1 or width < 1:
        raise ShapeError(f"`weight` has shape {[rows, width]} but must not be empty")
    backend = choose("linear", device.type)
    if backend == "cpp" and dtype is torch.float32:
        data, handle = cpp.pack(weight if isinstance(weight, BlockQuantized) else weight.float())
        return PackedLinear(backend, (rows, width), data, handle)
    backend = "triton" if backend == "triton" else "reference"
    data, scales = reference.pack(weight, dtype)
    near = backend == "reference" and dtype is torch.float32 and isinstance(weight, BlockQuantized)
    blocks = weight if near and isinstance(weight, BlockQuantized) else None
    return PackedLinear(backend, (rows, width), data, (0, rows, width, 32, 32, False), blocks, scales, mode)


def linear(
    x: torch.Tensor,
    weight: PackedLinear,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    precision: str = "exact",
    add: bool = False,
) -> torch.Tensor:
    """
    Semantics:  out = x @ w.T + bias, with `add` out += x @ w.T + bias. `precision` says in which arithmetic:
                `exact`  fp32; a quantised weight counts as its dequantised fp32 value
                `near`   of each row of x and each block of the weight (`block_size` k): scale_x = max |x| / 32767,
                         q_x = round_half_even(x * (32767 / max |x|)), 16-bit integers; then, block after block,
                         out += float(sum of q_x * q_w) * (scale_x * scale_w) and, where the weight has minima,
                         out += (scale_x * sum of q_x) * min_w; the bias last. Sums of integers are exact, the rest is fp32.
                         A block whose max |x| is below 2^-90 counts as zeros. A row with a NaN or an infinity gives NaN
                         in the whole of that row
                `fast`   as `near` with 127 in place of 32767: 8-bit integers. A value at least twice as large in magnitude
                         as every other of its block, its outlier, counts as 0 in q_x; it comes first, in fp32:
                         out += q_w * (outlier * scale_w), outlier after outlier, and it is added to scale_x * sum of q_x
                A dense weight has no blocks: all are `exact` for it, and triton, where every weight is dense, takes no
                notice of `precision`
    Shapes:     x [T, K] . weight [N, K] . bias [N] or None . out [T, N], all of `weight.dtype`; rows of
                `out` may lie further apart than N; `out` must not overlap `x`
    Numerics:   all in cpp: batch-invariant: the order of summing depends on K alone (csrc/cpu/linear_tile.h, linear_near.h,
                linear_fast.h). `exact`: REDUCTION against fp64. `near`, `fast`: REDUCTION against the fp64 value of what is
                said above; NEAR, FAST against the fp64 product with x as it is. triton: fp32 sums, rounded once to the
                dtype, with `add` after the addition; batch-invariant in mode `audit`: one chain over K, whatever T
                (triton_kernel.py)
    Errors:     ShapeError when shapes or dtypes do not fit, ValueError for another precision, or for `add` without `out`
    Source:     panels and register tiles as in BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015); integer products with
                sums of x for the minima as in ggml's Q8_1 (github.com/ggml-org/ggml), with 16 bits in place of 8
    """
    rows, width = weight.shape
    check("x", x, (None, width), weight.dtype)
    if bias is not None:
        check("bias", bias, (rows,), weight.dtype)
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is `{precision}` but must be one of {', '.join(PRECISIONS)}")
    if add and out is None:
        raise ValueError("`add` needs an `out` to add to")
    out = out_like("out", out, (x.shape[0], rows), x, strided=True)
    if add and weight.backend != "triton":
        return out.add_(linear(x, weight, bias, precision=precision))
    if weight.backend == "cpp":
        {"exact": cpp.linear, "near": cpp.linear_near, "fast": cpp.linear_fast}[precision](
            x, weight.data, weight.handle, bias, out
        )
    elif weight.backend == "triton":
        from uma_kernels.linear import triton_kernel

        triton_kernel.linear(x, weight.data, weight.scales, bias, out, weight.mode, add)
    elif precision != "exact" and weight.blocks is not None:
        (reference.linear_near if precision == "near" else reference.linear_fast)(x, weight.blocks, bias, out)
    else:
        reference.linear(x, weight.data, weight.scales, bias, out)
    return out


def gated_linear(
    x: torch.Tensor,
    weight: PackedLinear,
    activation: Callable[..., torch.Tensor],
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    precision: str = "exact",
) -> torch.Tensor:
    """
    Semantics:  out = activation(linear(x, weight, bias, precision=precision)), where `activation` is `swiglu` or `geglu_tanh` of
                `uma_kernels.activation`: the rows of `weight` are the gate's, then as many of up's
    Shapes:     x [T, K] . weight [2 N, K] . bias [2 N] or None . out [T, N], all of `weight.dtype`; `out` must not overlap `x`
    Numerics:   the bits of the two ops one after the other: gate and up are rounded to the dtype, the rest is fp32. triton in mode
                `audit`: one launch, without memory for gate and up; elsewhere the two ops
    Errors:     ShapeError when shapes or dtypes do not fit, ValueError for another activation or precision
    Source:     SwiGLU and GEGLU (arXiv 2002.05202); the activation as an epilogue of two products that share their rows as in
                CUTLASS's example 45, dual GEMM (github.com/NVIDIA/cutlass)
    """
    rows, width = weight.shape
    if activation not in (swiglu, geglu_tanh):
        raise ValueError(f"`activation` is `{activation}` but must be `swiglu` or `geglu_tanh`")
    if weight.backend != "triton" or weight.mode != "audit":
        return activation(linear(x, weight, bias, precision=precision), out)
    check("x", x, (None, width), weight.dtype)
    if bias is not None:
        check("bias", bias, (rows,), weight.dtype)
    if rows % 2:
        raise ShapeError(f"`weight` has {rows} rows but must hold two halves of one height")
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is `{precision}` but must be one of {', '.join(PRECISIONS)}")
    out = out_like("out", out, (x.shape[0], rows // 2), x)
    from uma_kernels.linear import triton_gated

    triton_gated.gated_linear(x, weight.data, weight.scales, bias, out, activation is geglu_tanh)
    return out


def gather_rows(
    weight: PackedLinear, ids: torch.Tensor, out: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """
    Semantics:  out[m] = w[ids[m]] * scale: the embedding look-up
    Shapes:     weight [N, K] . ids [M] int64 . out [M, K] of `weight.dtype`
    Numerics:   EXACT
    Errors:     IndexError when an id is not in 0 .. N - 1 (on a GPU: where values are `readable`; else such a row is left
                unwritten), ShapeError when shapes or dtypes do not fit
    """
    check("ids", ids, (None,), torch.int64)
    if out is None:
        out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype, device=ids.device)
    else:
        check("out", out, (ids.shape[0], weight.shape[1]), weight.dtype)
    if weight.backend == "cpp":
        cpp.gather_rows(weight.data, weight.handle, ids, scale, out)
        return out
    if weight.backend == "triton":
        from uma_kernels.linear import triton_kernel

        check_indices("ids", ids, 0, weight.shape[0])
        triton_kernel.gather_rows(weight.data, weight.scales, ids, out)
    else:
        reference.gather_rows(weight.data, weight.scales, ids, out)
    return out if scale == 1.0 else out.mul_(scale)
