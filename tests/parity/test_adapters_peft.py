"""Adapters made by PEFT, served by us: every way to configure them, all mixed in one batch, against PEFT itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import peft
import pytest
import torch
from parity_checkpoints import Checkpoint
from parity_helpers import NUM_SLOTS, Cache, Chunk, Path, Truth, grouped, make_batch, run_logits
from peft.tuners.tuners_utils import check_target_module_exists

from uma_engine.adapters import AdapterRegistry
from uma_engine.adapters.peft_config import PeftConfig
from uma_kernels.testing import assert_invariant

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name -> LoraConfig. The base has 3 layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]},
    "r3-alpha": {"r": 3, "lora_alpha": 7, "target_modules": LINEARS},
    "r8-all-linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "r16-small-alpha": {"r": 16, "lora_alpha": 2, "target_modules": ["o_proj", "mlp.down_proj"]},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": LINEARS},
    "rank-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 11, r"layers\.1\.mlp\..*": 2, "^model.layers.2.self_attn.v_proj": 1},
    },
    "alpha-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEARS,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 24, "down_proj": 3},
    },
    "rslora-patterns": {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": LINEARS,
        "rank_pattern": {"k_proj": 9},
        "alpha_pattern": {"k_proj": 5, "up_proj": 1},
    },
    "regex": {"r": 5, "lora_alpha": 10, "target_modules": r".*\.layers\.[12]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "layers": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one-layer": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": LINEARS,
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclude": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "exclude_modules": ["mlp.gate_proj"]},
}


@dataclass
class Trained:
    """What PEFT saved, and its logits for one sequence with each adapter (None: with none)."""

    base: Checkpoint
    directories: dict[str, FilePath]
    tokens: dict[str | None, list[int]]
    truths: dict[str | None, Truth]


@pytest.fixture(scope="module")
def trained(checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base, root = checkpoint("llama-biases"), tmp_path_factory.mktemp("adapters")
    random.seed(0)
    torch.manual_seed(0)
    directories, model, exact_model = {}, None, None
    for name, options in ADAPTERS.items():
        config = peft.LoraConfig(init_lora_weights=False, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
        made = peft.get_peft_model(base.load_hf(), config)
        made.save_pretrained(root / name)
        directories[name] = root / name
    model, exact_model = (_with_adapters(hf, directories) for hf in (base.load_hf(), base.load_hf_exact()))
    tokens: dict[str | None, list[int]] = {name: random.choices(range(131), k=12) for name in (None, *ADAPTERS)}
    truths: dict[str | None, Truth] = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        exact_model.set_adapter(name)
        truths[name] = Truth.of(model, exact_model, tokens[name])
    truths[None] = Truth.of(base.hf, base.hf_exact, tokens[None])
    grouped(list(truths.values()))
    return Trained(base, directories, tokens, truths)


def _with_adapters(hf: torch.nn.Module, directories: dict[str, FilePath]) -> peft.PeftModel:
    names = list(directories)
    model = peft.PeftModel.from_pretrained(hf, directories[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(directories[name], adapter_name=name)
    # PEFT keeps adapters in fp32: in an fp64 base they must compute in fp64 too.
    return model.to(next(hf.parameters()).dtype).eval()


def test_all_adapters_and_none_mixed_in_one_batch_match_peft(trained: Trained, backend: str) -> None:
    """Prefill of every sequence in one step, then again in two chunks, the second of which decodes for some."""
    model = trained.base.load()
    registry = AdapterRegistry(NUM_SLOTS, max_rank=16, sites=model.sites())
    slots: dict[str | None, int] = {None: -1}
    slots |= {name: registry.load(name, path).slot for name, path in trained.directories.items()}
    order = random.sample(list(trained.tokens), len(trained.tokens))
    cache = Cache(model.config, num_blocks=128)
    logits = run_logits(model, cache, [Chunk(Path(cache), trained.tokens[n], slots[n]) for n in order], registry)
    for name, rows in zip(order, logits.split(12), strict=True):
        trained.truths[name].assert_matches(rows)

    paths = {name: Path(cache) for name in order}
    run_logits(model, cache, [Chunk(paths[n], trained.tokens[n][:11], slots[n]) for n in order], registry)
    last = [Chunk(paths[n], trained.tokens[n][11:], slots[n]) for n in order]
    for name, row in zip(order, run_logits(model, cache, last, registry, num_decodes=5), strict=True):
        trained.truths[name].assert_matches(row[None], slice(11, 12))


def test_a_pruned_last_layer_applies_adapters_to_the_output_rows(trained: Trained, backend: str) -> None:
    model = trained.base.load()
    registry = AdapterRegistry(NUM_SLOTS, max_rank=16, sites=model.sites())
    slots = {name: registry.load(name, trained.directories[name]).slot for name in ("r3-alpha", "rslora")}
    order = ["rslora", None, "r3-alpha"]

    def last_rows(prune: bool) -> torch.Tensor:
        cache = Cache(model.config)
        chunks = [Chunk(Path(cache), trained.tokens[n], slots.get(n, -1), transient=True) for n in order]
        return model.forward(make_batch(chunks, prune=prune, last_only=True), cache.tensors, registry)

    pruned = last_rows(prune=True)
    for name, logits in zip(order, model.logits(pruned), strict=True):
        trained.truths[name].assert_matches(logits[None], slice(-1, None))
    if backend.startswith("cpp"):  # torch's own matrix products round by the shape of the batch
        assert_invariant(pruned, last_rows(prune=False))


def test_every_adapter_changes_the_logits(trained: Trained) -> None:
    """Otherwise the comparisons above would show nothing."""
    for name in ADAPTERS:
        base = Truth.of(trained.base.hf, trained.base.hf_exact, trained.tokens[name])
        for rows in (slice(None), slice(-1, None)):
            with pytest.raises(AssertionError, match="max error"):
                trained.truths[name].assert_matches(base.fp32[rows], rows)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": LINEARS, "exclude_modules": r".*\.1\..*"},
        {"target_modules": LINEARS, "exclude_modules": ["layers.1.mlp.up_proj", "q_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
def test_targets_are_those_that_peft_finds(options: dict[str, Any], prefix: str) -> None:
    theirs = peft.LoraConfig(**options)
    ours = PeftConfig.parse({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **options})
    parts = [f"self_attn.{p}" for p in LINEARS[:4]] + [f"mlp.{p}" for p in LINEARS[4:]]
    modules = [f"{prefix}layers.{layer}.{part}" for layer in range(3) for part in parts]
    expected = [bool(check_target_module_exists(theirs, module)) for module in modules]
    assert [ours.targets(module) for module in modules] == expected
