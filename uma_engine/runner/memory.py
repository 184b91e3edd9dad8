"""How much of a device's memory the KV cache gets: what is left after weights, a step at its largest, and graphs.

Knows bytes; does not know models or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from uma_engine.errors import TooLarge

__all__ = ["DeviceMemory", "num_kv_blocks"]


MOST_BLOCKS = 2**20  # beyond this a tiny model's books on the host would outgrow the model


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device, measured with weights and adapters in place and nothing running.

    `free` is what the driver would still give; `step` the most that a step takes besides, `graphs` what captured graphs
    keep for themselves.
    """

    total: int
    free: int
    step: int
    graphs: int


def num_kv_blocks(memory: DeviceMemory, block_bytes: int, utilization: float, wanted_bytes: int | None) -> int:
    """Blocks of `block_bytes` that fit, or as many as `wanted_bytes` holds.

    Errors:  TooLarge when not one block, or not what was asked for, fits
    """
    used = memory.total - memory.free
    room = int(memory.total * utilization) - used - memory.step - memory.graphs
    if wanted_bytes is None:
        if room < block_bytes:
            raise TooLarge(
                f"no room for a KV cache: of {memory.total:,} bytes, {used:,} are in use, a step takes {memory.step:,} and"
                f" graphs {memory.graphs:,}, and `gpu_memory_utilization` is {utilization}",
                hint="lower `max_num_batched_tokens` or `max_loras`, take a smaller model, or raise `gpu_memory_utilization`",
                param="gpu_memory_utilization",
            )
        return min(room // block_bytes, MOST_BLOCKS)
    if wanted_bytes > room:
        raise TooLarge(
            f"`kv_cache_bytes` is {wanted_bytes:,} but {max(0, room):,} bytes of the device are left for it",
            hint="leave it out to take what is left, or lower `max_num_batched_tokens`",
            param="kv_cache_bytes",
        )
    return wanted_bytes // block_bytes
