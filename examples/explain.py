"""Who comes first, and why, in sentences that cannot say more than the ledger and the texts do.

    python examples/explain.py [MODEL]

Ranks the example's candidates with `surface.toml`, shows the order at once and each sentence about the best three when it is written and
found grounded. Then the same with notes before a second reading, to see what they change.
"""

import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)[:12]
SURFACE = {"surface": HERE / "surface.toml", "job_facts": {"budget": 60}}

with Engine(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as engine:
    for event in engine.rank_stream(JOB, PEOPLE, **SURFACE, explain="words", explain_top=3):
        if event.kind == "scores":
            print("order:", ", ".join(f"{r.id} {r.score:.3f}" for r in event.answer.results[:3]))
        elif event.kind == "sentence":
            cites = ", ".join(source.name for source in event.sentence.cites)
            print(f"{event.id} {event.section:9} {event.sentence.text} [{cites}; {event.sentence.origin}]")
        elif event.kind == "answer":
            dropped = sum(len(a.dropped) for a in event.answer.assessments)
            print(f"{dropped} sentences were not grounded and are not shown; the record has them")
            for stage in event.answer.usage.stages:
                print(f"{stage.name}: {stage.computed_tokens} tokens, {stage.seconds:.2f} s")

    answer = engine.rank(JOB, PEOPLE, **SURFACE, deliberate=32, explain_top=3)
    for note in answer.deliberation.notes:
        print(f"{note.id}: {note.place_before} -> {note.place}, {note.score_before:.3f} -> {note.score:.3f}")
    print(f"tau {answer.deliberation.kendall_tau:.2f}, {answer.deliberation.moved} moved")
