"""Opens a base beside one that serves, without being in its way.

Knows priorities of processes, the interpreter's lock and the collector; does not know swaps. What needs much computing for a base that this
machine has not had before (fetching, packing weights, working out a tokenizer) is done by another process of a low priority, and
kept in the cache; what is left is read from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from uma_engine.errors import UmaError
from uma_engine.tasks.api import AsyncEngine

__all__ = ["Opener"]

logger = logging.getLogger("uma_engine.serve")
SWITCH_S = 0.0002  # for which a thread that reads files may keep the interpreter from one that serves
SMALL_CACHE = 8 * 2**20


class Opener:
    """Makes engines with the same options. `opener(model)` is what `Generations` wants."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._prepared: set[str] = set()

    async def __call__(self, model: str) -> AsyncEngine:
        if model not in self._prepared:
            await self._prepare(model)
            self._prepared.add(model)
        with _out_of_the_way():
            return await AsyncEngine.create(model, **{"tokenizer_process": True} | self._options)

    async def _prepare(self, model: str) -> None:
        """Fill the cache. A failure is only logged: opening the base fails in the same way, and says so to who asked."""
        if self._options.get("device", "cpu") != "cpu":
            return
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "uma_engine.serve.preparing",
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            kept = {k: self._options[k] for k in ("precision", "num_threads") if k in self._options}
            _, said = await process.communicate(json.dumps({"model": model, "options": kept}).encode())
            if process.returncode:
                logger.warning("`%s` could not be prepared: %s", model, said.decode(errors="replace").strip()[-500:])
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


@contextlib.contextmanager
def _out_of_the_way() -> Iterator[None]:
    """While a base is read, by Python code for a good part: other threads get the interpreter when they ask for it, and the collector does
    not go through hundreds of thousands of new objects again and again."""
    before, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(min(SWITCH_S, before))
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        if collects:
            gc.enable()


def main() -> int:
    """Fill the cache for the base that a line of JSON on standard input names."""
    # Its own group: Ctrl-C is the server's affair (set here, as uvloop cannot). No session: Linux shares processors out by session first.
    os.setpgid(0, 0)
    os.nice(10)  # a tenth of a processor that others want: on a busy machine it still comes to an end
    told = json.loads(sys.stdin.readline())
    from uma_engine import Engine

    try:
        Engine(told["model"], kv_cache_bytes=SMALL_CACHE, max_loras=0, **told["options"]).close()
    except UmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
