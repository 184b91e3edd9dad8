"""Fits a calibration for one read of `surface.toml` and saves it to a file.

    python examples/calibrate.py OUT.json [MODEL]

The judgements are the example's own key: a candidate made from a relevant occupation fits. 48 of them show how it is done; a real one
takes hundreds, by people. A base that was never tuned for ranking has little to calibrate.
"""

import csv
import sys
from pathlib import Path

from uma_engine import Engine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
KEY = {
    row["id"]: row["group"] == "relevant"
    for row in csv.DictReader((HERE / "candidates_key.csv").open(encoding="utf-8"))
}
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)

with Engine(sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m") as engine:
    examples = [(JOB, person, KEY[person.id]) for person in PEOPLE]
    found = engine.calibrate(HERE / "surface.toml", "skill match", examples, method="isotonic", save_to=sys.argv[1])
print(
    f"{found.num_examples} examples: calibration error {found.ece_before:.3f} before, {found.ece_after:.3f} after (cross-fitted)"
)
