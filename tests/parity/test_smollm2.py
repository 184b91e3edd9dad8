"""The real default model: SmolLM2-135M as it is stored, against transformers on the same weights dequantised."""

from __future__ import annotations

import random
from pathlib import Path as FilePath

import pytest
import torch
import transformers
from parity_helpers import Cache, Chunk, Path, Truth, exact, run_logits

from uma_engine.catalog import open_model, resolve
from uma_engine.catalog.model_files import ModelFiles
from uma_engine.models import load_model
from uma_engine.onnx import OnnxScorer, export_onnx
from uma_engine.train.base_model import transformers_model

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
    hf = transformers_model(files, transformers.AutoModelForCausalLM)
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


@pytest.mark.weights
def test_smollm2_on_onnx_runtime_matches_too(
    files: ModelFiles, truth: Truth, prompt: list[int], tmp_path: FilePath
) -> None:
    """As a job of 41 tokens and a candidate, beside another candidate."""
    scorer = OnnxScorer(export_onnx(files, tmp_path / "graph"))
    logits = scorer.score(prompt[:41], [prompt[:30], prompt[41:]], range(scorer.vocab_size))
    truth.assert_matches(torch.from_numpy(logits[1:]), slice(-1, None))
