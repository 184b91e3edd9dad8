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

__all__ = ["Stack"]

logger = logging.getLogger("uma_engine")

Progress = Callable[[int, int, str], None]
DEFAULT_MAX_MODEL_LEN = 8192


class Stack:
    """One loaded base, ready to run. `close()` stops its loop and frees its memory."""

    def __init__(self, model: str | Path, config: EngineConfig, progress: Progress | None = None) -> None:
        from uma_engine.adapters import AdapterRegistry
        from uma_engine.catalog import open_model, resolve
        from uma_engine.catalog.chat_template import ChatTemplate
        from uma_engine.engine import EngineLoop
        from uma_engine.kv_cache import BlockPool
        from uma_engine.models import load_model
        from uma_engine.runner import ModelRunner
        from uma_engine.scheduler import Scheduler
        from uma_kernels import dispatch

        if dispatch.C is None and dispatch.forced_backend() is None:
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
        self.tokenizer: Tokenizer = files.tokenizer
        self.template = ChatTemplate(files.chat_template, self.tokenizer)
        num_blocks = config.kv_cache_bytes // self._block_bytes()
        if num_blocks < 1:
            raise InvalidRequest(
                f"`kv_cache_bytes` is {config.kv_cache_bytes} but one block of {config.block_size} tokens takes {self._block_bytes()}",
                hint="raise `kv_cache_bytes`",
                param="kv_cache_bytes",
            )
        self.max_model_len = self._max_model_len(num_blocks)
        with dispatch.threads(threads):  # torch's own OpenMP team would hang in a forked child
            self.model = load_model(files, max_positions=self.max_model_len, precision=config.precision)
        self.flops_per_token = self.model.flops_per_token
        self._unbacked_tokens = self.tokenizer.vocab_size > self.model_config.vocab_size
        self.backend = dispatch.description()
        self.adapters = AdapterRegistry(config.max_loras, config.max_lora_rank, self.model.sites())
        self.block_pool = BlockPool(num_blocks, config.block_size)
        self.scheduler = Scheduler(config, self.block_pool, max_model_len=self.max_model_len)
        try:
            self.runner = ModelRunner(self.model, config, num_blocks, self.adapters)
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as RuntimeError
            raise TooLarge(
                f"a KV cache of {config.kv_cache_bytes:,} bytes cannot be allocated",
                hint="lower `kv_cache_bytes`",
                param="kv_cache_bytes",
            ) from error
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            max_waiting=config.max_waiting,
            on_thread_start=lambda: dispatch.set_num_threads(threads),
        )

    def _block_bytes(self) -> int:
        c = self.model_config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4 * self.config.block_size  # keys and values, fp32

    def _max_model_len(self, num_blocks: int) -> int:
        limit = self.model_config.max_position_embeddings
        capacity = num_blocks * self.config.block_size
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

    def close(self) -> None:
        """Stop the loop, then let go of weights and KV cache: the memory is free although the engine object lives on."""
        self.loop.close()
        for adapter in self.adapters.loaded():
            self.adapters.unload(adapter.name)
        self.runner.release()
        self.__dict__.pop("model", None)
