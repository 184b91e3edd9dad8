"""`uma serve`: the engine over HTTP, in this process or as one engine process behind front ends.

Knows arguments and sockets; does not know paths or requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import json
import math
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from uma_engine.cli.console import FetchProgress, write_line
from uma_engine.errors import CorruptFile, InvalidRequest, MissingPackage

GRACE_S = 30  # that requests have to end after a signal
HEAD_BYTES = 16 * 2**10  # of a request's line and headers


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: F401

        from uma_engine.serve.settings import read_keys
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[server]'`"
        ) from None
    keys = read_keys(args.keys)
    if not keys and not _is_loopback(args.host):
        raise InvalidRequest(
            f"`{args.host}` can be reached from outside and there are no keys",
            hint="give `--keys FILE`, or listen on 127.0.0.1",
            param="host",
        )
    for name, value in (
        ("max-body-mb", args.max_body_mb),
        ("deadline", args.deadline),
        ("max-waiting", args.max_waiting),
        ("hang-timeout", args.hang_timeout),
    ):
        if not (math.isfinite(value) and value > 0):
            raise InvalidRequest(f"`--{name}` is {value} but must be above 0", param=name)
    if not 0 <= args.port < 65536:
        raise InvalidRequest(f"`--port` is {args.port} but must be from 0 to 65535", param="port")
    if args.adapter_root is not None and not Path(args.adapter_root).is_dir():
        raise InvalidRequest(f"`{args.adapter_root}` is not a directory", param="adapter-root")
    if not 0 <= args.front_ends <= 64:
        raise InvalidRequest(f"`--front-ends` is {args.front_ends} but must be from 0 to 64", param="front-ends")
    if args.register and args.adapter_root is None:
        raise InvalidRequest("`--register` is given without `--adapter-root`", param="register")
    if args.replicas and (args.front_ends or args.log or args.register or args.adapter):
        raise InvalidRequest(
            "`--replicas` is given with `--front-ends`, `--log`, `--register` or `--adapter`",
            hint="the entry is the front end; load adapters with POST /admin/adapters, which reaches every engine",
            param="replicas",
        )
    settings = settings_of(args, keys)
    model = _started(args.model, settings.state_file).model
    _tls(args.tls_cert, args.tls_key)
    if args.check:
        write_line(f"fine: {len(keys)} keys, {args.host}:{args.port}, model {model}")
        return 0
    from uma_engine.serve import logs

    logs.configure(args.log_level)
    if args.replicas:
        from uma_engine.cli import scale

        return asyncio.run(scale.serve(args, settings))
    return asyncio.run(_supervise(args, len(keys)) if args.front_ends else _serve(args, settings))


def _tls(certificate: str | None, key: str | None) -> dict[str, str]:
    """What uvicorn needs to answer over TLS; empty without. The pair is tried at once. Errors: InvalidRequest"""
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise InvalidRequest("`--tls-cert` and `--tls-key` belong together", param="tls-cert")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"`{certificate}` and `{key}` are no pair: {error}", param="tls-cert") from None
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


def _started(model: str, state: Path | None) -> Any:
    """The base and adapters to start with, a `SwapPlan`: those of the last swap where there was one."""
    from uma_engine.serve.generations import SwapPlan

    if state is None or not state.exists():
        return SwapPlan(model)
    try:
        kept = json.loads(state.read_text())
        adapters = {str(n): Path(str(p)).absolute() for n, p in kept["adapters"].items()}
        aliases = {str(a): str(n) for a, n in kept.get("aliases", {}).items()}
        return SwapPlan(str(kept["model"]), adapters, aliases, frozenset(map(str, kept.get("pinned", ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"the state `{state}` cannot be read: {error}", hint="delete it to start anew") from None


def settings_of(args: argparse.Namespace, keys: tuple[Any, ...]) -> Any:
    from uma_engine.serve import ServeSettings

    return ServeSettings(
        keys=keys,
        max_body_bytes=int(args.max_body_mb * 2**20),
        deadline_s=args.deadline,
        max_waiting=args.max_waiting,
        adapter_root=None if args.adapter_root is None else Path(args.adapter_root),
        model_aliases=tuple(args.alias),
        state_file=None if args.state is None else Path(args.state),
        exclusive_swaps=bool(args.log),  # one process writes a log
        behind_front_end=args.front_ends > 0,
    )


@contextlib.asynccontextmanager
async def application(args: argparse.Namespace, settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    """The engine and the application over it."""
    from uma_engine.serve import logs, make_app
    from uma_engine.serve.preparing import Opener
    from uma_engine.tasks.api import AsyncEngine

    options: dict[str, Any] = {
        "precision": args.precision,
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
    }
    if args.threads is not None:
        options["num_threads"] = args.threads
    if args.log:
        options["decision_log"] = args.log
    if args.kv_cache_mb is not None:
        options["kv_cache_bytes"] = args.kv_cache_mb * 2**20
    if args.max_loras is not None:
        options["max_loras"] = args.max_loras
    plan = _started(args.model, settings.state_file)
    model = plan.model
    if args.adapter:
        path = Path(args.adapter).resolve()
        plan = replace(plan, adapters={path.name: path} | plan.adapters)
    with FetchProgress() as progress:
        engine = await asyncio.to_thread(lambda: AsyncEngine(model, progress=progress, max_lora_rank=256, **options))

    async with engine:
        if args.register:
            for path in sorted(settings.adapter_root.glob(args.register)):
                if (path / "adapter_config.json").is_file() and not path.is_symlink():
                    engine.register_adapter(path.name, path)
        plan.register(engine)
        if args.otlp_endpoint:
            logs.trace_to(args.otlp_endpoint)
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again would stop requests for 100 ms
        yield engine, make_app(engine, settings, Opener(max_lora_rank=256, **options), plan)


def web_server(args: argparse.Namespace, app: Any, drain: Callable[[], object]) -> Any:
    import uvicorn

    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=HEAD_BYTES,
        http="h11",
        **_tls(args.tls_cert, args.tls_key),  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    # uvicorn would end the process by the signal that it got: here a signal means finish what has begun, and exit with 0.
    server.capture_signals = lambda: _signals(server, drain)  # type: ignore[method-assign]
    return server


async def _serve(args: argparse.Namespace, settings: Any) -> int:
    async with application(args, settings) as (engine, app):
        server = web_server(args, app, app.state.drain)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started:
            _told(args, engine.model, server.servers[0].sockets[0].getsockname()[1], len(settings.keys))
        await task
    return 0


def _told(args: argparse.Namespace, model: str, port: int, keys: int) -> None:
    write_line(f"{model} at {'https' if args.tls_cert else 'http'}://{args.host}:{port}, {keys} keys")


async def _supervise(args: argparse.Namespace, num_keys: int) -> int:
    """One engine process and `front_ends` processes that hold the connections."""
    from uma_engine.serve.processes.supervisor import Supervisor

    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidRequest(
            f"`{args.host}:{args.port}` cannot be listened on: {error.strerror}", param="port"
        ) from None
    told = {n: v for n, v in vars(args).items() if isinstance(v, str | int | float | list | None)}
    with listener, tempfile.TemporaryDirectory(prefix="uma-") as home:  # readable by its owner alone
        path = Path(home) / "engine"
        if args.state is None:
            told["state"] = str(Path(home) / "state")  # a restart has the base and the adapters that there were
        children = {"args": told, "socket": str(path)}
        supervisor = Supervisor(
            [sys.executable, "-m", "uma_engine.cli.serve_process"],
            children,
            children,
            listener=listener,
            front_ends=args.front_ends,
            socket_path=path,
            hang_s=args.hang_timeout,
            grace_s=GRACE_S,
        )
        return await supervisor.run(lambda: _told(args, args.model, listener.getsockname()[1], num_keys))


@contextlib.contextmanager
def _signals(server: Any, drain: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        drain()
        server.handle_exit(number, None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
