"""Host cost of scheduling: microseconds of `schedule()` and `update()` for each scheduled piece of work.

Knows the scheduler and requests of token ids; runs no model. Usage: python -m bench.scheduler [--steps N] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from bench.rows import append_row
from uma_engine.config import EngineConfig
from uma_engine.core import Request, RequestKind, SamplingParams, Segment, StepResult
from uma_engine.kv_cache import BlockPool
from uma_engine.scheduler import Scheduler

LABEL_LOGITS = [0.0, 0.0]


def generate_request(name: str, prompt: list[int], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(name, RequestKind.GENERATE, [Segment(prompt)], sampling=sampling)


def rank_request(name: str, num_candidates: int, num_tokens: int, num_probes: int = 0) -> Request:
    """A job of 300 tokens and its candidates: scored themselves, or each kept for a number of scored probes."""
    segments = [Segment([7] * 300)]
    for candidate in range(num_candidates):
        kept = len(segments)
        segments.append(Segment([candidate % 1000] * num_tokens, 0, scored=num_probes == 0))
        segments += [Segment([probe] * 5, kept, scored=True) for probe in range(num_probes)]
    return Request(name, RequestKind.SCORE, segments, label_token_ids=(1, 2))


def decode_64() -> Iterator[Request]:
    return (generate_request(f"g{n}", [n] * 8, 4000) for n in range(64))


def score_5000() -> Iterator[Request]:
    yield rank_request("r", 5000, 20)


def score_probes() -> Iterator[Request]:
    yield rank_request("r", 2000, 150, num_probes=4)


def mixed() -> Iterator[Request]:
    yield from (generate_request(f"g{n}", [n] * 8, 4000) for n in range(32))
    yield from (rank_request(f"r{n}", 300, 20) for n in range(31))


CASES: dict[str, Callable[[], Iterator[Request]]] = {
    "decode: 64 requests": decode_64,
    "score: 1 request, 5000 leaves of 20 tokens": score_5000,
    "score: 1 request, 2000 kept candidates of 150 tokens, 4 probes each": score_probes,
    "mixed: 32 decoding, 31 requests of 300 leaves": mixed,
}


def cost_of_steps(requests: Iterator[Request], num_steps: int) -> list[float]:
    """Microseconds per chunk, for each of the first steps after one to warm up."""
    config = EngineConfig()
    scheduler = Scheduler(config, BlockPool(16384, config.block_size), max_model_len=8192)
    for request in requests:
        scheduler.add_request(request)
    costs = []
    for _ in range(num_steps + 1):
        start = time.perf_counter()
        output = scheduler.schedule()
        planned = time.perf_counter()
        if not output.chunks:
            break
        wanted = [chunk for chunk in output.chunks if chunk.wants_output]
        result = StepResult([1 if c.request.kind is RequestKind.GENERATE else LABEL_LOGITS for c in wanted])
        resumed = time.perf_counter()
        scheduler.update(output, result)
        costs.append((time.perf_counter() - resumed + planned - start) * 1e6 / len(output.chunks))
    return costs[1:]


def cost_of_submitting(num_leaves: int = 5000, repeats: int = 20) -> list[float]:
    """Microseconds per leaf of accepting a request."""
    costs = []
    for _ in range(repeats):
        scheduler = Scheduler(EngineConfig(), BlockPool(64, 16), max_model_len=8192)
        request = rank_request("r", num_leaves, 20)
        start = time.perf_counter()
        scheduler.add_request(request)
        costs.append((time.perf_counter() - start) * 1e6 / num_leaves)
    return costs


def row(op: str, case: str, costs: list[float]) -> dict[str, object]:
    fifths = statistics.quantiles(costs, n=5)
    return {
        "op": op,
        "case": case,
        "us_per_item_p20": round(fifths[0], 3),
        "us_per_item_p50": round(statistics.median(costs), 3),
        "us_per_item_p80": round(fifths[3], 3),
        "num_samples": len(costs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps measured for each case")
    parser.add_argument("--no-save", action="store_true", help="print, but add no rows")
    args = parser.parse_args()
    rows = [row("step", case, cost_of_steps(make(), args.steps)) for case, make in CASES.items()]
    rows.append(row("submit", "1 request, 5000 leaves of 20 tokens", cost_of_submitting()))
    print(f"{'op':7}{'case':70}{'p20':>7}{'p50':>7}{'p80':>7}  us per chunk or leaf")
    for entry in rows:
        times = "".join(f"{entry[f'us_per_item_p{p}']:7.2f}" for p in (20, 50, 80))
        print(f"{entry['op']:7}{entry['case']:70}{times}")
    if not args.no_save:
        for entry in rows:
            append_row("scheduler", entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
