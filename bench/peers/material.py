"""What every contestant is given: the same weights in the forms they read, the same token ids, the same adapters.

Knows files under `.peers/shared/`; does not know who reads them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.peers.environments import HOME

NUM_ADAPTERS, LORA_RANK = 4, 16


def make_material(model: str, threads: int, candidates: int) -> dict[str, Any]:
    """The settings of a run: paths of what was made (on first use) and the number of threads."""
    from bench.workload import LABELS, make_workload
    from uma_engine.catalog import open_model, resolve

    source = Path(resolve(model))
    files = open_model(source)
    home = HOME / "shared" / model
    home.mkdir(parents=True, exist_ok=True)
    w = make_workload(files.tokenizer, candidates=candidates)
    rng = random.Random(11)
    workload = {
        "prefix": w.prefix,
        "candidates": w.candidates,
        "suffix": w.suffix,
        "yes": w.labels[0],
        "no": w.labels[1],
        "label_words": LABELS,
        "flat": [[rng.randrange(100, min(40_000, files.config.vocab_size)) for _ in range(450)] for _ in range(16)],
        "name": w.name,
    }
    path = home / f"workload-{candidates}.json"
    path.write_text(json.dumps(workload))
    if not (home / "hf/done").exists():
        _write_hub_directory(files, home / "hf")
    adapters = [home / f"adapter{i}" for i in range(NUM_ADAPTERS)]
    for seed, adapter in enumerate(adapters):
        if not (adapter / "adapter_model.safetensors").exists():
            _write_adapter(files.config, adapter, seed)
    return {
        "model": model,
        "flops_per_token": _linear_flops(files.config),
        "rank_tokens": len(w.prefix) + sum(len(c) + len(w.suffix) for c in w.candidates),
        "gguf": str(source),
        "hf": str(home / "hf"),
        "workload": str(path),
        "adapters": [str(a) for a in adapters],
        "threads": threads,
    }


def _linear_flops(c: Any) -> int:
    """Of all linear layers for one token, a multiply and an add being two. What an engine leaves out (rows that nobody asks for) counts."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return 2 * c.num_layers * c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)


def _write_hub_directory(files: Any, target: Path) -> None:
    """The dequantised weights as a transformers directory with a tokenizer whose ids are the same."""
    import transformers

    from uma_engine.errors import UnsupportedModel
    from uma_engine.train.base_model import transformers_model

    shutil.rmtree(target, ignore_errors=True)
    try:
        model = transformers_model(files, transformers.AutoModelForCausalLM)
    except UnsupportedModel as error:
        print(f"no transformers directory, so only peers that read the file itself: {error}", file=sys.stderr)
        return
    model.save_pretrained(target)
    tokenizer, end = files.tokenizer, files.tokenizer.eos_id
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.library,
        eos_token=tokenizer.piece_of(end),
        bos_token=tokenizer.piece_of(tokenizer.bos_id if tokenizer.bos_id is not None else end),
        unk_token=tokenizer.piece_of(end),
    ).save_pretrained(target)
    (target / "done").touch()


def _write_adapter(c: Any, target: Path, seed: int) -> None:
    """A random PEFT adapter on every linear layer, large enough that forgetting it would show in the scores."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    sites = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    sites = {f"self_attn.{name}": widths for name, widths in sites.items()}
    sites |= {f"mlp.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")} | {"mlp.down_proj": (inner, hidden)}
    tensors = {}
    for layer in range(c.num_layers):
        for site, (width_in, width_out) in sites.items():
            name = f"base_model.model.model.layers.{layer}.{site}"
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(LORA_RANK, width_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(width_out, LORA_RANK, generator=generator)
    target.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": sorted({site.rpartition(".")[2] for site in sites}),
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors")
