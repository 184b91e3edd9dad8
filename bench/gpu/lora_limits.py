"""What the plans for adapters promise beyond the cells they were chosen from: ranks that are not padded, shapes that were held out.

    python -m bench.gpu.lora_limits [--quick] [--part max-rank held-out]

Knows sites, plans and the clock of `bench.gpu.lora`; does not know the peers. `max-rank`: a batch of rank 8 in pools made for ranks up
to 8 and up to 128. `held-out`: sites, rows and adapters that no plan was chosen by; what the plans name beside every design that races.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu import anchors
from bench.gpu.anchors import Problem
from bench.gpu.harness import end, guarded, require_gpu, save
from bench.gpu.lora import DEVICE, SITES, Clock, mapping_of, our_plans, pool_copy, pool_of, summary
from uma_kernels.lora import DeviceRouting, LoraPool, plans, triton_kernel

HELD_OUT: dict[str, tuple[int, tuple[int, ...]]] = {
    "14B.qkv": (5120, (5120, 1024, 1024)),
    "14B.o": (5120, (5120,)),
    "14B.gate_up": (5120, (13824, 13824)),
    "14B.down": (13824, (5120,)),
}
CELLS = [(2, 1), (12, 3), (48, 12), (100, 24), (200, 5)]  # rows, adapters
rows: list[dict[str, Any]] = []


def keep(row: dict[str, Any]) -> None:
    rows.append(row)
    save("lora", [row])
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def calls_of(
    pools: Sequence[LoraPool], problem: Problem, plan: plans.PairPlan, count: int
) -> list[Callable[[], object]]:
    """`lora_merged` over pools in turn, the first of them checked."""
    tokens = len(problem.mapping)
    routing = DeviceRouting(tokens, len(problem.ranks), [pools[0]])
    routing.build(problem.mapping)
    width_in, width_out = problem.k, sum(problem.slices)
    anchors.check(problem, lambda x, out: triton_kernel.lora_merged(x, out, pools[0], routing, plan))
    xs = [torch.randn(tokens, width_in, device=DEVICE).bfloat16() for _ in range(count)]
    outs = [torch.zeros(tokens, width_out, device=DEVICE).bfloat16() for _ in range(count)]
    return [
        partial(triton_kernel.lora_merged, xs[i], outs[i], pools[i % len(pools)], routing, plan) for i in range(count)
    ]


def max_rank(clock: Clock, quick: bool) -> None:
    for site in ("8B.qkv", "8B.down"):
        width_in, slices = SITES[site]
        for tokens, adapters in ((16, 8), (64, 64)):
            with guarded(f"max-rank {site} T{tokens} A{adapters}"):
                problem = Problem.random(
                    width_in, slices, mapping_of(tokens, adapters), [8] * adapters, DEVICE, torch.bfloat16
                )
                contestants = {}
                for most in (8, 128):
                    first = pool_of(problem, max_rank=most)
                    pools = [first, *(pool_copy(first) for _ in range(7))]
                    contestants[str(most)] = calls_of(pools, problem, plans.pair_plan(tokens, 2), 8)
                times = {name: summary(values) for name, values in clock.race(contestants, 20 if quick else 60).items()}
                keep({
                    "part": "max-rank", "site": site, "T": tokens, "adapters": adapters, "ranks": 8, "contestants": times,
                    "cost": round(times["128"]["us"] / times["8"]["us"] - 1, 4),
                })  # fmt: skip


def held_out(clock: Clock, quick: bool) -> None:
    for site, (width_in, slices) in HELD_OUT.items():
        for tokens, adapters in CELLS[1:4] if quick else CELLS:
            with guarded(f"held-out {site} T{tokens} A{adapters}"):
                problem = Problem.random(
                    width_in, slices, mapping_of(tokens, adapters), [16] * adapters, DEVICE, torch.bfloat16
                )
                first = pool_of(problem)
                pools = [first, *(pool_copy(first) for _ in range(5))]
                contestants = {
                    name: calls_of(pools, problem, plan, 6)
                    for name, plan in our_plans(tokens).items()
                    if not plan.one_launch
                }
                times = {name: summary(values) for name, values in clock.race(contestants, 10 if quick else 30).items()}
                best = min(times, key=lambda name: times[name]["us"])
                keep({
                    "part": "held-out", "site": site, "T": tokens, "adapters": adapters, "ranks": 16, "contestants": times,
                    "best": best, "loss": round(times["ours"]["us"] / times[best]["us"] - 1, 4),
                })  # fmt: skip


PARTS = {"max-rank": max_rank, "held-out": held_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    clock = Clock()
    for part in args.part:
        PARTS[part](clock, args.quick)
    for part, field in (("max-rank", "cost"), ("held-out", "loss")):
        found = [row[field] for row in rows if row["part"] == part]
        if found:
            print(f"{part}: {field} at most {100 * max(found):.1f} %, mean {100 * sum(found) / len(found):.1f} %")
    end()


if __name__ == "__main__":
    main()
