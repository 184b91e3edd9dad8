"""A front end's connection to the engine process: it comes back by itself, and every request on it knows when it was lost.

Knows frames, streams of them and reconnecting; does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from uma_engine.serve.processes.frames import Ask, Frame, Head, Leave, Part, Ping, Pong, read_frame, write_frame

__all__ = ["Link", "LinkLost", "Linked", "Reply", "SlowReader"]

MOST_QUEUED = 8 * 2**20  # bytes of one answer whose client does not read
RETRY_S = 0.05
ANSWER_S = 10.0


class LinkLost(Exception):
    """The engine process has gone; what was asked may or may not have been done."""


class SlowReader(Exception):
    """More of an answer is queued for a client than a front end keeps."""


class Reply:
    """The frames of one answer, in order."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._frames: deque[Head | Part] = deque()
        self._queued = 0
        self._more = asyncio.Event()
        self._failed: Exception | None = None
        self._leave = leave

    def feed(self, frame: Head | Part) -> None:
        if self._failed is not None:
            return
        if isinstance(frame, Part):
            self._queued += len(frame.body)
            if self._queued > MOST_QUEUED and len(self._frames) > 1:
                self._leave()
                return self.fail(SlowReader())
        self._frames.append(frame)
        self._more.set()

    def fail(self, error: Exception) -> None:
        self._failed = error
        self._more.set()

    async def next(self) -> Head | Part:
        """Errors: LinkLost, SlowReader"""
        while not self._frames:
            if self._failed is not None:
                raise self._failed
            self._more.clear()
            await self._more.wait()
        frame = self._frames.popleft()
        if isinstance(frame, Part):
            self._queued -= len(frame.body)
        return frame

    def close(self) -> None:
        """Nobody waits for the rest."""
        self._leave()


class Linked(Protocol):
    """What a front end needs of its way to an engine."""

    @property
    def connected(self) -> bool: ...

    def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def ask(self, request: Ask, timeout: float) -> Reply:
        """Send a request; waits `timeout` seconds for an engine. Errors: TimeoutError, LinkLost"""
        ...


class Link:
    """The connection to the socket `path`. All methods belong to one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._replies: dict[int, Reply] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._there = asyncio.Event()
        self._pong: asyncio.Future[Pong] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._there.is_set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_connected())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def ask(self, request: Ask, timeout: float) -> Reply:
        """Send a request; waits `timeout` seconds for an engine process. Errors: TimeoutError, LinkLost"""
        async with asyncio.timeout(timeout):
            await self._there.wait()
        number = next(self._numbers)
        writer = self._writer
        if writer is None:
            raise LinkLost

        def leave() -> None:
            if self._replies.pop(number, None) is not None and self._writer is writer:
                write_frame(writer, Leave(number))

        reply = self._replies[number] = Reply(leave)
        try:
            write_frame(writer, msgspec.structs.replace(request, id=number))
            await writer.drain()
        except ConnectionError:
            self._replies.pop(number, None)
            raise LinkLost from None
        except BaseException:
            leave()
            raise
        return reply

    async def ping(self, timeout: float) -> Pong:
        """Errors: TimeoutError, LinkLost"""
        async with asyncio.timeout(timeout):
            await self._there.wait()
            if self._writer is None:
                raise LinkLost
            self._pong = asyncio.get_running_loop().create_future()
            write_frame(self._writer, Ping())
            return await self._pong

    async def _keep_connected(self) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                # A process that is being killed may still be connected to: one that is there answers.
                write_frame(writer, Ping())
                async with asyncio.timeout(ANSWER_S):
                    await read_frame(reader)
            except (OSError, TimeoutError):
                if writer is not None:
                    writer.close()
                await asyncio.sleep(RETRY_S)
                continue
            self._writer = writer
            self._there.set()
            try:
                while True:
                    self._dispatch(await read_frame(reader))
            except ConnectionError:
                pass
            finally:
                self._there.clear()
                self._writer = None
                lost, self._replies = self._replies, {}
                for reply in lost.values():
                    reply.fail(LinkLost())
                if self._pong is not None and not self._pong.done():
                    self._pong.set_exception(LinkLost())
                    self._pong.exception()  # nobody may be waiting any more
                writer.close()
                with contextlib.suppress(Exception):
                    await writer.wait_closed()

    def _dispatch(self, frame: Frame) -> None:
        if isinstance(frame, Pong):
            if self._pong is not None and not self._pong.done():
                self._pong.set_result(frame)
        elif isinstance(frame, Head | Part):
            reply = self._replies.get(frame.id)
            if reply is not None:
                if isinstance(frame, Part) and frame.last:
                    del self._replies[frame.id]
                reply.feed(frame)
