"""`uma doctor`: what was found on this machine, which back end each op takes and why, and which words can be labels."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uma_engine._version import __version__
from uma_engine.catalog import DEFAULT_MODEL, cache_dir, list_models, open_model, resolve
from uma_engine.cli.console import FetchProgress, console_output, is_thread_count, write_json_line, write_line
from uma_engine.errors import InvalidRequest
from uma_kernels import dispatch

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "triton", "onnxruntime", "huggingface-hub")
VARIABLES = ("UMA_BACKEND", "UMA_ISA", "UMA_NUM_THREADS", "UMA_CACHE")


def run(args: argparse.Namespace) -> int:
    if args.label is not None:
        return tell_label(args.label, args.model or DEFAULT_MODEL, as_json=args.json)
    if args.model:
        raise InvalidRequest("`--model` is given without `--label`", hint="ask for a word: `uma doctor --label WORD`")
    found = findings()
    if args.json:
        write_json_line(found)
    else:
        show(found)
    return 0


def tell_label(word: str, model: str, *, as_json: bool) -> int:
    """Say whether `word` is a single token of `model`, opening its tokenizer only; 1 when it is not."""
    with FetchProgress() as progress:
        path = resolve(model, progress=progress)
    ids = open_model(path).tokenizer.encode(word)
    fits = len(ids) == 1
    if as_json:
        write_json_line({"label": word, "model": model, "fits": fits, "token_ids": ids})
    elif fits:
        write_line(f"`{word}` is a single token of `{model}`, id {ids[0]}: it can be a label")
    else:
        write_line(f"`{word}` is {len(ids)} tokens of `{model}`, ids {ids}: it cannot be a label")
    return 0 if fits else 1


def show(found: dict[str, Any]) -> None:
    from rich.table import Table

    machine = Table(title="machine", title_justify="left", show_header=False)
    for key, value in found["machine"].items():
        machine.add_row(key, str(value))
    ops = Table("op", "back end", "why", title="ops", title_justify="left", header_style="bold")
    for row in found["ops"]:
        ops.add_row(row["op"], row["backend"], row["reason"])
    with console_output() as console:
        console.print(machine)
        console.print(ops)
        if dispatch.C is None:
            console.print(f"! compiled kernels: {dispatch.C_ERROR}", style="yellow")
            console.print(
                "  hint: install a C++17 compiler (Debian: apt-get install g++) and reinstall uma-engine",
                style="yellow",
            )


def findings() -> dict[str, Any]:
    """Everything `uma doctor` tells, as plain data."""
    machine = {
        "uma-engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": dispatch.num_threads(),
        "instruction set": dispatch.isa() or "compiled kernels not built",
        "instruction sets available": ", ".join(dispatch.C.available_isas()) if dispatch.C else "none",
        "gpu": _gpu(),
        "cache": str(cache_dir()),
        "models in the cache": ", ".join(e.name for e in list_models() if e.cached) or "none",
    }
    for name in PACKAGES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = "not installed"
    for name in VARIABLES:
        if name in os.environ:
            machine[name] = os.environ[name]
    threads = os.environ.get("UMA_NUM_THREADS")
    if threads and not is_thread_count(threads):
        machine["UMA_NUM_THREADS"] = f"{threads} (not a number of threads: commands that compute refuse it)"
    choices = [dispatch.explain(op) for op in dispatch.OPS]
    return {"machine": machine, "ops": [{"op": c.op, "backend": c.backend, "reason": c.reason} for c in choices]}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
