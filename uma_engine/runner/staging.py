"""Moves a step's arrays to the device: one pinned buffer, one asynchronous copy, one view for each array.

Knows arrays and their places in a buffer; does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["Layout", "Staging"]

ALIGNMENT = 16  # bytes: what a kernel's wide loads ask for
LEAST = 1 << 16
BUFFERS = 10  # a step has up to five uploads, and two steps may be under way
_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}


class Layout:
    """Where arrays of fixed types and shapes lie in one buffer."""

    def __init__(self, specs: Sequence[tuple[np.dtype, tuple[int, ...]]]) -> None:
        self.parts: list[tuple[int, int, np.dtype, tuple[int, ...]]] = []  # first byte, bytes, dtype, shape
        end = 0
        for dtype, shape in specs:
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            self.parts.append((end, size, dtype, shape))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.num_bytes = end

    def arrays(self, buffer: torch.Tensor) -> list[np.ndarray]:
        """The arrays inside a host buffer of bytes."""
        memory = buffer.numpy()
        return [memory[first : first + size].view(dtype).reshape(shape) for first, size, dtype, shape in self.parts]

    def tensors(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The same places of a buffer on any device, as tensors."""
        return [
            buffer[first : first + size].view(_TORCH_DTYPES[dtype]).view(shape)
            for first, size, dtype, shape in self.parts
        ]


class Staging:
    """Pinned buffers in turn: the host fills one while the copies of others wait in the stream behind the step under way.

    The device's buffer is one: copies and kernels follow each other in one stream, so a step's arrays are overwritten only
    when the kernels that read them are done. A view is good until the next `upload`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._host = [torch.empty(0, dtype=torch.uint8)] * BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._on_device = torch.empty(0, dtype=torch.uint8, device=device)
        self._turn = 0

    def upload(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as tensors on the device, after one copy that nobody waits for."""
        layout = Layout([(array.dtype, array.shape) for array in arrays])
        host = self._next(layout.num_bytes)
        for place, array in zip(layout.arrays(host), arrays, strict=True):
            place[...] = array
        if self._on_device.numel() < layout.num_bytes:
            self._on_device = torch.empty(_rounded(layout.num_bytes), dtype=torch.uint8, device=self._device)
        self._copy(host, self._on_device, layout.num_bytes)
        return layout.tensors(self._on_device)

    def upload_into(self, target: torch.Tensor, host: torch.Tensor) -> None:
        """Copies a filled host buffer (of `fill`) over `target`, at whose address a captured graph looks."""
        self._copy(host, target, target.numel())

    def fill(self, num_bytes: int) -> torch.Tensor:
        """A host buffer of at least `num_bytes` that no copy reads any more."""
        return self._next(num_bytes)

    def _next(self, num_bytes: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if self._host[self._turn].numel() < num_bytes:
            self._host[self._turn] = torch.empty(_rounded(num_bytes), dtype=torch.uint8, pin_memory=self._pinned)
        return self._host[self._turn]

    def _copy(self, host: torch.Tensor, target: torch.Tensor, num_bytes: int) -> None:
        target[:num_bytes].copy_(host[:num_bytes], non_blocking=True)
        if self._pinned:
            event = self._copied[self._turn] = self._copied[self._turn] or torch.cuda.Event()
            event.record()


def _rounded(num_bytes: int) -> int:
    return max(LEAST, 1 << (num_bytes - 1).bit_length())
