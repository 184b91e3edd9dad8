"""Bookkeeping of the paged KV cache: which block holds which tokens, who uses it, what can be reused.

Knows block ids and hash keys; does not know the tensors behind the ids or when a step runs. Imports no torch.
"""

from uma_engine.kv_cache.block_pool import BlockPool
from uma_engine.kv_cache.prefix_cache import PrefixCache

__all__ = ["BlockPool", "PrefixCache"]
