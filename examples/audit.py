"""Would somebody else with the same profile, or the same job in other words, get another answer?

    python examples/audit.py [MODEL]

Ranks the example's candidates with `surface.toml`, swaps names, pronouns and schools with redaction on and off, and rewrites the job.
"""

import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)[:12]
PLAN = {"surface": HERE / "surface.toml", "job_facts": {"budget": 60}, "top_k": 5}

with Engine(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as engine:
    for redact in (True, False):
        report = engine.audit.counterfactual(JOB, PEOPLE, redact=redact, **PLAN)
        for axis in report.axes:
            print(
                f"redaction {'on ' if redact else 'off'} {axis.axis:9} {axis.pairs} pairs, {axis.flips_in} flips in, {axis.flips_out} out "
                f"(rate below {axis.upper_95:.3f} with 95 %), {axis.same_input} the same once redacted, "
                f"scores differ by at most {axis.largest_change:.4f}"
            )
    stability = engine.audit.paraphrase(JOB, PEOPLE, n=8, **PLAN)
    for rewrite in stability.rewrites:
        print(f"tau {rewrite.kendall_tau:.3f}, top-5 overlap {rewrite.top_k_overlap:.2f}: {', '.join(rewrite.rules)}")
    print(
        f"mean tau {stability.mean_tau:.3f}, lowest {stability.lowest_tau:.3f}, {stability.flip_rate:.1%} of top-5 places lost"
    )
