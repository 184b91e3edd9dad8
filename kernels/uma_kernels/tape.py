"""A run of compiled ops recorded once and played again without Python: a CPU's counterpart of a captured GPU graph.

Knows calls and the memory they use; does not know models. What is recorded are addresses: the tensors that go in must stay
where they are, and what is computed between ops in Python, or by torch itself, cannot be played again and is refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uma_kernels.dispatch import choose, extension

__all__ = ["NotTapeable", "Tape", "TapeMemory", "can_tape"]


_CACHE_LINE = 64


class NotTapeable(RuntimeError):
    """A recorded run did something that a tape cannot do again."""


def can_tape(device: str = "cpu") -> bool:
    """Whether ops on this device, called now, are compiled ones."""
    return device == "cpu" and choose("linear", device) == "cpp"


class TapeMemory:
    """Memory of what recorded runs compute on the way, shared by tapes of which one plays at a time.

    A block is free again when the last tensor over it is gone, so that a run takes no more than it holds at once; every
    block stays allocated as long as this object.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}  # by size in bytes
        self.num_bytes = 0

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        shape = tuple(shape)
        wanted = max(_CACHE_LINE, math.prod(shape) * dtype.itemsize)
        size = 1 << (wanted - 1).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            memory = np.empty(size + _CACHE_LINE, np.uint8)
            start = -memory.ctypes.data % _CACHE_LINE
            free.append(memory[start : start + size])
            self.num_bytes += size
        block = free.pop()
        lent = block[:wanted]  # torch holds this very object for as long as a tensor lives over it
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.from_numpy(lent)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Tape:
    """One recorded run: `Tape(run, memory)` makes it, `result` is what it returned, `play` makes it again in place.

    Errors:  NotTapeable from the constructor when `run` uses more than compiled ops, views and `torch.empty`
    """

    def __init__(self, run: Callable[[], torch.Tensor], memory: TapeMemory) -> None:
        self._memory = memory
        self._tape = extension().Tape()
        self._tape.begin()
        try:
            with _Recorder(memory):
                self.result = run()
        finally:
            self._tape.end()

    def __len__(self) -> int:
        return len(self._tape)

    def play(self) -> bool:
        """Overwrites `result`. False when an op refused its input: then nothing after it was computed."""
        return bool(self._tape.play() < 0)


class _Recorder(TorchDispatchMode):
    """Gives out the memory's blocks for `torch.empty`, lets views pass, refuses all else."""

    def __init__(self, memory: TapeMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            return self._memory.empty(args[0], (kwargs or {}).get("dtype") or torch.get_default_dtype())
        if not func.is_view:
            raise NotTapeable(f"torch's own `{func}` cannot be played again")
        return func(*args, **(kwargs or {}))
