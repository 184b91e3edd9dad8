"""A quantised model in all precisions: near and fast are used where they are asked for, and near moves the logits little."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from parity_checkpoints import Checkpoint
from parity_helpers import Cache, Chunk, Path, run_logits

from uma_engine.catalog import open_model
from uma_engine.models import load_model
from uma_kernels.linear import BlockQuantized
from uma_kernels.testing import assert_near

BLOCK = 32


def quantised(weight: torch.Tensor) -> BlockQuantized:
    """8 bits in blocks of 32."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(dim=-1) / 127
    quants = torch.round(blocks / scales[:, :, None]).to(torch.int8).reshape(weight.shape)
    return BlockQuantized(8, BLOCK, quants, scales, None)


class Quantised:
    """A checkpoint whose layers' matrices are rounded to 8 bits."""

    def __init__(self, made: Checkpoint, num_layers: int | None = None) -> None:
        self._files = open_model(made.path)
        config = self._files.config
        self.config = dataclasses.replace(config, num_layers=num_layers or config.num_layers)

    def names(self) -> Sequence[str]:
        above = tuple(f"model.layers.{i}." for i in range(self.config.num_layers, self._files.config.num_layers))
        return [name for name in self._files.names() if not name.startswith(above)]

    def tensor(self, name: str) -> torch.Tensor | BlockQuantized:
        value = self._files.tensor(name)
        assert isinstance(value, torch.Tensor)
        return quantised(value) if "_proj" in name else value


def test_near_moves_the_logits_of_a_quantised_model_little(
    checkpoint: Callable[[str], Checkpoint], backend: str
) -> None:
    made = checkpoint("llama")
    logits = {}
    for precision in ("exact", "near"):
        model = load_model(Quantised(made), max_positions=128, precision=precision)
        cache = Cache(model.config)
        logits[precision] = run_logits(model, cache, [Chunk(Path(cache), made.prefix + made.left)])
    assert torch.equal(logits["near"], logits["exact"]) is (backend == "triton")  # whose weights are dense
    assert_near(logits["near"], logits["exact"], products=4 * model.config.num_layers)


@pytest.mark.parametrize("num_layers", [1, None], ids=["the last block alone", "all blocks"])
def test_the_last_block_of_fast_is_near(
    checkpoint: Callable[[str], Checkpoint], backend: str, num_layers: int | None
) -> None:
    made = checkpoint("llama")
    logits = {}
    for precision in ("near", "fast"):
        model = load_model(Quantised(made, num_layers), max_positions=128, precision=precision)
        cache = Cache(model.config)
        logits[precision] = run_logits(model, cache, [Chunk(Path(cache), made.prefix + made.left)])
    assert torch.equal(logits["near"], logits["fast"]) is (num_layers == 1 or backend == "triton")
