"""Many adapters in one batch on a GPU: ours in several designs beside vLLM's, SGLang's and torch's, on the same work.

    python -m bench.gpu.lora [--quick] [--site 8B.qkv ...] [--part pair site prefill routing] [--compile-only]

Knows shapes of real sites and how to time a pair or a site; does not know the engine. Everything is checked before it is
timed: what is wrong gets no number. `pair`: shrink and expand alone, at decode. `site`: with the base product, the tax over
the base product alone. `prefill`: the same for large batches. Weights rotate, and each graph ends with a read of more than
the L2 holds, whose own time is taken off: every call finds a cold cache. The sites are compiled by processes of their own first.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu import anchors
from bench.gpu.anchors import Problem
from bench.gpu.harness import end, guarded, require_gpu, save
from uma_kernels.check import TILE_ROWS
from uma_kernels.linear import linear, pack
from uma_kernels.lora import DeviceRouting, LoraPool, plans, triton_augmented, triton_kernel, triton_site
from uma_kernels.lora.plans import PairPlan, SitePlan

SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "8B.qkv": (4096, (4096, 1024, 1024)),
    "8B.o": (4096, (4096,)),
    "8B.gate_up": (4096, (14336, 14336)),
    "8B.down": (14336, (4096,)),
    "0.6B.qkv": (1024, (2048, 1024, 1024)),
    "0.6B.o": (2048, (1024,)),
    "0.6B.gate_up": (1024, (3072, 3072)),
    "0.6B.down": (3072, (1024,)),
}
DECODE = [(t, a) for t in (1, 4, 16, 64, 256) for a in (1, 8, 32, 64) if a <= t]
QUICK_PAIR = [(1, 1), (16, 8), (64, 1), (64, 64), (256, 32)]
QUICK_SITE = [(1, 1), (16, 8), (64, 64)]
DEVICE = "cuda"
FLUSH_BYTES = 256 * 2**20
BANDWIDTH = 4.0e12  # bytes a second for the floor in the table; rows hold bytes
Call = Callable[[], object]
rows: list[dict[str, Any]] = []


def mapping_of(tokens: int, adapters: int) -> list[int]:
    return [t % adapters for t in range(tokens)]


def ranks_of(adapters: int, mixed: bool) -> list[int]:
    return [(8, 16, 32, 64)[a % 4] if mixed else 16 for a in range(adapters)]


# ---- timing ----


class Clock:
    """Times contestants in turns. `flush` empties the L2 at the end of each graph; its own time is taken off."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
        self.total = torch.zeros((), device=DEVICE)

    def flush(self) -> None:
        torch.sum(self.buffer, dim=0, out=self.total)

    def graph(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in (
                *calls,
                self.flush,
            ):  # all: each copy may have memory to take, or pointers to put on the device
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
            self.flush()
        return graph

    def race(self, contestants: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, list[float]]:
        """Microseconds a call, one number a round."""
        graphs = {"": (self.graph([]), 1)}
        failed = {}
        for name, calls in contestants.items():
            try:
                graphs[name] = self.graph(calls), len(calls)
            except Exception as error:
                torch.cuda.synchronize()
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        for name, message in failed.items():
            print(f"  {name} not timed: {message}")
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for round_ in range(rounds + 2):
            for name, (graph, _) in graphs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if round_ >= 2:
                    times[name].append(start.elapsed_time(end) * 1e3)
        empty = statistics.median(times.pop(""))
        return {name: [(t - empty) / graphs[name][1] for t in values] for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)  # noqa: E731
    return {"p10_us": at(0.1), "us": round(statistics.median(ordered), 3), "p90_us": at(0.9)}


# ---- ours ----


def pool_of(problem: Problem, storage: str = "dense", max_rank: int = 64) -> LoraPool:
    blocks = sum(-(-rank // 16) for rank in problem.ranks)
    pool = LoraPool(
        problem.k, problem.slices, len(problem.ranks), blocks, max_rank=max_rank, dtype=problem.a[0][0].dtype, storage=storage,
        device=problem.mapping.device,
    )  # fmt: skip
    for slot in range(len(problem.ranks)):
        pool.load(slot, [(a, b, 1.0) for a, b in zip(problem.a[slot], problem.b[slot], strict=True)])
    return pool


def pool_copy(pool: LoraPool) -> LoraPool:
    other = copy.copy(pool)
    other.a, other.b = pool.a.clone(), pool.b.clone()
    return other


def our_plans(tokens: int) -> dict[str, PairPlan]:
    """The designs that race; the first is what `lora_merged` takes."""
    shipped = plans.pair_plan(tokens, 2)
    found = {"ours": shipped}
    if tokens <= 256:
        found["ours one launch"] = PairPlan(True)
        for programs in (2, 4, 8, 16) if tokens >= 16 else (2, 4):
            found[f"ours two launches {programs} a SM"] = PairPlan(False, programs=programs)
            found[f"ours two launches {programs} a SM PDL"] = PairPlan(False, programs=programs, pdl=True)
    return found


def factor_bytes(problem: Problem) -> int:
    used = {slot for slot, _ in problem.rows_of}
    return sum(2 * problem.ranks[s] * (len(problem.slices) * problem.k + sum(problem.slices)) for s in used)


# ---- cells ----


def pair_cell(clock: Clock, args: argparse.Namespace, site: str, tokens: int, adapters: int, mixed: bool) -> None:
    k, slices = SITES[site]
    problem = Problem.random(k, slices, mapping_of(tokens, adapters), ranks_of(adapters, mixed), DEVICE, torch.bfloat16)
    size = factor_bytes(problem)
    count = 4 if args.compile_only else max(4, min(16, 2**29 // size))
    x, out = (
        torch.randn(tokens, k, device=DEVICE).bfloat16(),
        torch.zeros(tokens, sum(slices), device=DEVICE).bfloat16(),
    )
    xs, outs = [x.clone() for _ in range(count)], [out.clone() for _ in range(count)]
    contestants: dict[str, list[Call]] = {}
    cell = {"part": "pair", "site": site, "T": tokens, "adapters": adapters, "ranks": "mixed" if mixed else 16}

    def enter(name: str, pairs: Sequence[anchors.Pair]) -> None:
        try:
            anchors.check(problem, pairs[0])
        except Exception as error:
            torch.cuda.synchronize()
            print(f"  {site} T{tokens} A{adapters} {name}: {type(error).__name__}: {str(error)[:200]}")
            return
        several = len(pairs)
        contestants[name] = [partial(pairs[i % several], xs[i], outs[i]) for i in range(count)]

    storages = ["dense"] if args.quick and (tokens, adapters) != (64, 64) else ["dense", "fp8", "int4"]
    for storage in storages:
        first = pool_of(problem, storage)
        pools = [first, *(pool_copy(first) for _ in range(count - 1))]
        routing = DeviceRouting(tokens, len(problem.ranks), [first])
        routing.build(problem.mapping)
        if storage != "dense":
            contestants["ours " + storage] = [
                lambda i=i, pools=pools, routing=routing: triton_kernel.lora_merged(  # type: ignore[misc]
                    xs[i], outs[i], pools[i], routing, plans.pair_plan(tokens, 2)
                )
                for i in range(count)
            ]
            continue
        for name, plan in our_plans(tokens).items():
            enter(name, [
                lambda x, out, pool=pool, plan=plan, routing=routing: triton_kernel.lora_merged(x, out, pool, routing, plan)  # type: ignore[misc]
                for pool in pools
            ])  # fmt: skip
    copies = [problem, *(problem.copy() for _ in range(count - 1))]
    tuned: list[Any] = []
    if anchors.available():
        for name, make in anchors.ANCHORS.items():
            try:
                held = [make(p) for p in copies]
            except Exception as error:
                print(f"  {name} not made: {type(error).__name__}: {str(error)[:200]}")
                continue
            tuned.append(held[0])
            enter(name, [h.pair() for h in held])
            best = best_tuning(clock, args, name, held, problem, xs, outs)
            if best is not None:
                enter(name + " tuned", [h.pair(best) for h in held])
    if not args.compile_only:
        enter("torch bmm", [anchors.torch_bmm(p) for p in copies[:4]])
        enter("torch loop", [anchors.torch_loop(p) for p in copies])
        if adapters == 1:
            enter("torch addmm", [anchors.torch_addmm(p) for p in copies])
        if hasattr(torch, "_grouped_mm") and not mixed:
            enter("torch grouped_mm", [anchors.torch_grouped(p) for p in copies[:4]])
    record(clock, args, contestants, cell, size + 2 * tokens * (k + 2 * sum(slices)))
    for anchor in tuned:
        anchor.close()


def best_tuning(
    clock: Clock, args: argparse.Namespace, name: str, held: list, problem: Problem, xs: list, outs: list
) -> Any:
    """The best of an anchor's own coarse grid for this cell. vLLM's two kernels are tuned one after the other."""
    few = min(8, len(held))

    def fastest(tunings: list) -> Any:
        runs: dict[str, list[Call]] = {}
        for i, tuning in enumerate(tunings):
            try:
                anchors.check(problem, held[0].pair(tuning))
            except Exception:
                torch.cuda.synchronize()
                continue
            pairs = [h.pair(tuning) for h in held[:few]]
            runs[str(i)] = [lambda p=p, j=j: p(xs[j], outs[j]) for j, p in enumerate(pairs)]  # type: ignore[misc]
        if not runs or args.compile_only:
            return None
        times = clock.race(runs, 5)
        return tunings[int(min(times, key=lambda i: statistics.median(times[i])))] if times else None

    listed = list(held[0].tunings())
    if name != "vllm":
        return fastest(listed)
    shrinks = len(anchors.VLLM_SHRINK)
    shrink = fastest(listed[:shrinks])
    if shrink is None:
        fastest(listed[shrinks:])
        return None
    return fastest([(shrink[0], expand) for expand in anchors.VLLM_EXPAND])


def site_cell(clock: Clock, args: argparse.Namespace, part: str, site: str, tokens: int, adapters: int) -> None:
    """Base product and update; `tax` is over the best base product."""
    k, slices = SITES[site]
    n = sum(slices)
    mapping = mapping_of(tokens, adapters)
    if part == "prefill":
        mapping = sorted(mapping)  # requests are rows in a row
    problem = Problem.random(k, slices, mapping, ranks_of(adapters, False), DEVICE, torch.bfloat16)
    size = factor_bytes(problem) + 2 * n * k
    count = 2 if args.compile_only else max(2, min(12, 2**30 // size))
    first = pool_of(problem)
    pools = [first, *(pool_copy(first) for _ in range(count - 1))]
    augmented = None
    x_aug = torch.randn(tokens, k + 16 * first.a.shape[0], device=DEVICE).bfloat16()
    xs = [padded(x_aug[:, :k]) for _ in range(count)]
    weights = [(torch.randn(n, k, device=DEVICE) * k**-0.5).bfloat16() for _ in range(count)]
    outs = [torch.zeros(tokens, n, device=DEVICE).bfloat16() for _ in range(count)]
    routing = DeviceRouting(tokens, adapters, [first])
    routing.build(problem.mapping)
    plan = plans.pair_plan(tokens, 2)
    side = torch.cuda.Stream()
    base = xs[0].float() @ weights[0].float().T
    true = base + problem.true_update(xs[0])
    contestants: dict[str, list[Call]] = {}

    def enter(name: str, make: Callable[[int], Call], copies: int = count, lora: bool = True) -> None:
        try:
            calls = [make(i) for i in range(copies)]
            outs[0].fill_(float("nan"))
            calls[0]()
            wanted = true if lora else base
            error = ((outs[0].float() - wanted).abs().max() / wanted.abs().max()).item()
            if not error < 0.03:
                raise AssertionError(f"error {error:.3g}")
            contestants[name] = calls
        except Exception as problem_:
            torch.cuda.synchronize()
            print(f"  {site} T{tokens} A{adapters} {name}: {type(problem_).__name__}: {str(problem_)[:200]}")

    def two_parts(i: int) -> None:
        torch.mm(xs[i], weights[i].T, out=outs[i])
        triton_kernel.lora_merged(xs[i], outs[i], pools[i], routing, plan)

    def overlapped(i: int) -> None:
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            triton_kernel.run_pair(xs[i], outs[i], pools[i], routing, plan, shrink=True, expand=False)
        torch.mm(xs[i], weights[i].T, out=outs[i])
        here.wait_stream(side)
        triton_kernel.run_pair(xs[i], outs[i], pools[i], routing, plan, shrink=False, expand=True)

    def update_first(i: int) -> None:
        outs[i].zero_()  # rows of the base and empty slots
        triton_kernel.run_pair(xs[i], outs[i], pools[i], routing, plan, shrink=True, expand=False)
        triton_kernel.run_pair(xs[i], outs[i], pools[i], routing, plan, shrink=False, expand=True, add=False)
        torch.addmm(outs[i], xs[i], weights[i].T, out=outs[i])

    enter("base cuBLAS", lambda i: lambda: torch.mm(xs[i], weights[i].T, out=outs[i]), lora=False)
    enter("product then pair", lambda i: lambda: two_parts(i))
    enter("shrink beside product", lambda i: lambda: overlapped(i))
    if part == "prefill" or not args.quick:
        enter("update then beta=1", lambda i: lambda: update_first(i))
    packed = [pack(weight) for weight in weights]

    def tile_by_tile(i: int) -> None:
        triton_kernel.run_pair(xs[i], outs[i], pools[i], routing, plan, shrink=True, expand=False)
        triton_augmented.augmented(xs[i], packed[i], None, outs[i], pools[i], routing)

    enter("base product, audit", lambda i: lambda: linear(xs[i], packed[i], out=outs[i]), lora=False)
    enter("augmented tiles", lambda i: lambda: tile_by_tile(i))
    if x_aug.shape[1] <= 1.5 * k:
        augmented = triton_site.AugmentedWeight(weights[0], first)
        augmented.load()
        many = [augmented]
        for _ in range(count - 1):
            other = copy.copy(augmented)
            other.data = augmented.data.clone()
            many.append(other)
        x_augs = [x_aug.clone() for _ in range(count)]
        enter("augmented K", lambda i: lambda: many[i].run(x_augs[i], outs[i], routing, plan))
    if tokens <= 64:
        for site_plan in site_plans(tokens, k, n, args.quick):
            enter(
                f"one launch n{site_plan.block_n} k{site_plan.base_k} w{site_plan.num_warps} s{site_plan.num_stages}",
                lambda i, p=site_plan: (
                    lambda: triton_site.site_decode(  # type: ignore[misc]
                        xs[i], weights[i], None, outs[i], pools[i], routing, p
                    )
                ),
            )
    if adapters == 1:
        merged = [weights[0] + sum_update(problem), *weights[1:]]
        enter("merged weight", lambda i: lambda: torch.mm(xs[i], merged[i].T, out=outs[i]))
    if anchors.available():
        held = [anchors.TritonV2(p) for p in [problem, *(problem.copy() for _ in range(count - 1))]]
        enter("triton_v2", lambda i: lambda: held[i].site(lambda: torch.mm(xs[i], weights[i].T, out=outs[i]))(xs[i]))
        vllm = [anchors.Vllm(p) for p in [problem, *(problem.copy() for _ in range(count - 1))]]
        pairs = [v.pair() for v in vllm]
        enter("vllm", lambda i: lambda: (torch.mm(xs[i], weights[i].T, out=outs[i]), pairs[i](xs[i], outs[i])))
        vllm[0].close()
    cell = {"part": part, "site": site, "T": tokens, "adapters": adapters, "ranks": 16}
    record(clock, args, contestants, cell, size + 2 * tokens * (k + n))


def padded(x: torch.Tensor) -> torch.Tensor:
    """A copy with memory for a whole tile of rows behind it, as the engine's own ops allot it."""
    held = torch.zeros(max(len(x), TILE_ROWS), x.shape[1], dtype=x.dtype, device=x.device)
    held[: len(x)] = x
    return held[: len(x)]


def sum_update(problem: Problem) -> torch.Tensor:
    return torch.cat([b.float() @ a.float() for a, b in zip(problem.a[0], problem.b[0], strict=True)]).bfloat16()


def site_plans(tokens: int, k: int, n: int, quick: bool) -> list[SitePlan]:
    shipped = plans.site_plan(tokens, k, n)
    found = [shipped] if shipped else []
    if tokens <= 16:
        found += [SitePlan(block_n=w, base_k=b, num_stages=s) for w, b, s in ((16, 512, 4), (32, 256, 4), (64, 128, 5))]
    else:
        found += [SitePlan(block_n=w, base_k=b, num_stages=s) for w, b, s in ((32, 128, 5), (64, 128, 4), (128, 64, 4))]
    unique = list(dict.fromkeys(found))
    return unique[:3] if quick else unique


def record(clock: Clock, args: argparse.Namespace, contestants: dict[str, list[Call]], cell: dict, size: int) -> None:
    if args.compile_only:
        return
    times = clock.race(contestants, 10 if args.quick else 30)
    done = {name: summary(values) for name, values in times.items()}
    floor = size / BANDWIDTH * 1e6
    row = {**cell, "bytes": size, "floor_us": round(floor, 3), "contestants": done}
    others = {name: t["us"] for name, t in done.items() if name.split()[0] in ("vllm", "csgmv", "triton_v2", "torch")}
    ours = {name: t["us"] for name, t in done.items() if name.startswith("ours") and not name.endswith(("fp8", "int4"))}
    if cell["part"] == "pair" and others and ours:
        row["best_anchor"] = min(others, key=others.__getitem__)
        row["ratio"] = round(others[row["best_anchor"]] / done["ours"]["us"], 3) if "ours" in done else None
        row["best_ours"] = min(ours, key=ours.__getitem__)
        row["best_ratio"] = round(others[row["best_anchor"]] / ours[row["best_ours"]], 3)
    elif "base cuBLAS" in done:
        base = done["base cuBLAS"]["us"]
        row["tax"] = {name: round(t["us"] / base - 1, 4) for name, t in done.items() if name != "base cuBLAS"}
    rows.append(row)
    save("lora", [row])


def routing_cells(clock: Clock, args: argparse.Namespace) -> None:
    pool = LoraPool(1024, (64,), 64, 64, max_rank=16, device=DEVICE)
    for tokens in (64, 256, 2048, 8192):
        routing = DeviceRouting(tokens, 64, [pool])
        mapping = torch.randint(-1, 64, (tokens,), dtype=torch.int32, device=DEVICE)
        cell = {"part": "routing", "site": "once a step", "T": tokens, "adapters": 64, "ranks": 16}
        record(clock, args, {"ours": [lambda r=routing, m=mapping: r.build(m)] * 16}, cell, 12 * tokens)  # type: ignore[misc]


def show() -> None:
    for row in rows:
        head = f"{row['part']:7} {row['site']:12} T{row['T']:<5} A{row['adapters']:<3} r{row['ranks']!s:5}"
        times = sorted(row["contestants"].items(), key=lambda item: item[1]["us"])
        listed = ", ".join(f"{name} {t['us']:.2f}" for name, t in times[:9])
        print(f"{head} floor {row['floor_us']:7.2f} | x{row.get('best_ratio', '')} | {listed}")
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    best = [row["best_ratio"] for row in rows if row.get("best_ratio")]
    if ratios:
        mean = lambda values: math.exp(statistics.fmean(map(math.log, values)))  # noqa: E731
        print(
            f"pair over the best anchor: shipped plan {mean(ratios):.3f} (worst {min(ratios)}), best of ours {mean(best):.3f}"
        )
    for part in ("site", "prefill"):
        for model in ("8B", "0.6B"):
            for key in sorted({(r["T"], r["adapters"]) for r in rows if r["part"] == part}):
                cells = [
                    r
                    for r in rows
                    if r["part"] == part and r["site"].startswith(model) and (r["T"], r["adapters"]) == key
                ]
                if len(cells) == 4:
                    base = sum(r["contestants"]["base cuBLAS"]["us"] for r in cells)
                    designs = set.intersection(*(set(r["tax"]) for r in cells))
                    sums = {d: sum(r["contestants"][d]["us"] for r in cells) / base - 1 for d in designs}
                    mine = ("product", "shrink", "update", "augmented", "one launch")
                    sums["best of ours per site"] = (
                        sum(min(t["us"] for d, t in r["contestants"].items() if d.startswith(mine)) for r in cells)
                        / base
                        - 1
                    )
                    taxes = ", ".join(f"{d} {100 * v:+.1f}%" for d, v in sorted(sums.items(), key=lambda i: i[1]))
                    print(f"{part} tax, {model} layer, T{key[0]} A{key[1]}: {taxes}")


def precompile(args: argparse.Namespace, sites: Sequence[str]) -> None:
    """Each kind of site in a process of its own fills Triton's cache on disk, so that compiling takes cores and not turns."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "bench.gpu.lora", "--compile-only", *(["--quick"] if args.quick else [])]
    jobs = [[*command, "--site", site, "--part", part] for site in sites for part in args.part if part != "routing"]
    running = [subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for job in jobs]
    for process in running:
        process.wait()
    print(f"compiled in {time.perf_counter() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 8B sites and fewer cells")
    parser.add_argument("--site", nargs="+", choices=list(SITES))
    parser.add_argument("--part", nargs="+", choices=["pair", "site", "prefill", "routing"])
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()
    require_gpu()
    args.part = args.part or ["pair", "site", "prefill", "routing"]
    sites = args.site or [site for site in SITES if site.startswith("8B") or not args.quick]
    torch.manual_seed(0)
    if not args.compile_only:
        precompile(args, sites)
        if not anchors.available():
            print("no .anchors/ (bench/gpu/fetch_anchors.sh): torch alone is beside ours")
    clock = Clock()
    for site in sites:
        if "pair" in args.part:
            for tokens, adapters in QUICK_PAIR if args.quick else DECODE:
                with guarded(f"pair {site} T{tokens} A{adapters}"):
                    pair_cell(clock, args, site, tokens, adapters, mixed=False)
                    if (tokens, adapters) in ((64, 8), (64, 64)) and not args.quick:
                        pair_cell(clock, args, site, tokens, adapters, mixed=True)
        if "site" in args.part:
            for tokens, adapters in QUICK_SITE if args.quick else DECODE[:-4]:
                with guarded(f"site {site} T{tokens} A{adapters}"):
                    site_cell(clock, args, "site", site, tokens, adapters)
        if "prefill" in args.part:
            for tokens in (2048,) if args.quick else (2048, 8192):
                for adapters in (1, 8):
                    with guarded(f"prefill {site} T{tokens} A{adapters}"):
                        site_cell(clock, args, "prefill", site, tokens, adapters)
    if "routing" in args.part:
        routing_cells(clock, args)
    if not args.compile_only:
        show()
    end()


if __name__ == "__main__":
    main()
