"""`uma serve --replicas N`: several engines behind one address, on Ray Serve (extra `ray`).

Knows arguments; does not know how requests find an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from uma_engine.cli.console import write_line
from uma_engine.cli.serve import web_server
from uma_engine.errors import InvalidRequest


async def serve(args: argparse.Namespace, settings: Any) -> int:
    """Errors: MissingPackage, EngineUnavailable where the engines do not come up"""
    if args.ray_address is not None:
        _use_token()
    from uma_engine.scale.cluster import Cluster, RayLink, ScaleSpec, Stack
    from uma_engine.scale.entry import Entry

    cluster = Cluster(_spec(args, settings, ScaleSpec), Stack(args.model))
    entry = Entry(settings, RayLink(cluster), cluster)
    write_line(f"starting {args.replicas} engines of {cluster.stack.model}")
    try:
        await cluster.start(args.ray_address)
        server = web_server(args, entry, entry.drain)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            scheme = "https" if args.tls_cert else "http"
            write_line(
                f"{cluster.stack.model} at {scheme}://{args.host}:{port}, {args.replicas} engines, {len(settings.keys)} keys"
            )
        await task
    finally:
        await cluster.stop()
    return 0


def _use_token() -> None:
    """Show the cluster its token where there is one. Ray does so by itself, but Ray 2.60 only after its first connection, which a cluster
    with tokens refuses; it reads the mode when it is imported."""
    kept = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or Path(kept).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _spec(args: argparse.Namespace, settings: Any, spec: Any) -> Any:
    low, _, high = args.replicas.partition(":")
    try:
        replicas = (int(low), int(high or low))
    except ValueError:
        raise InvalidRequest(
            f"`--replicas` is `{args.replicas}`", hint="write N, or LEAST:MOST", param="replicas"
        ) from None
    options: dict[str, Any] = {
        "precision": args.precision,
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
    }
    options |= {name: value for name, value in (("num_threads", args.threads), ("max_loras", args.max_loras)) if value}
    if args.kv_cache_mb is not None:
        options["kv_cache_bytes"] = args.kv_cache_mb * 2**20
    told = {
        "keys": [(k.name, k.scope, k.digest.hex()) for k in settings.keys],
        "adapter_root": None if settings.adapter_root is None else str(settings.adapter_root),
        "deadline_s": settings.deadline_s,
        "max_waiting": settings.max_waiting,
        "max_body_bytes": settings.max_body_bytes,
        "model_aliases": settings.model_aliases,
    }
    state = None if args.state is None else Path(args.state)
    return spec(
        replicas,
        args.target,
        args.inside,
        args.replica_cpus,
        args.replica_gpus,
        settings=told,
        options=options,
        state_file=state,
    )
