"""`uma generate`: a prompt in, text out as it comes."""

from __future__ import annotations

import argparse

from uma_engine.cli.console import open_engine, write
from uma_engine.core import SamplingParams
from uma_engine.tasks.candidates import read_job


def run(args: argparse.Namespace) -> int:
    prompt = read_job("-") if args.prompt == "-" else args.prompt
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    with open_engine(args) as (engine, adapter):
        for piece in engine.stream(prompt, params, adapter=adapter, chat=not args.raw):
            write(piece.text)
    write("\n")
    return 0
