"""Which requests can run at all, and which of their segments need blocks.

Knows the limits and the shape of a request; does not know what else waits or runs.
"""

from __future__ import annotations

from uma_engine.config import EngineConfig
from uma_engine.core import NO_PARENT, Request, RequestKind
from uma_engine.errors import TooLarge
from uma_engine.kv_cache import BlockPool
from uma_engine.kv_cache.prefix_cache import encode_tokens

__all__ = ["mark_and_check_segments"]


def mark_and_check_segments(request: Request, config: EngineConfig, pool: BlockPool, max_model_len: int) -> None:
    """Set `transient` on the segments whose KV nobody will read again, and refuse a request that could never finish.

    A request that passes can run alone: the blocks of any path from the root fit the pool, its output included.
    Errors: TooLarge; InvalidRequest when a token id is no 32-bit integer.
    """
    generates = request.kind is RequestKind.GENERATE
    path_blocks: list[int] = []  # up to and with each segment
    for index, segment in enumerate(request.segments):
        num_tokens = len(segment.token_ids)
        grows = index == request.growing
        max_tokens = request.sampling.max_tokens if grows and request.sampling is not None else 0
        path_tokens = segment.path_offset + num_tokens + max_tokens
        if path_tokens > max_model_len:
            what = "with its output" if grows else "from the root"
            raise TooLarge(
                f"segment {index} ends at {path_tokens} tokens {what} but `max_model_len` is {max_model_len}",
                hint="shorten the text, ask for fewer tokens, or raise `max_model_len` if the model allows it",
            )
        fits_step = num_tokens <= config.max_num_batched_tokens
        segment.transient = segment.scored and not segment.children_left and fits_step and not generates
        num_blocks = 0 if segment.parent == NO_PARENT else path_blocks[segment.parent]
        if not segment.transient:
            encode_tokens(segment.token_ids)
            # the last output token ends the request, so it is never computed
            num_blocks += -(-(num_tokens + max(0, max_tokens - 1)) // pool.block_size)
        path_blocks.append(num_blocks)
        if num_blocks > pool.num_blocks:
            raise TooLarge(
                f"the path to segment {index} takes {num_blocks} KV blocks but there are {pool.num_blocks}",
                hint="raise `kv_cache_bytes`, or shorten the text",
            )
