"""What a GGUF file says about its model: the shape, and which tensor is which.

Knows llama.cpp's keys and tensor names for five architectures; does not know bytes or block formats.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from uma_engine.catalog.fields import Fields
from uma_engine.catalog.gguf import GGUFFile, Strings
from uma_engine.config import ModelConfig, RopeScaling
from uma_engine.errors import CorruptFile, UnsupportedModel

__all__ = ["canonical_name", "config_from_gguf", "end_token_ids", "unpermuted_rows"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
MAX_LAYERS = 1024
ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, not a weight: folded into the config
# Pieces that end a turn or a text, whatever the file names as its one end token.
END_PIECES = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
    "<eos>",
)
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_NAMES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def canonical_name(name: str, architecture: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None for one that no layer of ours uses."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)", stem)
    if not found:
        return None
    names = LAYER_NAMES | GEMMA_NAMES if architecture == "gemma3" else LAYER_NAMES
    part = names.get(found[2])
    return None if part is None else f"model.layers.{found[1]}.{part}.{kind}"


def unpermuted_rows(num_heads: int, head_dim: int) -> np.ndarray:
    """Which stored row is row i of q_proj or k_proj: int64 [num_heads * head_dim].

    llama.cpp stores the rows of llama models interleaved for its rotary form: (0, D/2, 1, D/2 + 1, ...) in each head.
    """
    order = np.arange(num_heads * head_dim, dtype=np.int64).reshape(num_heads, head_dim // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The model's shape from the metadata.

    Errors:  UnsupportedModel for another architecture or an unsupported feature; CorruptFile for wrong values
    """
    where = f"`{file.path}`"
    architecture = Fields(file.metadata, where).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: the architecture `{architecture}` is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)} (mistral is a llama there)",
        )
    fields = Fields(file.metadata, where, f"{architecture}.")
    gemma = architecture == "gemma3"
    num_layers, hidden_size = fields.size("block_count"), fields.size("embedding_length")
    num_heads = _same_in_every_layer(fields, "attention.head_count")
    num_kv_heads = _same_in_every_layer(fields, "attention.head_count_kv", num_heads)
    if num_layers > MAX_LAYERS or num_heads % num_kv_heads:
        raise CorruptFile(f"{where} claims {num_layers} layers, {num_heads} heads and {num_kv_heads} key-value heads")
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    if fields.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{where}: keys are {head_dim} wide but values {fields.get('attention.value_length')}")
    if fields.size("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{where}: `rope.dimension_count` is not the head width {head_dim}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CorruptFile(f"{where} has no tensor `token_embd.weight`", hint="fetch the whole model again")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.number(key, None) is not None:
            raise UnsupportedModel(f"{where}: `{key}` is not supported")
    window = fields.size("attention.sliding_window", 512 if gemma else None)
    layer_types: tuple[str, ...] = ()
    if gemma:
        pattern = fields.size("attention.sliding_window_pattern", 6)
        layer_types = tuple("sliding" if (i + 1) % pattern else "full" for i in range(num_layers))
    elif architecture != "llama":
        window = None  # Qwen files carry the key while the model was trained with full attention
    theta = fields.number("rope.freq_base", 1e6 if gemma else 1e4)
    tokens = Fields(file.metadata, where, "tokenizer.ggml.")
    bos = tokens.token_ids("bos_token_id")
    return ModelConfig(
        architecture="mistral" if architecture == "llama" and window else architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=_same_in_every_layer(fields, "feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_as_written(fields.number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        max_position_embeddings=fields.size("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        rope_scaling=_rope_scaling(file, fields, theta, head_dim),
        rope_local_theta=fields.number("rope.freq_base_swa", 1e4) if gemma else None,
        sliding_window=window,
        layer_types=layer_types,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        # As llama.cpp: the 27B model, known by its 62 layers, scales queries by the width per head of its hidden state.
        query_scale=((hidden_size / num_heads) if num_layers == 62 else head_dim) ** -0.5 if gemma else None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=end_token_ids(file, where),
    )


def end_token_ids(file: GGUFFile, where: str) -> tuple[int, ...]:
    """Ids that end an answer: the file's end-of-sequence and end-of-turn ids, then control pieces known to end one."""
    fields = Fields(file.metadata, where, "tokenizer.ggml.")
    ids = [*fields.token_ids("eos_token_id"), *fields.token_ids("eot_token_id")]
    pieces, kinds = fields.get("tokens", []), fields.get("token_type", [])
    if isinstance(pieces, Strings) and len(pieces) == len(kinds):
        control = {pieces[i]: i for i in np.flatnonzero(np.asarray(kinds) == 3).tolist()}
        ids += [control[piece] for piece in END_PIECES if piece in control]
    return tuple(dict.fromkeys(ids))


def _same_in_every_layer(fields: Fields, key: str, default: Any = None) -> int:
    """A size that llama.cpp may write once, or once for each layer."""
    value = fields.get(key, default) if default is not None else fields.get(key)
    if isinstance(value, np.ndarray):
        if len(set(value.tolist())) != 1:
            raise UnsupportedModel(f"{fields.where}: `{key}` differs between layers")
        return Fields({key: int(value[0])}, fields.where).size(key)
    return fields.size(key, default) if default is not None else fields.size(key)


def _as_written(value: float) -> float:
    """The decimal behind an fp32: 9.999999747378752e-06 was 1e-05 before it was stored."""
    return float(f"{value:.6g}")


def _rope_scaling(file: GGUFFile, fields: Fields, theta: float, head_dim: int) -> RopeScaling | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, theta, head_dim)
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", fields.number("rope.scaling.factor"))
    raise UnsupportedModel(f"{fields.where}: `rope.scaling.type` is `{kind}`", hint="supported are linear and llama3")


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling:
    """Llama 3.1's scaling, recognised by its factors: the file holds those, not the four numbers they came from."""
    stored = np.asarray(file.read(ROPE_FACTORS))
    scaling = RopeScaling("llama3", float(f"{stored.max():.6g}"), 1.0, 4.0, 8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((scaling.original_max_position_embeddings / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise UnsupportedModel(f"`{file.path}`: `{ROPE_FACTORS}` is not the rotary scaling of Llama 3")
    return scaling
