"""Starts the engine process and the front ends, restarts what ends or hangs, and ends them in order.

Knows processes, pings and signals; does not know requests. A child learns what it is from a line of JSON on its standard input, and ends
when that closes: nothing outlives a supervisor that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uma_engine.serve.processes.link import Link, LinkLost

__all__ = ["Child", "Supervisor"]

logger = logging.getLogger("uma_engine.serve")
PING_S = 0.5
LONGEST_PAUSE_S = 5.0  # before a process is started again
HEALTHY_S = 30.0  # that a process has lived when its failures are forgotten


@dataclass
class Child:
    """One process that should be there."""

    role: str
    told: dict[str, Any]
    inherits: tuple[int, ...] = ()
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    failures: int = 0
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """`command` runs a child; `engine` and `front` are what children of those roles are told, as JSON."""

    def __init__(
        self,
        command: list[str],
        engine: dict[str, Any],
        front: dict[str, Any],
        *,
        listener: socket.socket,
        front_ends: int,
        socket_path: Path,
        hang_s: float,
        grace_s: float,
    ) -> None:
        self._command, self._hang_s, self._grace_s = command, hang_s, grace_s
        self._engine = Child("engine", engine)
        fd = listener.fileno()
        self._fronts = [Child("front", front | {"fd": fd}, (fd,)) for _ in range(front_ends)]
        self._link = Link(socket_path)
        self._stopping = asyncio.Event()
        self._answered: asyncio.subprocess.Process | None = None  # the engine process that has answered a ping

    @property
    def restarts(self) -> int:
        """Of the engine process."""
        return max(0, self._engine.starts - 1)

    async def run(self, ready: Callable[[], None]) -> int:
        """Until a signal. `ready` is called once the engine answers. The exit status: 0, or that of an engine that never came up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        self._link.start()
        tasks = []
        try:
            await self._start(self._engine)
            if (status := await self._came_up()) is not None:
                return status
            tasks = [asyncio.create_task(self._kept(child)) for child in (self._engine, *self._fronts)]
            tasks.append(asyncio.create_task(self._watched()))
            ready()
            await self._stopping.wait()
            return 0
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(self._end(child) for child in self._fronts))  # they finish what they have
            await self._end(self._engine)
            await self._link.stop()

    async def _came_up(self) -> int | None:
        """None as soon as the engine answers; else its exit status."""
        process = self._engine.process
        assert process is not None
        waiting = [asyncio.create_task(c) for c in (process.wait(), self._ping(float("inf")), self._stopping.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        ended, answered = waiting[0].done(), waiting[1].done()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        self._answered = process if answered else None
        return None if answered and not ended else (process.returncode or 0)

    async def _ping(self, timeout: float) -> Any:
        while True:
            with contextlib.suppress(LinkLost):
                return await self._link.ping(timeout)

    async def _start(self, child: Child) -> None:
        child.process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, pass_fds=child.inherits
        )
        child.starts += 1
        child.since = time.monotonic()
        assert child.process.stdin is not None
        child.process.stdin.write(json.dumps(child.told | {"role": child.role}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await child.process.stdin.drain()

    async def _kept(self, child: Child) -> None:
        """There is a process for `child`, for ever."""
        while True:
            if child.process is None:
                await self._start(child)
            assert child.process is not None
            status = await child.process.wait()
            child.failures = 0 if time.monotonic() - child.since > HEALTHY_S else child.failures + 1
            pause = 0.0 if child.failures <= 1 else min(LONGEST_PAUSE_S, 0.1 * 2 ** (child.failures - 2))
            logger.error("the %s process ended with status %s; another one starts", child.role, status)
            await asyncio.sleep(pause)
            child.process = None

    async def _watched(self) -> None:
        """An engine that does not answer any more, or has requests and makes no step, for `hang_s` is killed; `_kept` starts another one.
        One that has never answered is still loading, for as long as that takes."""
        last, moved, process = -1, time.monotonic(), None
        while True:
            await asyncio.sleep(PING_S)
            if process is not self._engine.process:
                last, moved, process = -1, time.monotonic(), self._engine.process
            with contextlib.suppress(TimeoutError, LinkLost):
                pong = await self._link.ping(max(PING_S, self._hang_s / 4))
                self._answered = process
                if pong.steps != last or not pong.requests:
                    last, moved = pong.steps, time.monotonic()
            late = self._answered is process and time.monotonic() - moved > self._hang_s
            if late and process is not None and process.returncode is None:
                logger.error("the engine process has not moved for %.0f s", self._hang_s)
                process.kill()
                moved = time.monotonic()

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._grace_s)
        except TimeoutError:
            logger.error("the %s process does not end and is killed", child.role)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
