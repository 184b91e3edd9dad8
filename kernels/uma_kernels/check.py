"""Shape and dtype checks with one error type, and the addresses the C++ kernels take.

Knows tensors' outsides; does not know what an op computes.
"""

from __future__ import annotations

import os

import torch

__all__ = [
    "FLOATS",
    "TILE_ROWS",
    "NotFinite",
    "ShapeError",
    "check",
    "check_indices",
    "empty_rows",
    "out_like",
    "ptr",
    "readable",
]

_CHECK_VALUES = os.environ.get("UMA_CHECK_VALUES") == "1"  # read once
FLOATS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # what an op takes on a GPU; on the CPU compiled kernels take fp32


TILE_ROWS = 64  # the fewest rows that a tensor-core tile on a GPU has


class ShapeError(ValueError):
    """A tensor's shape, dtype, device or layout is not what the op takes."""


class NotFinite(ValueError):
    """A weight holds NaN or infinity."""


def check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
    strided: bool = False,
) -> None:
    """Raise ShapeError unless `tensor` has `shape` (None: any size) and `dtype` (or one of them), and is contiguous.

    `strided`: rows (along the first dimension) that are contiguous and lie further apart than their length are fine too.
    """
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
    if tensor.dtype is not dtype and (isinstance(dtype, torch.dtype) or tensor.dtype not in dtype):
        wanted_dtype = dtype if isinstance(dtype, torch.dtype) else " or ".join(map(str, dtype))
        raise ShapeError(f"`{name}` has dtype {tensor.dtype} but must have {wanted_dtype}")
    if not tensor.is_contiguous() and not (strided and _rows_lie_apart(tensor)):
        raise ShapeError(f"`{name}` with shape {list(actual)} and strides {list(tensor.stride())} must be contiguous")


def _rows_lie_apart(tensor: torch.Tensor) -> bool:
    width = 1  # of a row, in elements
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != width:
            return False
        width *= size
    return tensor.stride(0) >= width


def readable(tensor: torch.Tensor) -> bool:
    """Whether an op may look at values to refuse bad ones: on a GPU the host would wait for the device, so there only with
    `UMA_CHECK_VALUES=1`, and never while a graph is captured."""
    if tensor.device.type == "cpu":
        return True
    return _CHECK_VALUES and not torch.cuda.is_current_stream_capturing()


def check_indices(name: str, indices: torch.Tensor, low: int, high: int) -> None:
    """Raise IndexError unless every element is in low .. high - 1; nothing where values are not `readable`."""
    if not readable(indices):
        return
    bad = ((indices < low) | (indices >= high)).nonzero()
    if bad.numel():
        at = bad[0].tolist()
        value = int(indices[tuple(at)])
        raise IndexError(f"`{name}[{', '.join(map(str, at))}]` is {value}, outside {low} .. {high - 1}")


def out_like(
    name: str, out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor, strided: bool = False
) -> torch.Tensor:
    """`out` checked, or a new uninitialised tensor of `shape` with the dtype and device of `like`."""
    if out is None:
        return empty_rows(shape, like)
    check(name, out, shape, like.dtype, strided)
    return out


def empty_rows(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A new uninitialised tensor with the dtype and device of `like`. On a GPU memory follows for at least TILE_ROWS rows: a
    product may then load a whole tile of it, which is faster than asking for the rows that exist."""
    if like.device.type == "cpu" or len(shape) < 2 or not 0 < shape[0] < TILE_ROWS:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.empty((TILE_ROWS, *shape[1:]), dtype=like.dtype, device=like.device)[: shape[0]]


def ptr(tensor: torch.Tensor | None) -> int:
    """Address of the first element, 0 for None or an empty tensor. The caller keeps the tensor alive during the call."""
    return 0 if tensor is None else tensor.data_ptr()
