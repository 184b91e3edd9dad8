"""A complete tiny model on disk: random weights, a trained byte-level tokenizer, a chat template, and random adapters.

Real in every part that the engine reads; small enough to load in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "yes no yes no maybe the candidate is a good fit for the job post answer yes or no",
    "You help a client to choose a freelancer. Decide whether the candidate fits the job post.",
    "Is the candidate a good fit for the job? Answer yes or no.\n\nJob post:\n\nCandidate:\n",
    "We need a senior Rust engineer who knows databases, Linux and networks. Python is a plus.",
    "Ten years of nursing in a hospital, careful and kind; bookkeeping, payroll and taxes for small shops.",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 64, 4, 2, 16, 96, 2


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE in which `yes` and `no` are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *(["yes\nno\nmaybe\n"] * 50)], trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    return tokenizer


def make_tiny_model(directory: Path, *, seed: int = 0, layers: int = LAYERS, **config: Any) -> Path:
    """Write a Llama checkpoint with random weights to `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    eos = tokenizer.token_to_id("<|im_end|>")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "bos_token": None})
    )
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": vocab,
                "hidden_size": HIDDEN,
                "intermediate_size": MLP,
                "num_hidden_layers": layers,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "eos_token_id": eos,
                "hidden_act": "silu",
            }
            | config
        )
    )
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (2.0 / shape[-1] ** 0.5)

    tensors = {"model.embed_tokens.weight": weight(vocab, HIDDEN), "model.norm.weight": 1 + 0.1 * weight(HIDDEN)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, (n, k) in site_shapes().items():
            tensors[f"{p}{name}.weight"] = weight(n, k)
        tensors[p + "input_layernorm.weight"] = 1 + 0.1 * weight(HIDDEN)
        tensors[p + "post_attention_layernorm.weight"] = 1 + 0.1 * weight(HIDDEN)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def site_shapes() -> dict[str, tuple[int, int]]:
    """[N, K] of every linear layer of a block."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }


def make_tiny_adapter(
    directory: Path, *, seed: int = 1, rank: int = 4, layers: int = LAYERS, scale: float = 1.0, **config: Any
) -> Path:
    """Write a random PEFT adapter for the tiny model over all its linear layers."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        for name, (n, k) in site_shapes().items():
            p = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{p}.lora_A.weight"] = torch.randn(rank, k, generator=generator) / k**0.5
            tensors[f"{p}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * (scale / rank**0.5)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(rank) | config))
    return directory


def adapter_config(rank: int) -> Mapping[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in site_shapes()],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def make_tiny_gguf(path: Path, quantised: str = "Q4_1", *, hidden: int = 128, mlp: int = 256, layers: int = 2) -> Path:
    """Write a Llama with random quantised weights, heads of 64 and the tiny tokenizer to the file `path` and return it."""
    import gguf
    import numpy as np

    heads, kv_heads, head_dim = hidden // 64, hidden // 128, 64
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokenizer = json.loads(tiny_tokenizer().to_str())
    vocabulary = tokenizer["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in SPECIALS else 1 for piece in pieces])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template(TEMPLATE)

    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) * (2.0 / shape[-1] ** 0.5)).astype(np.float32)

    kind = gguf.GGMLQuantizationType[quantised]
    writer.add_tensor("token_embd.weight", weight(len(pieces), hidden))
    writer.add_tensor("output_norm.weight", 1 + weight(hidden))
    for i in range(layers):
        for name, shape in (
            ("attn_q", (heads * head_dim, hidden)),
            ("attn_k", (kv_heads * head_dim, hidden)),
            ("attn_v", (kv_heads * head_dim, hidden)),
            ("attn_output", (hidden, heads * head_dim)),
            ("ffn_gate", (mlp, hidden)),
            ("ffn_up", (mlp, hidden)),
            ("ffn_down", (hidden, mlp)),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", gguf.quantize(weight(*shape), kind), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", 1 + weight(hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
