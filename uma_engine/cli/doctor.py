"""`uma doctor`: what was found on this machine, and which back end each op takes and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uma_engine._version import __version__
from uma_engine.catalog import cache_dir, list_models
from uma_engine.cli.console import write_line
from uma_kernels import dispatch

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "triton", "onnxruntime", "huggingface-hub")
VARIABLES = ("UMA_BACKEND", "UMA_ISA", "UMA_NUM_THREADS", "UMA_CACHE")


def run(args: argparse.Namespace) -> int:
    found = findings()
    if args.json:
        write_line(json.dumps(found, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    machine = Table(title="machine", title_justify="left", show_header=False)
    for key, value in found["machine"].items():
        machine.add_row(key, str(value))
    console.print(machine)
    ops = Table("op", "back end", "why", title="ops", title_justify="left", header_style="bold")
    for row in found["ops"]:
        ops.add_row(row["op"], row["backend"], row["reason"])
    console.print(ops)
    if dispatch.C is None:
        console.print(f"! compiled kernels: {dispatch.C_ERROR}", style="yellow")
        console.print(
            "  hint: install a C++17 compiler (Debian: apt-get install g++) and reinstall uma-engine", style="yellow"
        )
    return 0


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
