"""The engine's side of the socket: each request that comes as a frame runs in the application as if it had come over HTTP.

Knows frames and ASGI; does not know paths. One process computes, so one writes: logs, adapters and bases have one owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from uma_engine.serve.processes.frames import Ask, Head, Leave, Part, Ping, Pong, read_frame, write_frame

__all__ = ["Answering", "listening"]

logger = logging.getLogger("uma_engine.serve")


@contextlib.asynccontextmanager
async def listening(app: Any, path: Path, progress: Callable[[], int]) -> AsyncIterator[Callable[[], int]]:
    """Answer on the Unix socket `path` while the context lasts. `progress`: a number that grows while the engine computes. Gives how many
    requests there are."""
    running: set[asyncio.Task[None]] = set()
    connections: dict[asyncio.StreamWriter, asyncio.Event] = {}

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests: dict[int, Answering] = {}
        over = connections[writer] = asyncio.Event()
        try:
            while True:
                frame = await read_frame(reader)
                if isinstance(frame, Ask):
                    request = requests[frame.id] = Answering(app, frame, functools.partial(_written, writer))
                    task = asyncio.create_task(request.run())
                    running.add(task)
                    task.add_done_callback(running.discard)
                    task.add_done_callback(lambda _, number=frame.id: requests.pop(number, None))  # type: ignore[misc]
                elif isinstance(frame, Leave):
                    if frame.id in requests:
                        requests[frame.id].gone.set()
                elif isinstance(frame, Ping):
                    write_frame(writer, Pong(progress(), len(running)))
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            for request in list(requests.values()):  # whoever asked is not there any more
                request.gone.set()
            writer.close()
            over.set()
            connections.pop(writer, None)

    path.unlink(missing_ok=True)
    partial = path.with_name(path.name + ".new")
    server = await asyncio.start_unix_server(connected, partial)
    partial.chmod(0o600)
    partial.rename(path)  # whoever sees the socket can connect to it
    try:
        yield lambda: len(running)
    finally:
        server.close()
        for writer, over in list(connections.items()):
            writer.close()
            await over.wait()
        path.unlink(missing_ok=True)


async def _written(writer: asyncio.StreamWriter, frame: Head | Part) -> None:
    if writer.is_closing():
        raise ConnectionError("the front end has gone")
    write_frame(writer, frame)
    await writer.drain()


class Answering:
    """One run of the application; `write` takes the frames of its answer. `gone`: nobody waits for it any more."""

    def __init__(self, app: Any, ask: Ask, write: Callable[[Head | Part], Awaitable[None]]) -> None:
        self.gone = asyncio.Event()
        self._app, self._ask, self._write = app, ask, write
        self._body_given = False
        self._over = False

    async def run(self) -> None:
        ask = self._ask
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": ask.method,
            "scheme": "http",
            "path": ask.path,
            "raw_path": ask.path.encode(),
            "query_string": ask.query,
            "root_path": "",
            "headers": ask.headers,
            "client": None,
            "server": None,
        }
        try:
            await self._app(scope, self._receive, self._send)
        except ConnectionError:
            pass
        except Exception:
            logger.exception("a request failed outside of the application")
        if not self._over:  # it ended without an answer
            with contextlib.suppress(ConnectionError):
                await self._write(Head(ask.id, 500, []))
                await self._write(Part(ask.id, b"", True))

    async def _receive(self) -> dict[str, Any]:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": self._ask.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            await self._write(Head(self._ask.id, message["status"], [tuple(h) for h in message["headers"]]))
        elif message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            await self._write(Part(self._ask.id, bytes(message.get("body", b"")), self._over))
