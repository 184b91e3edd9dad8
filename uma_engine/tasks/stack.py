"""A base with everything that must travel with it: weights, tokenizer, template, scheduler, runner and adapters.

Knows how the parts are made and wired; does not know any task. Heavy imports happen when a stack is made.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from uma_engine.config import EngineConfig
from uma_engine.core import AdapterRef
from uma_engine.errors import InvalidRequest, TooLarge

if TYPE_CHECKING:
    from uma_engine.catalog.tokenizer import Tokenizer
    from uma_engine.models.weights import Placement
    from uma_engine.runner import DeviceRunner, ModelRunner
    from uma_engine.scheduler import Scheduler

__all__ = ["Stack"]

logger = logging.getLogger("uma_engine")

Progress = Callable[[int, int, str], None]
DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_KV_CACHE_BYTES = 512 * 2**20


class Stack:
    """One loaded base, ready to run. `close()` stops its loop and frees its memory."""

    def __init__(self, model: str | Path, config: EngineConfig, progress: Progress | None = None) -> None:
        from uma_engine.adapters import AdapterRegistry, AdapterStore
        from uma_engine.catalog import open_model, resolve
        from uma_engine.catalog.cache import cache_dir, file_digest
        from uma_engine.catalog.chat_template import ChatTemplate
        from uma_engine.catalog.tokenizer_process import RemoteTokenizer
        from uma_engine.engine import EngineLoop, StepMeter
        from uma_engine.kv_cache import BlockPool
        from uma_engine.models import PackedCache, load_model
        from uma_engine.scheduler import Scheduler
        from uma_kernels import dispatch

        if config.device == "cpu" and dispatch.C is None and dispatch.forced_backend() is None:
            logger.warning(
                "the compiled kernels are not installed; the reference back end is in use and is many times slower "
                "(hint: install a C++ compiler, e.g. `apt-get install g++`, and reinstall uma-engine)"
            )
        self.config = config
        threads = config.num_threads or dispatch.num_threads()
        path = resolve(model, progress=progress)
        # A path is kept whole, so that a record made here replays from anywhere.
        self.name = str(path.resolve()) if Path(model).expanduser().exists() else str(model)
        files = open_model(path)
        self.model_config = files.config
        self.digest: str = files.digest
        self.tokenizer: Tokenizer = RemoteTokenizer(path) if config.tokenizer_process else files.tokenizer
        self.template = ChatTemplate(files.chat_template, self.tokenizer)
        placement = _placement(config)
        num_blocks: int | None = None  # on a device: what fits beside weights and a step, both measured below
        if config.device == "cpu" or config.kv_cache_bytes is not None:
            num_blocks = (config.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES) // self._block_bytes()
            if num_blocks < 1:
                raise InvalidRequest(
                    f"`kv_cache_bytes` is {config.kv_cache_bytes} but one block of {config.block_size} tokens takes {self._block_bytes()}",
                    hint="raise `kv_cache_bytes`",
                    param="kv_cache_bytes",
                )
        self.max_model_len = self._max_model_len(num_blocks)
        with dispatch.threads(threads):  # torch's own OpenMP team would hang in a forked child
            kept = placement.keeps_format and dispatch.choose("linear") == "cpp" and config.packed_cache
            self.model = load_model(
                files,
                max_positions=self.max_model_len,
                precision=config.precision,
                placement=placement,
                packed=PackedCache(cache_dir() / "packed", self.digest, file_digest) if kept else None,
            )
        self.flops_per_token = self.model.flops_per_token
        self._unbacked_tokens = self.tokenizer.vocab_size > self.model_config.vocab_size
        self.backend = dispatch.description() if config.device == "cpu" else dispatch.choose("linear", config.device)
        if config.quantization is not None:
            self.backend += f"-{config.quantization}"
        self.runner: ModelRunner | DeviceRunner
        if config.device == "cpu":
            assert num_blocks is not None
            self.adapters = AdapterRegistry(config.max_loras, config.max_lora_rank, self.model.sites())
            self.runner = self._cpu_runner(num_blocks)
        else:
            num_blocks = self._make_device_runner()
        self.adapter_store = AdapterStore(self.adapters)
        self.block_pool = BlockPool(num_blocks, config.block_size)
        self.scheduler = Scheduler(config, self.block_pool, max_model_len=self.max_model_len)
        self.meter = StepMeter(self.model_config, on_device=config.device != "cpu")
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            max_waiting=config.max_waiting,
            on_thread_start=lambda: dispatch.set_num_threads(threads),
            meter=self.meter,
        )
        if config.device == "cpu":  # a device's queue is not the host's to hold up
            self.model.between_layers = self.loop.between_layers

    def _cpu_runner(self, num_blocks: int) -> ModelRunner:
        from uma_engine.runner import ModelRunner

        try:
            return ModelRunner(self.model, self.config, num_blocks, self.adapters)
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as RuntimeError
            raise TooLarge(
                f"a KV cache of {num_blocks * self._block_bytes():,} bytes cannot be allocated",
                hint="lower `kv_cache_bytes`",
                param="kv_cache_bytes",
            ) from error

    def _make_device_runner(self) -> int:
        """Runner and adapters on the device; the number of KV blocks that fit."""
        from uma_engine.adapters import AdapterRegistry
        from uma_engine.runner import DeviceRunner

        config = self.config
        runner = self.runner = DeviceRunner(self.model, config, self.max_model_len)
        num_blocks = runner.fit()
        # A cache that is smaller than the path that was asked for is refused; the default path shrinks with it.
        self.max_model_len = min(self.max_model_len, self._max_model_len(num_blocks))
        runner.allocate(num_blocks)
        self.adapters = AdapterRegistry(config.max_loras, config.max_lora_rank, self.model.sites(), runner.adapters)
        return num_blocks

    def _block_bytes(self) -> int:
        c, item = self.model_config, 4 if self.config.compute_dtype == "float32" else 2
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * item * self.config.block_size  # keys and values

    def _max_model_len(self, num_blocks: int | None) -> int:
        limit = self.model_config.max_position_embeddings
        capacity = limit if num_blocks is None else num_blocks * self.config.block_size
        wanted = self.config.max_model_len
        if wanted is None:
            return min(limit, DEFAULT_MAX_MODEL_LEN, capacity)
        if wanted > limit:
            raise InvalidRequest(
                f"`max_model_len` is {wanted} but the model was made for {limit} positions", param="max_model_len"
            )
        if wanted > capacity:
            raise InvalidRequest(
                f"`max_model_len` is {wanted} but the KV cache holds {capacity} tokens",
                hint=f"set `kv_cache_bytes` to at least {-(-wanted // self.config.block_size) * self._block_bytes()}",
                param="max_model_len",
            )
        return wanted

    def cache_root(self, adapter: AdapterRef | None, tenant: str) -> bytes:
        """Start of the prefix cache's hash chain: content of the base and the adapter, and the tenant. Names are never keys."""
        h = hashlib.blake2b(digest_size=16)
        for part in (self.digest.encode(), adapter.digest if adapter else b"", tenant.encode()):
            h.update(len(part).to_bytes(4, "little"))
            h.update(part)
        return h.digest()

    def check_tokens(self, ids: list[int]) -> list[int]:
        """`ids` back, all within the model's embedding. A tokenizer may know added tokens that its model has no row for."""
        size = self.model_config.vocab_size
        if self._unbacked_tokens and ids and max(ids) >= size:
            raise InvalidRequest(
                f"token id {max(ids)} is beyond the model's {size} embeddings",
                hint="the text holds an added token that this checkpoint has no weights for",
            )
        return ids

    def forget_cached(self) -> int:
        """Empty the prefix cache and overwrite what free blocks hold; how many held something. Requests in flight go on."""
        wiped: list[int] = []

        def drop(scheduler: Scheduler) -> None:
            wiped.extend(scheduler.block_pool.drop_cached())
            self.runner.wipe(wiped)

        self.loop.call(drop)
        return len(wiped)

    def close(self) -> None:
        """Stop the loop, then let go of weights and KV cache: the memory is free although the engine object lives on."""
        self.loop.close()
        self.tokenizer.close()
        for adapter in self.adapters.loaded():
            self.adapters.unload(adapter.name)
        self.runner.release()
        self.__dict__.pop("model", None)


def _placement(config: EngineConfig) -> Placement:
    """Where the weights go. Errors: InvalidRequest where torch sees no such device"""
    import torch

    from uma_engine.models.weights import Placement

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(
            "`device` is `cuda` but torch sees no CUDA device",
            hint="install torch with CUDA and an NVIDIA driver, or leave `device` out",
            param="device",
        )
    device = (
        torch.device(config.device, torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
    )
    fp8 = config.quantization == "fp8"
    if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidRequest(
            f"`quantization` is `fp8` but {torch.cuda.get_device_name(device)} has no 8-bit floats",
            hint="leave it out",
            param="quantization",
        )
    return Placement(device, getattr(torch, config.compute_dtype), config.mode, fp8)
