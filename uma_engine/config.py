"""What an engine is configured with, and what a model's file says about its shape.

Knows names, defaults and limits; does not know files, tensors or environment variables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest

__all__ = [
    "DEVICES",
    "DTYPES",
    "LORA_STORAGES",
    "MODES",
    "PRECISIONS",
    "QUANTIZATIONS",
    "EngineConfig",
    "ModelConfig",
    "RopeScaling",
]

PRECISIONS = ("exact", "near", "fast")
DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODES = ("audit", "fast")
QUANTIZATIONS = (None, "fp8")
LORA_STORAGES = ("dense", "fp8", "int4")
LOG_CONTENTS = ("full", "digest")

MAY_BE_ZERO = frozenset({"max_loras", "seed"})
MAX_INT = {
    "num_threads": 256,
    "block_size": 4096,
    "max_num_batched_tokens": 2**20,
    "max_lora_rank": 256,
    "max_loras": 2**15,
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. Names follow vLLM where they exist there."""

    max_num_batched_tokens: int = 1024  # tokens computed in one step, prefill and decode together
    max_num_seqs: int = 64  # requests running at once (a rank request counts once)
    max_waiting: int = 4096  # queued requests beyond which `Overloaded` is raised
    max_model_len: int | None = None  # tokens on a path from the root; None: the model's own limit, at most 8192
    block_size: int = 16  # tokens in a KV block
    # Size of the paged KV cache. None: 512 MiB on the CPU; on a GPU what `gpu_memory_utilization` leaves, measured
    kv_cache_bytes: int | None = None
    max_loras: int = 8  # adapters resident at once
    max_lora_rank: int = 64
    num_threads: int | None = None  # None: UMA_NUM_THREADS, else the CPUs this process may use
    enable_prefix_cache: bool = True
    # Arithmetic of the linear layers. "near": activations in 16 bits against quantised weights (dense ones: as "exact");
    # "fast": in 8 bits, outliers apart and the last block "near", about twice as fast and its scores a little off;
    # "exact": fp32 activations, fp32 accumulate.
    precision: str = "near"
    # Build and ask the tokenizer in another process: opening the base then hardly keeps this interpreter from other threads
    tokenizer_process: bool = False
    packed_cache: bool = True  # keep packed weights in the cache directory, so that the next start maps them in (CPU)
    seed: int = 0  # base of the seeds of requests that bring none
    device: str = "cpu"  # or "cuda": the current device of torch
    dtype: str = "auto"  # of weights, activations and KV cache. "auto": float32 on the CPU, bfloat16 on a GPU
    # Matrix products on a GPU. "audit": a score has the same bits in any company; "fast": the vendor's library chooses
    mode: str = "audit"
    # Weights and activations of the blocks' products on a GPU. "fp8": e4m3 with a scale a row, 1.4 to 1.8 times as fast and half the
    # memory; it cost the smallest model a third of its order (docs/benchmarks.md): measure yours before you rank with it
    quantization: str | None = None
    # Adapters in a GPU's memory. "dense": in `dtype`; "fp8", "int4": a scale for each rank row, a half or a quarter of 16 bits
    lora_storage: str = "dense"
    gpu_memory_utilization: float = 0.9  # share of the device's memory that the engine may fill
    enforce_eager: bool = False  # never replay CUDA graphs
    # Keep the decision record of every ranking in this file; see `uma_engine.decision_log`. What cannot be kept is not answered
    decision_log: str | Path | None = None
    decision_log_content: str = "full"  # "digest": of job and candidates salted digests alone

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.type == "int | None":
                continue
            if f.type in ("int", "int | None"):
                low = 0 if f.name in MAY_BE_ZERO else 1
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int)
                    or not low <= value <= MAX_INT.get(f.name, 2**62)
                ):
                    most = f" and at most {MAX_INT[f.name]}" if f.name in MAX_INT else ""
                    raise InvalidRequest(
                        f"`{f.name}` is `{value!r}` but must be an integer of at least {low}{most}", param=f.name
                    )
            elif f.type == "bool" and not isinstance(value, bool):
                raise InvalidRequest(f"`{f.name}` is `{value!r}` but must be True or False", param=f.name)
        for name, accepted in (
            ("precision", PRECISIONS),
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("mode", MODES),
            ("quantization", QUANTIZATIONS),
            ("lora_storage", LORA_STORAGES),
            ("decision_log_content", LOG_CONTENTS),
        ):
            if getattr(self, name) not in accepted:
                raise InvalidRequest(
                    f"`{name}` is `{getattr(self, name)}` but must be one of {', '.join(map(str, accepted))}",
                    param=name,
                )
        if self.decision_log is not None and (
            not isinstance(self.decision_log, str | Path) or not str(self.decision_log)
        ):
            raise InvalidRequest(f"`decision_log` is `{self.decision_log!r}` but must be a path", param="decision_log")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidRequest(
                f"`gpu_memory_utilization` is `{share!r}` but must be above 0 and at most 1",
                param="gpu_memory_utilization",
            )
        if self.device == "cpu" and self.dtype not in ("auto", "float32"):
            raise InvalidRequest(
                f"`dtype` is `{self.dtype}` but the CPU computes in float32", hint="leave it out", param="dtype"
            )
        if self.quantization is not None and (self.device == "cpu" or self.compute_dtype != "bfloat16"):
            raise InvalidRequest(
                f"`quantization` is `{self.quantization}` but `device` is `{self.device}` and weights are {self.compute_dtype}",
                hint="8-bit products need a GPU and `dtype` bfloat16; on the CPU a GGUF file's own 4 or 8 bits are kept",
                param="quantization",
            )
        if self.device == "cpu" and self.lora_storage != "dense":
            raise InvalidRequest(
                f"`lora_storage` is `{self.lora_storage}` but the CPU keeps adapters in float32",
                hint="leave it out",
                param="lora_storage",
            )

    @property
    def compute_dtype(self) -> str:
        """The name of the type that `dtype` stands for on this device."""
        return self.dtype if self.dtype != "auto" else "float32" if self.device == "cpu" else "bfloat16"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is `linear` or `llama3` (meaning of the fields as in the Llama 3.1 configuration)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only model, whatever file it came from.

    `architecture` is one of llama, mistral, qwen2, qwen3, gemma3. `layer_types[i]` is "full" or "sliding".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None  # gemma3: the theta of sliding layers
    sliding_window: int | None = None  # tokens a sliding layer sees, the current one included
    layer_types: tuple[str, ...] = ()
    attention_bias: bool = False  # biases on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None  # multiplies q.k; None: head_dim ** -0.5
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, None where the layer sees everything."""
        if self.sliding_window is None:
            return None
        if self.layer_types:
            return self.sliding_window if self.layer_types[layer] == "sliding" else None
        return self.sliding_window
