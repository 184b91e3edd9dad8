"""What `uma serve` is told: by flags, else by the environment, else by a file, else by defaults.

Knows names and where values come from; does not know what they do. An option `--max-body-mb` is `UMA_SERVE_MAX_BODY_MB` in the environment
and `max_body_mb` in the file.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest

__all__ = ["PREFIX", "add_command", "option_names"]

PREFIX = "UMA_SERVE_"
LEVELS = ("debug", "info", "warning", "error")
ELSEWHERE = {"help", "check", "config", "run", "configure"}  # flags alone


def add_command(commands: Any, model_options: Callable[[argparse.ArgumentParser], None]) -> None:
    serve = commands.add_parser("serve", help="answer over HTTP")
    add = serve.add_argument
    add("--config", metavar="FILE", help="TOML with these options; flags and the environment go before it")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--keys", metavar="FILE", help="API keys, a line each: NAME, `rank` or `admin`, SECRET (or UMA_API_KEYS)")
    add("--tls-cert", metavar="FILE", help="certificate chain in PEM: answer over TLS")
    add("--tls-key", metavar="FILE", help="its private key in PEM")
    add("--adapter-root", metavar="DIR", help="adapters may be loaded from below this directory over HTTP")
    add("--register", metavar="GLOB", help="make adapters below it known at the start; the first request loads one")
    add("--max-loras", type=int, metavar="N", help="adapters in memory at once (default: 8)")
    add("--kv-cache-mb", type=int, metavar="N", help="memory for keys and values (default: 512 on a CPU)")
    add("--alias", action="append", default=[], metavar="NAME", help="another name of the base; repeatable")
    add("--max-body-mb", type=float, default=8, metavar="N", help="largest request (default: 8)")
    add("--max-waiting", type=int, default=256, metavar="N", help="requests of one key that may wait (default: 256)")
    add("--deadline", type=float, default=120, metavar="S", help="seconds of a request (default: 120)")
    add("--log", metavar="FILE", help="keep every ranking in this decision log")
    add("--log-level", choices=LEVELS, default="warning", help="of JSON lines on standard error (default: warning)")
    add("--otlp-endpoint", metavar="URL", help="send spans to this OpenTelemetry collector (extra otel)")
    add("--state", metavar="FILE", help="keep which base answers, so that a restart has the last swap's")
    add(
        "--front-ends",
        type=int,
        default=0,
        metavar="N",
        help="processes that hold connections, beside one that computes (default: 0, one for all)",
    )
    add(
        "--hang-timeout",
        type=float,
        default=60,
        metavar="S",
        help="restart an engine process that makes no step (default: 60)",
    )
    add("--replicas", metavar="N[:MOST]", help="as many engines behind this address, on Ray Serve (extra ray)")
    add("--ray-address", metavar="ADDRESS", help="of a Ray cluster to join (default: one on this machine)")
    add("--target", type=float, default=8, metavar="N", help="requests an engine that more engines are started for")
    add("--inside", type=int, default=16, metavar="N", help="requests that one of several engines takes at once")
    add("--replica-cpus", type=float, default=1, metavar="N", help="CPUs of each engine, as Ray counts (default: 1)")
    add("--replica-gpus", type=float, default=0, metavar="N", help="GPUs of each engine (default: 0)")
    add("--check", action="store_true", help="say what is wrong with the configuration, and do not start")
    model_options(serve)

    def run(args: argparse.Namespace) -> int:
        return import_module("uma_engine.cli.serve").run(args)

    serve.set_defaults(run=run, configure=partial(_configure, serve))


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Names that the file and the environment may give."""
    return [a.dest for a in parser._actions if a.dest not in ELSEWHERE]


def _configure(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make what the environment and the file say the defaults. Errors: InvalidRequest"""
    known = option_names(parser)
    found: dict[str, Any] = {}
    path = args.config or os.environ.get(f"{PREFIX}CONFIG")
    if path:
        found |= {name: _checked(name, value, path) for name, value in _read(path, known).items()}
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or variable == f"{PREFIX}CONFIG":
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise InvalidRequest(f"`{variable}` is no option", hint="`uma serve --help` lists them", param=variable)
        found[name] = value
    lists = {a.dest for a in parser._actions if isinstance(a.default, list)}
    for name in lists & found.keys():
        if isinstance(found[name], str):
            found[name] = [part.strip() for part in found[name].split(",") if part.strip()]
    for action in parser._actions:
        if action.dest in found and action.choices is not None and found[action.dest] not in action.choices:
            hint = f"one of {', '.join(map(str, action.choices))}"
            raise InvalidRequest(f"`{action.dest}` is `{found[action.dest]}`", hint=hint, param=action.dest)
    parser.set_defaults(**found)  # argparse converts strings as it would a flag's


def _read(path: str, known: list[str]) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"the configuration `{path}` cannot be read: {error}", param="config") from None
    for name in found:
        if name not in known:
            raise InvalidRequest(f"`{name}` in `{path}` is no option", hint=f"options are {', '.join(known)}")
    return found


def _checked(name: str, value: Any, path: str) -> str | list[str]:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRequest(f"`{name}` in `{path}` is `{value!r}`", hint="write a number, a text or a list of texts")
    return str(value)
