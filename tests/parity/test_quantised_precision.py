"""A quantised model in both precisions: near is used where it is asked for, and moves the logits little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def __init__(self, made: Checkpoint) -> None:
        self._files = open_model(made.path)
        self.config = self._files.config

    def names(self) -> Sequence[str]:
        return self._files.names()

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
