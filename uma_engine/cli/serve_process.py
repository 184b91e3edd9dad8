"""A process of `uma serve --front-ends N`: the engine process or a front end, as a line of JSON on standard input says.

Knows roles and signals; does not know how processes are kept alive. Ends when standard input closes, which is when its supervisor has gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from uma_engine.cli.serve import GRACE_S, application, settings_of, web_server
from uma_engine.errors import UmaError
from uma_engine.serve import logs
from uma_engine.serve.settings import read_keys


def main() -> int:
    told = json.loads(_line())
    args = argparse.Namespace(**told["args"])
    logs.configure(args.log_level)
    settings = settings_of(args, read_keys(args.keys))
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    path = Path(told["socket"])
    try:
        return asyncio.run(
            _engine(args, settings, path) if told["role"] == "engine" else _front(args, settings, path, told["fd"])
        )
    except UmaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _line() -> bytes:
    """The first line of standard input, and not a byte more."""
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(0, 1)):
        found += byte
    return found


def _end_with_supervisor() -> None:
    os.read(0, 1)  # nothing comes: it returns when the other end has gone
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


async def _engine(args: argparse.Namespace, settings: Any, path: Path) -> int:
    from uma_engine.serve.processes.backend import listening

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with application(args, settings) as (_, app), app.router.lifespan_context(app):

        def progress() -> int:
            return app.state.generations.current.engine.counters()["num_steps"]

        async with listening(app, path, progress) as requests:
            await stop.wait()
            app.state.drain()
            while requests():  # the supervisor ends the front ends first, so there is at most what they left
                await asyncio.sleep(0.02)
    return 0


async def _front(args: argparse.Namespace, settings: Any, path: Path, fd: int) -> int:
    from uma_engine.serve.processes.front import FrontEnd
    from uma_engine.serve.processes.link import Link

    front = FrontEnd(settings, Link(path))
    server = web_server(args, front, front.drain)
    with contextlib.closing(socket.socket(fileno=fd)) as listener:
        await server.serve(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
