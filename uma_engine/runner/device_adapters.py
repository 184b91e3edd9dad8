"""Adapters on a device: a pool for each matrix product, and the routing that all of them share.

Knows sites, slots and factors; does not know files, names or which request uses a slot. `load` may be called from any
thread: it moves factors on a stream of its own, layer by layer, and a running step neither waits for it nor sees it. The
tables that name the new blocks are written between steps, by the runner.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from uma_engine.errors import InvalidRequest
from uma_engine.layers.linear import SiteGroup
from uma_kernels.lora import DeviceRouting, LoraPool, PackedLora

__all__ = ["DeviceAdapters"]


class DeviceAdapters:
    """The pools of one model: `pool_of(site)` is that of the group that begins with `site`."""

    def __init__(
        self,
        groups: Sequence[SiteGroup],
        *,
        max_loras: int,
        max_rank: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: str = "dense",
    ) -> None:
        """Errors: InvalidRequest where the device has no 8-bit floats and `storage` asks for them"""
        if storage == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise InvalidRequest(
                f"`lora_storage` is `fp8` but {torch.cuda.get_device_name(device)} has no 8-bit floats",
                hint="take `int4` or leave it out",
                param="lora_storage",
            )
        self._groups = [tuple(site.name for site in members) for _, members in groups]
        self._device = device
        blocks = max_loras * -(-max_rank // 16)
        self._pools: dict[str, LoraPool] = {
            members[0].name: LoraPool(
                width,
                [site.width for site in members],
                max_loras,
                blocks,
                max_rank=max_rank,
                dtype=dtype,
                storage=storage,
                device=device,
            )
            for width, members in groups
        }
        pools = list(self._pools.values())
        self.routing = DeviceRouting(max_tokens, max_loras, pools)  # of all rows of a step
        self.output_routing = DeviceRouting(max_tokens, max_loras, pools)  # of its output rows
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()  # one load at a time
        self._loaded: deque[int] = deque()  # slots to publish

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools.values())

    def pool_of(self, site: str) -> LoraPool:
        return self._pools[site]

    def load(self, slot: int, packed: Mapping[str, PackedLora]) -> None:
        """Put an adapter's factors (by site; the others stay the base's) on the device; the slot has no running request.

        Returns when they are there. Steps see them from the next `publish` on, which the runner calls before each.
        """
        with self._lock:
            if self._stream is None:
                self._write(slot, packed)
            else:
                with torch.cuda.stream(self._stream):
                    self._write(slot, packed)
                self._stream.synchronize()
            self._loaded.append(slot)

    def release(self) -> None:
        """Let go of the memory; nothing can run or be loaded afterwards."""
        self._pools.clear()
        del self.routing, self.output_routing

    def publish(self) -> None:
        """Let steps see what was loaded since the last call. On the runner's thread, between steps."""
        while self._loaded:
            slot = self._loaded.popleft()
            for pool in self._pools.values():
                pool.publish(slot)

    def _write(self, slot: int, packed: Mapping[str, PackedLora]) -> None:
        for members in self._groups:
            found = [packed.get(site) for site in members]
            factors = [None if part is None else (part.data[0], part.data[1], 1.0) for part in found]
            self._pools[members[0]].load(slot, factors, publish=False)
