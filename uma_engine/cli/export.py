"""`uma export`: a model as a graph for other runtimes."""

from __future__ import annotations

import argparse

from uma_engine.catalog import open_model, resolve
from uma_engine.cli.console import FetchProgress, write_line


def run(args: argparse.Namespace) -> int:
    from uma_engine.onnx import export_onnx

    with FetchProgress() as progress:
        path = resolve(args.model, progress=progress)
    target = export_onnx(open_model(path), args.onnx, adapter=args.adapter, max_model_len=args.max_model_len)
    size = sum(file.stat().st_size for file in target.iterdir())
    write_line(f"{target}: {size / 2**20:,.0f} MiB, fp32")
    return 0
