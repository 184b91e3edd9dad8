"""Shape and dtype checks with one error type, and the addresses the C++ kernels take.

Knows tensors' outsides; does not know what an op computes.
"""

from __future__ import annotations

import torch

__all__ = ["ShapeError", "check", "out_like", "ptr"]


class ShapeError(ValueError):
    """A tensor's shape, dtype, device or layout is not what the op takes."""


def check(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raise ShapeError unless `tensor` has `shape` (None: any size), `dtype`, lies on the CPU or a GPU, and is contiguous."""
    actual = tensor.shape
    # Called several times an op: the good case first, and cheaply.
    fits = actual == shape
    if not fits and len(actual) == len(shape):
        for want, have in zip(shape, actual, strict=True):
            if want is not None and want != have:
                break
        else:
            fits = True
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ShapeError(f"`{name}` has shape {list(actual)} but must have [{wanted}]")
    if tensor.dtype is not dtype:
        raise ShapeError(f"`{name}` has dtype {tensor.dtype} but must have {dtype}")
    if not tensor.is_contiguous():
        raise ShapeError(f"`{name}` with shape {list(actual)} and strides {list(tensor.stride())} must be contiguous")


def out_like(name: str, out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """`out` checked, or a new uninitialised tensor of `shape` with the dtype and device of `like`."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    check(name, out, shape, like.dtype)
    return out


def ptr(tensor: torch.Tensor | None) -> int:
    """Address of the first element, 0 for None or an empty tensor. The caller keeps the tensor alive during the call."""
    return 0 if tensor is None else tensor.data_ptr()
