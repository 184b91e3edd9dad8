"""Takes a model's tensors out of a source one by one, checked and packed.

Knows names and shapes as they are asked for; does not know files, architectures or what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from uma_engine.config import ModelConfig
from uma_engine.errors import CorruptFile, UnsupportedModel
from uma_kernels.linear import PackedLinear, pack
from uma_kernels.linear.formats import BlockQuantized

__all__ = ["Progress", "WeightReader", "WeightSource"]

Progress = Callable[[int, int], None]
HINT = "fetch the whole model again, or check that the configuration belongs to these weights"


class WeightSource(Protocol):
    """A model's shape and its tensors under Hugging Face names; `uma_engine.catalog` opens files as one."""

    config: ModelConfig

    def names(self) -> Sequence[str]: ...
    def tensor(self, name: str) -> torch.Tensor | BlockQuantized: ...


class WeightReader:
    """Gives packed weights and plain vectors; holds a source's tensor no longer than it takes to pack it.

    `num_bytes` is what was handed out. `progress(done, total)` counts tensors.
    """

    def __init__(self, source: WeightSource, progress: Progress | None = None) -> None:
        self._source = source
        self._left = set(source.names())
        self._total = len(self._left)
        self._progress = progress
        self.num_bytes = 0

    def linear(self, name: str, shape: tuple[int, int]) -> PackedLinear:
        """A matrix [N, K], packed for the back end in force."""
        packed = pack(self._take(name, shape))
        self.num_bytes += packed.nbytes
        self._report()
        return packed

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight or a bias, dense fp32 [size]."""
        value = self._take(name, (size,))
        assert isinstance(value, torch.Tensor)  # blocks are matrices: the shape check has refused them
        value = value.to(torch.float32).contiguous()
        self.num_bytes += value.nbytes
        self._report()
        return value

    def finish(self) -> None:
        """Raises UnsupportedModel when the source holds a tensor that nobody asked for."""
        if self._left:
            raise UnsupportedModel(
                f"the weights hold `{min(self._left)}`, which a `{self._source.config.architecture}` model of this"
                " configuration does not use",
                hint="leaving a weight out would change the model's answers: it is refused instead",
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | BlockQuantized:
        if name not in self._left:
            raise CorruptFile(f"the weights lack the tensor `{name}`", hint=HINT)
        self._left.remove(name)
        value = self._source.tensor(name)
        if tuple(value.shape) != shape:
            raise CorruptFile(
                f"`{name}` has the shape {list(value.shape)} but the configuration says {list(shape)}", hint=HINT
            )
        return value

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._total - len(self._left), self._total)
