"""Ranks the example's candidates for its job and prints the best five.

python examples/rank.py [MODEL]
"""

import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent

with Engine(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as engine:
    answer = engine.rank(read_job(HERE / "job.md"), read_candidates(HERE / "candidates.jsonl"), top_n=5)
for result in answer.results:
    print(f"{result.score:.4f}  {result.id}")
for warning in answer.warnings:
    print(f"! {warning}")
