"""A decision log: rank, verify, export one person, forget them, and verify again.

python examples/decisions.py LOG [MODEL]
"""

import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)[:8]

with Engine(sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m", decision_log=sys.argv[1]) as engine:
    answer = engine.rank(JOB, PEOPLE, surface=HERE / "surface.toml", job_facts={"budget": 60})
    print(f"record {answer.logged.id}, head {answer.logged.head}")
    log = engine.decision_log
    person = PEOPLE[2]
    for record in log.export(person.id)["records"]:
        print(f"{person.id}: place {record['place']} of {record['candidates']} in record {record['record']}")
    gone = engine.forget(person.id)
    left = (
        "nothing of theirs is left" if gone.clean else f"others have the same words: {', '.join(gone.found_elsewhere)}"
    )
    print(f"forgotten in records {list(gone.records)}; {gone.scanned_bytes:,} bytes scanned, {left}")
    found = log.verify(answer.logged.head)
    print(f"{found.entries} entries, whole: {found.ok}")
sys.exit(not found.ok)
