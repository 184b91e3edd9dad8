"""Takes a model's tensors out of a source one by one, checked and packed.

Knows names and shapes as they are asked for; does not know files, architectures or what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from uma_engine.config import ModelConfig
from uma_engine.errors import CorruptFile, UnsupportedModel
from uma_kernels.linear import FP8, PackedLinear, pack
from uma_kernels.linear.formats import BlockQuantized

__all__ = ["Placement", "Progress", "Reader", "WeightReader", "WeightSource"]

Progress = Callable[[int, int], None]
HINT = "fetch the whole model again, or check that the configuration belongs to these weights"


class WeightSource(Protocol):
    """A model's shape and its tensors under Hugging Face names; `uma_engine.catalog` opens files as one."""

    config: ModelConfig

    def names(self) -> Sequence[str]: ...
    def tensor(self, name: str) -> torch.Tensor | BlockQuantized: ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go, as what, and how products with them are computed (`mode` of `uma_kernels.linear.pack`).

    On the CPU weights stay as they are: quantised ones quantised, dense ones fp32. On a device, and with another dtype,
    each becomes dense in `dtype`, rounded once from fp32. `fp8`: the blocks' matrices become e4m3 in its place, unless their rows
    do not fill 16 bytes; embeddings and logits keep `dtype`, which must be bf16.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    mode: str = "audit"
    fp8: bool = False

    @property
    def keeps_format(self) -> bool:
        return self.device.type == "cpu" and self.dtype is torch.float32


class Recorder(Protocol):
    """Takes note of what a WeightReader hands out, by the name of the first tensor in it."""

    def matrices(self, name: str, packed: list[PackedLinear]) -> None: ...
    def vector(self, name: str, value: torch.Tensor) -> None: ...


class Reader(Protocol):
    """Where a model takes its weights from: a WeightReader, or the packed weights of an earlier start."""

    num_bytes: int

    @property
    def placement(self) -> Placement: ...
    def linear(self, name: str, shape: tuple[int, int], *, of_block: bool = True) -> PackedLinear: ...
    def linears(self, matrices: Sequence[tuple[str, tuple[int, int]]]) -> list[PackedLinear]: ...
    def vector(self, name: str, size: int) -> torch.Tensor: ...
    def finish(self) -> None: ...


class WeightReader:
    """Gives packed weights and plain vectors; holds a source's tensor no longer than it takes to pack it.

    `num_bytes` is what was handed out. `progress(done, total)` counts tensors.
    """

    def __init__(
        self,
        source: WeightSource,
        progress: Progress | None = None,
        placement: Placement | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._source = source
        self.placement = placement or Placement()
        self._left = set(source.names())
        self._total = len(self._left)
        self._progress = progress
        self._recorder = recorder
        self.num_bytes = 0

    def linear(self, name: str, shape: tuple[int, int], *, of_block: bool = True) -> PackedLinear:
        """A matrix [N, K], packed for the back end in force. `of_block`: not an embedding or the logits' weight."""
        return self._linears([(name, shape)], self.placement.fp8 and of_block)[0]

    def linears(self, matrices: Sequence[tuple[str, tuple[int, int]]]) -> list[PackedLinear]:
        """Matrices of one K, their rows one after the other: neighbours that share a format are packed as one."""
        return self._linears(matrices, self.placement.fp8)

    def _linears(self, matrices: Sequence[tuple[str, tuple[int, int]]], fp8: bool) -> list[PackedLinear]:
        dtype = FP8 if fp8 and matrices[0][1][1] % 16 == 0 else None
        packed: list[PackedLinear] = []
        run: list[torch.Tensor | BlockQuantized] = []
        for name, shape in matrices:
            value = self._placed(self._take(name, shape), dtype)
            if run and _format_of(run[-1]) != _format_of(value):
                packed.append(self._pack(_concatenate(run), dtype))
                run = []
            run.append(value)
            self._report()
        packed.append(self._pack(_concatenate(run), dtype))
        self.num_bytes += sum(weight.nbytes for weight in packed)
        if self._recorder is not None:
            self._recorder.matrices(matrices[0][0], packed)
        return packed

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight or a bias, dense [size]: fp32 on the CPU."""
        value = self._take(name, (size,))
        assert isinstance(value, torch.Tensor)  # blocks are matrices: the shape check has refused them
        value = value.to(torch.float32).to(self.placement.device, self.placement.dtype).contiguous()
        self.num_bytes += value.nbytes
        if self._recorder is not None:
            self._recorder.vector(name, value)
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

    def _placed(self, value: torch.Tensor | BlockQuantized, dtype: torch.dtype | None) -> torch.Tensor | BlockQuantized:
        """On its device; `dtype`: what it will be packed as, None: what it is."""
        if self.placement.keeps_format:
            return value
        dense = value if isinstance(value, torch.Tensor) else value.dequantize()
        return dense.to(self.placement.device, self.placement.dtype if dtype is None else torch.float32)

    def _pack(self, value: torch.Tensor | BlockQuantized, dtype: torch.dtype | None) -> PackedLinear:
        return pack(value, dtype, mode=self.placement.mode)

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


def _format_of(weight: torch.Tensor | BlockQuantized) -> object:
    return weight.dtype if isinstance(weight, torch.Tensor) else (weight.bits, weight.block_size, weight.mins is None)


def _concatenate(run: list[torch.Tensor | BlockQuantized]) -> torch.Tensor | BlockQuantized:
    """The rows of weights of one format, one after the other."""
    if len(run) == 1:
        return run[0]
    dense = [weight for weight in run if isinstance(weight, torch.Tensor)]
    return torch.cat(dense) if dense else BlockQuantized.cat([w for w in run if isinstance(w, BlockQuantized)])
