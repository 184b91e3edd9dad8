"""Many rankings at once in an event loop; they share steps, and a task that is cancelled costs nothing more.

python examples/service.py [MODEL]
"""

import asyncio
import sys
from pathlib import Path

from uma_engine import AsyncEngine
from uma_engine.tasks.candidates import read_candidates, read_job

HERE = Path(__file__).resolve().parent
JOB = read_job(HERE / "job.md")
PEOPLE = read_candidates(HERE / "candidates.jsonl", facts_in_text=False)[:8]


async def main(model: str) -> None:
    async with await AsyncEngine.create(model) as engine:
        answers = await asyncio.gather(*(engine.rank(JOB, PEOPLE[first : first + 4]) for first in (0, 4)))
        print([answer.results[0].id for answer in answers])
        task = asyncio.create_task(engine.rank(JOB, PEOPLE))
        task.cancel()
        print("cancelled:", await asyncio.gather(task, return_exceptions=True))
        report = await engine.audit.paraphrase(JOB, PEOPLE, 2, top_k=3)
        print(f"two rewordings of the job: mean tau {report.mean_tau:.3f}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
