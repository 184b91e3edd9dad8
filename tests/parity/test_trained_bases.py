"""Every architecture that is served can be trained: its tree is what transformers' own decoder says of each path, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity_checkpoints import CHECKPOINTS, make_checkpoint
from transformers import AutoModelForCausalLM

from uma_engine.catalog import open_model
from uma_engine.train.base_model import add_lora, transformers_model
from uma_engine.train.recipe import LoRA
from uma_engine.train.tree_forward import ATTENTION, JobTree, label_logits, register_attention

LABELS = [5, 9]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_tree_is_what_transformers_says_of_each_path(name: str, tmp_path: Path) -> None:
    register_attention()
    checkpoint = make_checkpoint(name, tmp_path)
    model = transformers_model(open_model(tmp_path), AutoModelForCausalLM, torch.float64, ATTENTION)
    tree = JobTree(checkpoint.prefix, [checkpoint.left, checkpoint.right, checkpoint.right[:1]])
    with torch.no_grad():
        found = label_logits(model, tree, LABELS)
        for own, logits in zip(tree.candidates, found, strict=True):
            ids = torch.tensor([[*checkpoint.prefix, *own]])
            wanted = checkpoint.hf_exact(ids).logits[0, -1, LABELS]
            torch.testing.assert_close(logits.double(), wanted.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3", "llama3-rope"])
def test_gradients_of_a_tree_are_those_of_its_paths(name: str, tmp_path: Path) -> None:
    register_attention()
    checkpoint = make_checkpoint(name, tmp_path)
    base = transformers_model(open_model(tmp_path), AutoModelForCausalLM, torch.float64, ATTENTION)
    model = add_lora(base, LoRA(rank=4), seed=3).double()
    with torch.no_grad():  # a fresh adapter's second factor is zero: give it values
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    candidates = [checkpoint.left, checkpoint.right]

    def gradients(trees: list[JobTree]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = torch.cat([label_logits(model, tree, LABELS) for tree in trees])
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together = gradients([JobTree(checkpoint.prefix, candidates)])
    apart = gradients([JobTree(checkpoint.prefix, [own]) for own in candidates])
    assert together
    assert together.keys() == apart.keys()
    for parameter_name, value in together.items():
        torch.testing.assert_close(value, apart[parameter_name], rtol=1e-3, atol=1e-5)
