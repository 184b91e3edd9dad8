"""What rankings cost, by stage: the job alone, with several probes, and again from the prefix cache.

python examples/cost.py [MODEL]
"""

import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)[:8]
RUNS = {
    "one question": {},
    "a surface of three": {"surface": HERE / "surface.toml", "job_facts": {"budget": 60}},
    "the same again": {"surface": HERE / "surface.toml", "job_facts": {"budget": 60}},
}

with Engine(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as engine:
    for name, options in RUNS.items():
        usage = engine.rank(JOB, PEOPLE, **options).usage
        print(
            f"{name}: {usage.computed_tokens} tokens computed, {usage.cached_tokens} cached, {usage.core_seconds:.2f} core-s"
        )
        for stage in usage.stages:
            gflop, attention = stage.flops / 1e9, stage.attention_flops / 1e9
            print(f"  {stage.name:9} {stage.seconds:.3f} s, linear {gflop:.1f} GFLOP, attention {attention:.2f}")
