"""The real default model: SmolLM2-135M as it is stored, against transformers on the same weights dequantised."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from parity_helpers import Cache, Chunk, Path, Truth, exact, run_logits

from uma_engine.catalog import open_model, resolve
from uma_engine.catalog.model_files import ModelFiles
from uma_engine.models import load_model

NUM_TOKENS = 60


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return open_model(resolve("smollm2-135m"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Ids of every frequency; what they say does not matter."""
    return random.Random(0).choices(range(49152), k=NUM_TOKENS)


@pytest.fixture(scope="module")
def truth(files: ModelFiles, prompt: list[int]) -> Truth:
    c = files.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config)
    weights = {}
    for name in files.names():
        value = files.tensor(name)
        weights[name] = value if isinstance(value, torch.Tensor) else value.dequantize()
    hf.load_state_dict(weights, strict=False, assign=True)
    hf.tie_weights()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)  # its table is computed, not loaded
    assert not any(tensor.is_meta for tensor in (*hf.parameters(), *hf.buffers()))
    hf.eval()
    return Truth.of(hf, exact(hf), prompt)


@pytest.mark.weights
def test_smollm2_matches_transformers_on_its_dequantised_weights(
    files: ModelFiles, truth: Truth, prompt: list[int]
) -> None:
    """A prefill in two chunks, then decoding."""
    model = load_model(files, max_positions=256)
    cache = Cache(model.config)
    path = Path(cache)
    parts = [run_logits(model, cache, [Chunk(path, prompt[a:b])]) for a, b in ((0, 23), (23, 56))]
    parts += [run_logits(model, cache, [Chunk(path, [token])], num_decodes=1) for token in prompt[56:]]
    truth.assert_matches(torch.cat(parts))
