"""Every architecture against transformers: however a sequence is computed, its logits are the same to rounding."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from parity_checkpoints import CHECKPOINTS, Checkpoint
from parity_helpers import Cache, Chunk, Path, make_batch, run_logits

from uma_engine.catalog import open_model
from uma_engine.config import RopeScaling
from uma_engine.errors import CorruptFile, InvariantViolation, UnsupportedModel
from uma_engine.layers.rotary import make_rotary_table
from uma_engine.models import DecoderModel, load_model
from uma_kernels.linear.formats import BlockQuantized
from uma_kernels.testing import assert_invariant

Make = Callable[[str], Checkpoint]


@pytest.fixture(params=CHECKPOINTS)
def tiny(request: pytest.FixtureRequest, checkpoint: Make, backend: str) -> tuple[Checkpoint, DecoderModel, Cache]:
    """A checkpoint, the model packed for the back end under test, and an empty cache."""
    made = checkpoint(request.param)
    model = made.load()
    return made, model, Cache(model.config)


def test_a_whole_prefill_matches(tiny: tuple[Checkpoint, DecoderModel, Cache]) -> None:
    made, model, cache = tiny
    made.left_truth.assert_matches(run_logits(model, cache, [Chunk(Path(cache), made.prefix + made.left)]))


def test_a_chunked_prefill_matches(tiny: tuple[Checkpoint, DecoderModel, Cache]) -> None:
    made, model, cache = tiny
    tokens, path = made.prefix + made.left, Path(cache)
    parts = [
        run_logits(model, cache, [Chunk(path, tokens[a:b])]) for a, b in ((0, 5), (5, 6), (6, 19), (19, len(tokens)))
    ]
    made.left_truth.assert_matches(torch.cat(parts))


def test_decoding_token_by_token_matches(tiny: tuple[Checkpoint, DecoderModel, Cache]) -> None:
    """Two sequences decode together, while a third prefills in the same steps."""
    made, model, cache = tiny
    left, right, start = made.prefix + made.left, made.prefix + made.right, 15
    a, b, other = Path(cache), Path(cache), Path(cache)
    run_logits(model, cache, [Chunk(a, left[:start]), Chunk(b, right[:start])])
    steps = []
    for i in range(start, len(right)):
        chunks = [Chunk(a, [left[i]]), Chunk(b, [right[i]])]
        if i % 2:
            chunks.append(Chunk(other, left[len(other.slots) : len(other.slots) + 3]))
        steps.append(run_logits(model, cache, chunks, num_decodes=2))
    made.left_truth.assert_matches(torch.stack([step[0] for step in steps]), slice(start, len(right)))
    made.right_truth.assert_matches(torch.stack([step[1] for step in steps]), slice(start, len(right)))
    prefilled = torch.cat([step[2:] for step in steps])
    made.left_truth.assert_matches(prefilled, slice(0, len(prefilled)))


@pytest.mark.parametrize("transient", [True, False], ids=["transient", "kept"])
def test_siblings_under_a_shared_prefix_match(tiny: tuple[Checkpoint, DecoderModel, Cache], transient: bool) -> None:
    """In one step with their parent, then again over the parent's cached keys, in the other order."""
    made, model, cache = tiny
    parent = Path(cache)
    n, m = len(made.prefix), len(made.left)

    def siblings() -> tuple[Chunk, Chunk]:
        return (
            Chunk(Path(cache, parent), made.left, transient=transient),
            Chunk(Path(cache, parent), made.right, transient=transient),
        )

    logits = run_logits(model, cache, [Chunk(parent, made.prefix), *siblings()])
    made.left_truth.assert_matches(logits[: n + m])
    made.right_truth.assert_matches(torch.cat((logits[:n], logits[n + m :])))
    left, right = siblings()
    again = run_logits(model, cache, [right, left])
    made.right_truth.assert_matches(again[: len(made.right)], slice(n, None))
    made.left_truth.assert_matches(again[len(made.right) :], slice(n, None))


def test_a_pruned_last_layer_gives_the_same_rows(tiny: tuple[Checkpoint, DecoderModel, Cache], backend: str) -> None:
    """A decode, a prefix and its transient children in one step, of which the last row of each is wanted."""
    made, model, _ = tiny
    n, left, right = len(made.prefix), made.left, made.right

    def last_rows(prune: bool) -> tuple[torch.Tensor, Cache]:
        random.seed(1)
        cache = Cache(model.config)
        first, parent = Path(cache), Path(cache)
        model.forward(make_batch([Chunk(first, made.prefix)]), cache.tensors)
        chunks = [
            Chunk(first, left[:1]),
            Chunk(parent, made.prefix),
            Chunk(Path(cache, parent), left, transient=True),
            Chunk(Path(cache, parent), right, transient=True),
        ]
        batch = make_batch(chunks, num_decodes=1, prune=prune, last_only=True)
        return model.forward(batch, cache.tensors), cache

    hidden, cache = last_rows(prune=True)
    logits = model.logits(hidden)
    made.left_truth.assert_matches(logits[:1], slice(n, n + 1))
    made.left_truth.assert_matches(logits[1:2], slice(n - 1, n))
    made.left_truth.assert_matches(logits[2:3], slice(-1, None))
    made.right_truth.assert_matches(logits[3:], slice(-1, None))
    whole_hidden, whole_cache = last_rows(prune=False)
    for name in ("k", "v"):  # the cache holds the same bits: every key is computed either way
        for ours, theirs in zip(getattr(cache.tensors, name), getattr(whole_cache.tensors, name), strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    if backend.startswith("cpp"):  # torch's own matrix products round by the shape of the batch
        assert_invariant(hidden, whole_hidden)


def test_a_step_without_outputs_fills_the_cache(tiny: tuple[Checkpoint, DecoderModel, Cache]) -> None:
    made, model, cache = tiny
    path, tokens = Path(cache), made.prefix + made.left
    batch = make_batch([Chunk(path, tokens[:8])], prune=True, last_only=True)
    batch.output_rows, batch.last_attention = batch.output_rows[:0], make_batch([], prune=True).attention
    assert model.forward(batch, cache.tensors).shape == (0, model.config.hidden_size)
    made.left_truth.assert_matches(run_logits(model, cache, [Chunk(path, tokens[8:])]), slice(8, None))


def test_label_logits_are_the_full_logits_of_those_tokens(tiny: tuple[Checkpoint, DecoderModel, Cache]) -> None:
    made, model, cache = tiny
    hidden = model.forward(make_batch([Chunk(Path(cache), made.prefix + made.left)]), cache.tensors)
    labels = torch.tensor([3, 130, 0])
    logits = model.label_logits(hidden, labels)
    padded = made.left_truth.fp32.clone()
    padded[:, labels] = logits
    made.left_truth.assert_matches(padded)


class InMemory:
    """A checkpoint's tensors in a dictionary, to be tampered with."""

    def __init__(self, made: Checkpoint) -> None:
        files = open_model(made.path)
        self.config = files.config
        self.tensors = {name: files.tensor(name) for name in files.names()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor | BlockQuantized:
        return self.tensors[name]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "gemma3"])
def test_a_loaded_model_knows_its_sites_and_its_cost(checkpoint: Make, name: str) -> None:
    source = InMemory(checkpoint(name))
    seen: list[tuple[int, int]] = []
    model = load_model(source, max_positions=32, progress=lambda *counts: seen.append(counts))
    assert seen == [(i + 1, len(source.tensors)) for i in range(len(source.tensors))]
    matrices = {n: t for n, t in source.tensors.items() if len(t.shape) == 2 and ".layers." in n}
    assert {f"model.{site}.weight": (n, k) for site, (k, n) in model.sites().items()} == {
        n: tuple(t.shape) for n, t in matrices.items()
    }
    assert model.flops_per_token == 2 * sum(t.numel() for t in matrices.values())
    assert model.num_bytes >= 4 * sum(t.numel() for t in source.tensors.values())
    assert (model.head is model.embedding.weight) == source.config.tie_word_embeddings


def test_weights_that_do_not_fit_the_configuration_are_refused(checkpoint: Make) -> None:
    source, name = InMemory(checkpoint("qwen3")), "model.layers.1.self_attn.k_norm.weight"
    good = source.tensors.pop(name)
    with pytest.raises(CorruptFile, match=r"lack the tensor `model\.layers\.1\.self_attn\.k_norm\.weight`"):
        load_model(source, max_positions=32)
    source.tensors[name] = torch.ones(31)
    with pytest.raises(CorruptFile, match=r"has the shape \[31\] but the configuration says \[32\]"):
        load_model(source, max_positions=32)
    source.tensors |= {name: good, "model.layers.0.self_attn.q_proj.bias": torch.ones(128)}
    with pytest.raises(UnsupportedModel, match=r"hold `model.layers.0.self_attn.q_proj.bias`"):
        load_model(source, max_positions=32)
    source.config = dataclasses.replace(source.config, architecture="mamba")
    with pytest.raises(UnsupportedModel, match="`mamba` is not supported"):
        load_model(source, max_positions=32)


def test_a_position_beyond_the_rotary_table_is_refused(checkpoint: Make) -> None:
    model = load_model(InMemory(checkpoint("llama")), max_positions=8)
    cache = Cache(model.config)
    path = Path(cache)
    run_logits(model, cache, [Chunk(path, range(8))])
    with pytest.raises(InvariantViolation, match="position 8 is not below `max_positions` 8"):
        run_logits(model, cache, [Chunk(path, [8])])


def test_a_rotary_table_does_not_depend_on_its_length() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    long, short = (make_rotary_table(24, 1e4, scaling, n) for n in (1000, 77))
    assert_invariant(short, long[:77])
