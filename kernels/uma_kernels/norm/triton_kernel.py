"""Root-mean-square normalisation on a GPU: one pass, each row read and written once.

Knows rows, strides and a weight; does not know layers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.aot import AotCase

ELEMENTS = 2048  # that a program of several short rows holds at once: head norms have rows of 64 to 256


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, residual, weight, out, eps, rows, inner, K,
    stride_x, inner_x, stride_residual, stride_out, inner_out,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r lies at (r // inner) * stride + (r % inner) * inner stride: heads inside of wider rows. With a residual the sum
    is stored, rounded, and what was stored is normalised: the same bits as an addition and then the norm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs = tl.arange(0, BLOCK)[None, :]
    keep = (row < rows)[:, None] & (offs < K)
    outer, within = (row // inner).to(tl.int64)[:, None], (row % inner)[:, None]
    values = tl.load(x + outer * stride_x + within * inner_x + offs, keep, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = residual + outer * stride_residual + offs
        total = (values + tl.load(stream, keep, 0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(stream, total, keep)
        values = total.to(tl.float32)
    mean = tl.sum(values * values, 1) / K
    scaled = values * tl.rsqrt(mean + eps)[:, None] * tl.load(weight + offs, offs < K, 0.0).to(tl.float32)
    tl.store(out + outer * stride_out + within * inner_out + offs, scaled.to(out.dtype.element_ty), keep)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    _launch(x, None, weight, eps, out)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    _launch(x, residual, weight, eps, out)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    if not x.numel():
        return
    width = x.shape[-1]
    x, out = _as_rows(x), _as_rows(out)
    rows, inner = x.shape[0] * x.shape[1], x.shape[1]
    block = triton.next_power_of_2(width)
    per_program = max(1, ELEMENTS // block)  # of the width alone: it decides how a row is shared out to threads
    rms_norm_kernel[(triton.cdiv(rows, per_program),)](
        x, residual, weight, out, eps, rows, inner, width,
        x.stride(0), x.stride(1), 0 if residual is None else residual.stride(0), out.stride(0), out.stride(1),
        HAS_RESIDUAL=residual is not None, ROWS=per_program, BLOCK=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view [outer, inner, K]: rows of rows, of which the outer ones may lie apart."""
    if tensor.dim() == 1:
        return tensor[None, None]
    return tensor[:, None] if tensor.dim() == 2 else tensor.view(tensor.shape[0], -1, tensor.shape[-1])


_TYPES = {
    "x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "rows": "i32", "inner": "i32",
    "K": "i32:16", "stride_x": "i32:16", "inner_x": "i32:16", "stride_residual": "i32:16", "stride_out": "i32:16",
    "inner_out": "i32:16",
}  # fmt: skip
AOT_CASES = [
    AotCase(
        "rms_norm-4096", rms_norm_kernel, _TYPES, {"residual": None, "HAS_RESIDUAL": False, "ROWS": 1, "BLOCK": 4096}, 8
    ),
    AotCase("add_rms_norm-4096", rms_norm_kernel, _TYPES, {"HAS_RESIDUAL": True, "ROWS": 1, "BLOCK": 4096}, 8),
    AotCase("add_rms_norm-8192", rms_norm_kernel, _TYPES, {"HAS_RESIDUAL": True, "ROWS": 1, "BLOCK": 8192}, 16),
    AotCase(
        "rms_norm-heads-128",
        rms_norm_kernel,
        _TYPES,
        {"residual": None, "HAS_RESIDUAL": False, "ROWS": 16, "BLOCK": 128},
    ),
]
