"""`uma swap`: another base for a running server.

Knows arguments and how a status looks; does not know engines.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from uma_engine.cli.console import write_line
from uma_engine.errors import InvalidRequest


def run(args: argparse.Namespace) -> int:
    from uma_engine.client import Client

    with Client(args.address, key=args.key or os.environ.get("UMA_API_KEY"), timeout=600) as client:
        if args.action == "status":
            status = client.swap_status()
        elif args.action == "finish":
            status = client.finish_swap()
        elif args.action == "rollback":
            status = client.rollback()
        else:
            status = client.swap(args.model, _adapters(args.adapter), exclusive=args.exclusive, canary=args.canary)
    _show(status)
    return 1 if status["swap"]["phase"] == "failed" else 0


def _adapters(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InvalidRequest(f"`--adapter` is `{item}`", hint="write NAME=PATH", param="adapter")
        found[name] = path
    return found


def _show(status: Mapping[str, Any]) -> None:
    for name in ("current", "previous", "canary"):
        one = status[name]
        if one is not None:
            held = f", {one['requests']} requests" if one["requests"] else ""
            adapters = f", adapters {', '.join(one['adapters'])}" if one["adapters"] else ""
            write_line(
                f"{name}: {one['model']} {one['base_digest'][:12]}, generation {one['generation']}{adapters}{held}"
            )
    swap = status["swap"]
    parts = [f"{key} {swap[key]}" for key in ("phase", "model", "seconds", "error") if key in swap]
    shadow = swap.get("shadow")
    if shadow and shadow["questions"]:
        parts.append(f"order of {shadow['questions']} recent questions: Kendall's tau {shadow['kendall_tau']}")
    write_line("swap: " + ", ".join(parts))
