"""Small GGUF files for the tests of the catalog, written by the `gguf` package: another implementation than ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np

QUANTS = gguf.GGMLQuantizationType
# Where the fp16 factors of a block are: random bytes there could be NaN or infinity.
FACTORS = {
    QUANTS.Q4_0: (0,),
    QUANTS.Q4_1: (0, 2),
    QUANTS.Q5_0: (0,),
    QUANTS.Q5_1: (0, 2),
    QUANTS.Q8_0: (0,),
    QUANTS.Q4_K: (0, 2),
    QUANTS.Q5_K: (0, 2),
    QUANTS.Q6_K: (208,),
}
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A quantised matrix of random bits, every bit pattern of every field possible: uint8 [rows, bytes]."""
    block_width, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * width // block_width, block_bytes), np.uint8)
    for at in FACTORS[kind]:
        factors = (rng.standard_normal(len(raw)) * 0.1).astype(np.float16)
        raw[:, at : at + 2] = factors[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(path: Path, fill: Callable[[gguf.GGUFWriter], None], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)


def add_byte_level_tokens(writer: gguf.GGUFWriter) -> int:
    """A vocabulary of the 256 bytes, one merge and two control tokens; returns its size."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*sorted(ByteLevel.alphabet()), "ab", "<|end|>", "<|user|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    return len(pieces)


def llama_tensors(vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Dense weights of a tiny llama under llama.cpp's names (q and k not yet interleaved)."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    head_dim = HIDDEN // HEADS
    tensors = {"token_embd.weight": matrix(vocab_size, HIDDEN), "output_norm.weight": matrix(1, HIDDEN)[0]}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": matrix(1, HIDDEN)[0],
            f"blk.{layer}.ffn_norm.weight": matrix(1, HIDDEN)[0],
            f"blk.{layer}.attn_q.weight": matrix(HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_k.weight": matrix(KV_HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, HEADS * head_dim),
            f"blk.{layer}.ffn_gate.weight": matrix(INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, INNER),
        }
    return tensors


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q_proj and k_proj."""
    shape = weight.shape
    return weight.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def add_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, np.ndarray], quantised: str = "Q8_0") -> None:
    """Matrices quantised, but for the embedding; norms dense."""
    for name, value in tensors.items():
        if name.endswith("attn_q.weight"):
            value = interleave(value, HEADS)
        elif name.endswith("attn_k.weight"):
            value = interleave(value, KV_HEADS)
        if value.ndim == 2 and name != "token_embd.weight":
            kind = QUANTS[quantised]
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)


def tiny_llama(path: Path, quantised: str = "Q8_0") -> dict[str, np.ndarray]:
    """Writes a tiny llama with its tokenizer; returns its weights before interleaving and quantisation."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def fill(writer: gguf.GGUFWriter) -> None:
        add_sizes(writer)
        tensors.update(llama_tensors(add_byte_level_tokens(writer), rng))
        add_tensors(writer, tensors, quantised)

    write_gguf(path, fill)
    return tensors
