"""A pool that can be searched: filters, words and meaning find who may fit, the model ranks those in two depths.

    python examples/match.py [MODEL] [INDEX]

Builds an index of the example's candidates in INDEX (a temporary directory unless named; words alone, so that nothing is fetched: pass
an `Embedder` for meaning), asks for the best for the job, then ranks everybody with a cascade and shows who was read to the end.
"""

import sys
import tempfile
from pathlib import Path

from uma_engine import Engine
from uma_engine.retrieval import CandidateIndex
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
with CandidateIndex(folder) as index, Engine(model) as engine:
    index.add(PEOPLE)
    index.commit()
    answer = engine.match(JOB, index, top_n=5, first=20, where={"rate": {"<=": 90, "or_missing": True}})
    for result in answer.results:
        hit = answer.hits[result.id]
        print(f"{result.id}  {result.score:.3f}  place by words {hit.by_words}")
    print(f"{answer.cut.considered} considered, {answer.cut.filtered} filtered out, {len(answer.hits)} ranked")

    bounds = engine.fit_cascade([(JOB, PEOPLE)], prefix_tokens=32, confidence=0.9)
    ranked = engine.rank(JOB, PEOPLE, top_n=5, cascade=bounds)
    print([r.id for r in ranked.results], f"{len(ranked.cascade.whole)} of {len(PEOPLE)} were read to the end")
