"""Builds steps by hand: sequences with slots in a small KV cache, chunks of them, and the batch of one step.

Knows the model's inputs; does not know the scheduler or the runner, so that it can contradict them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from uma_engine.config import ModelConfig
from uma_engine.layers.batch_input import BatchInput, DecodeBatch, KVCacheTensors
from uma_engine.layers.linear import AdapterSites
from uma_engine.models import DecoderModel
from uma_kernels.attention import AttentionBatch
from uma_kernels.lora import LoraRouting
from uma_kernels.testing import assert_reduction

BLOCK_SIZE = 4
NUM_SLOTS = 16  # adapter slots


class Cache:
    """KV tensors full of NaN and a shuffled pile of free blocks: a path is seldom contiguous in memory."""

    def __init__(self, config: ModelConfig, num_blocks: int = 64) -> None:
        shape = (num_blocks * BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        self.tensors = KVCacheTensors(
            k=[torch.full(shape, torch.nan) for _ in layers], v=[torch.full(shape, torch.nan) for _ in layers]
        )
        self.free = random.sample(range(num_blocks), num_blocks)


@dataclass
class Path:
    """A segment being computed, below an optional parent whose tokens it sees."""

    cache: Cache
    parent: Path | None = None
    slots: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    @property
    def context(self) -> list[int]:
        """Slots of everything above and of its own tokens so far, in path order."""
        return (self.parent.context if self.parent else []) + self.slots

    def grow(self, num_tokens: int) -> list[int]:
        for _ in range(num_tokens):
            if len(self.slots) % BLOCK_SIZE == 0:
                self.blocks.append(self.cache.free.pop())
            self.slots.append(self.blocks[-1] * BLOCK_SIZE + len(self.slots) % BLOCK_SIZE)
        return self.slots[-num_tokens:]


@dataclass
class Chunk:
    """Tokens of one path in a step. `transient`: their keys live for this step only. `slot`: the adapter's, or -1."""

    path: Path
    tokens: Sequence[int]
    slot: int = -1
    transient: bool = False


def make_batch(
    chunks: Sequence[Chunk], *, num_decodes: int = 0, prune: bool = False, last_only: bool = False
) -> BatchInput:
    """The step's tensors; wants every row, or with `last_only` the last row of each chunk."""
    positions: list[int] = []
    slot_mapping: list[int] = []
    adapter_slots: list[int] = []
    contexts: list[list[int]] = []
    row_contexts: list[list[int]] = []  # of each row, cut at itself
    last_rows: list[int] = []
    for chunk in chunks:
        n, row = len(chunk.tokens), len(positions)
        above = chunk.path.context
        own = [-1 - r for r in range(row, row + n)] if chunk.transient else chunk.path.grow(n)
        positions += range(len(above), len(above) + n)
        slot_mapping += [-1] * n if chunk.transient else own
        adapter_slots += [chunk.slot] * n
        contexts.append(above + own)
        row_contexts += [above + own[: i + 1] for i in range(n)]
        last_rows.append(row + n - 1)
    rows = last_rows if last_only else list(range(len(positions)))
    decode = None
    if num_decodes:
        tables = [chunk.path.blocks for chunk in chunks[:num_decodes]]
        width = max(map(len, tables))
        decode = DecodeBatch(
            torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            torch.tensor([len(context) for context in contexts[:num_decodes]], dtype=torch.int32),
            BLOCK_SIZE,
        )
    has_adapters = any(slot >= 0 for slot in adapter_slots)
    return BatchInput(
        input_ids=torch.tensor([token for chunk in chunks for token in chunk.tokens], dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        attention=_attention([len(chunk.tokens) for chunk in chunks[num_decodes:]], contexts[num_decodes:]),
        slot_mapping=torch.tensor(slot_mapping, dtype=torch.int32),
        output_rows=torch.tensor(rows, dtype=torch.int64),
        last_attention=(
            _attention([1] * len(rows[num_decodes:]), [row_contexts[row] for row in rows[num_decodes:]])
            if prune
            else None
        ),
        decode=decode,
        lora_routing=_routing(adapter_slots) if has_adapters else None,
        output_lora_routing=_routing([adapter_slots[row] for row in rows]) if has_adapters else None,
    )


def run_logits(
    model: DecoderModel,
    cache: Cache,
    chunks: Sequence[Chunk],
    adapters: AdapterSites | None = None,
    num_decodes: int = 0,
) -> torch.Tensor:
    """Logits [T, V] of every row of one step."""
    batch = make_batch(chunks, num_decodes=num_decodes)
    return model.logits(model.forward(batch, cache.tensors, adapters))


def _routing(slots: list[int]) -> LoraRouting:
    return LoraRouting.build(torch.tensor(slots, dtype=torch.int32), NUM_SLOTS)


def _attention(query_lens: list[int], contexts: list[list[int]]) -> AttentionBatch:
    def offsets(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    slots = torch.tensor([slot for context in contexts for slot in context], dtype=torch.int32)
    return AttentionBatch(offsets(query_lens), slots, offsets([len(context) for context in contexts]))


def randomise(model: torch.nn.Module) -> None:
    """Weights far from their initial form, norms and biases included, so that nothing hides behind a 0 or a 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in fp64 throughout: transformers' norms would otherwise still compute in fp32."""
    model = copy.deepcopy(model).double()
    for module in _norms(model):
        is_gemma = type(module).__name__.startswith("Gemma")
        eps = module.eps if is_gemma else module.variance_epsilon
        weight = module.weight.data + 1.0 if is_gemma else module.weight.data
        module.forward = lambda x, weight=weight, eps=eps: x * torch.rsqrt(x.square().mean(-1, True) + eps) * weight
    return model


def _norms(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))


@dataclass
class Truth:
    """transformers' logits [T, V] for one sequence, in fp64 and in fp32.

    `group`: sequences of the same base computed alike. How far fp32 strays is judged over all of them: a dozen tokens
    alone may be lucky.
    """

    exact: torch.Tensor
    fp32: torch.Tensor
    group: list[Truth] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, model: torch.nn.Module, exact_model: torch.nn.Module, tokens: Sequence[int]) -> Truth:
        ids = torch.tensor([list(tokens)])
        return cls(exact_model(ids, use_cache=False).logits[0], model(ids, use_cache=False).logits[0])

    def assert_matches(self, logits: torch.Tensor, rows: slice = slice(None)) -> None:
        """`logits` are as near to the fp64 rows as REDUCTION asks, given transformers' own error in fp32."""
        actual = self.fp32.clone()
        actual[rows] = logits
        others = [truth for truth in self.group if truth is not self]
        own = torch.cat([self.fp32, *(truth.fp32 for truth in others)])
        exact = torch.cat([self.exact, *(truth.exact for truth in others)])
        assert_reduction(torch.cat([actual, *(truth.fp32 for truth in others)]), own, exact)


def grouped(truths: Sequence[Truth]) -> Sequence[Truth]:
    """The same truths, each knowing the others."""
    for truth in truths:
        truth.group = list(truths)
    return truths
