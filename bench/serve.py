"""`uma serve` under load: open-loop latency, what a front end costs, continuous against static batches, and swaps under traffic.

    python -m bench.serve load [--share 0.5 0.7 0.9] [--burst 1 8] [--seconds 30]
    python -m bench.serve front
    python -m bench.serve stream
    python -m bench.serve batching [--mixes exponential "of surfaces"]
    python -m bench.serve priority [--seconds 60]
    python -m bench.serve swaps [--models smollm2-135m gemma3-270m qwen2.5-coder-0.5b] [--swaps 50]

load      requests of mixed sizes at times that do not wait for answers; `--share` of the capacity that a closed loop reaches. Time to the
          first event and to the whole answer, and goodput: answers within five times what an idle server takes.
front     one process against a front end before it, the same requests in turns.
stream    many streams of a tiny model, whose tokens cost next to nothing: chunks a second, and for each second of the front end's CPU.
batching  64 completions of mixed lengths: all at once against batches of 16 or 32 that wait for their longest. Goal: 4x.
priority  small interactive requests, alone, beside a flood of large ones of the class batch, and beside the same flood as interactive.
swaps     bases in a circle while requests come at 70 % of the capacity of the slowest (`--own-rate`: of the one that answers); then each
          base gets those that it answered once more, at the same times, while nobody swaps; `added`: of the differences, request by
          request. Afterwards each answer is recomputed by the base that it names.

Load is made by another process on the same machine, and takes part of it. Rows go to bench/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.rows import ROOT, append_row, quantiles

ADMIN = "bench-admin-secret-0123456789"
SKILLS = "Rust PostgreSQL React nursing welding Kubernetes accounting German logistics illustration".split()  # noqa: SIM905
IDLE_TIMES = 5  # of an idle server's median: the objective of goodput
BATCHES = (16, 32)


def _of_surfaces(rng: random.Random) -> int:
    """What specialists answer: six in ten a label, three some reasons, one a long text."""
    kind = rng.random()
    if kind < 0.6:
        return rng.randrange(1, 9)
    return min(512, 4 + int(rng.expovariate(1 / 60))) if kind < 0.9 else rng.randrange(192, 385)


MIXES: dict[str, Callable[[random.Random], int]] = {
    "exponential": lambda rng: min(512, 4 + int(rng.expovariate(1 / 60))),
    "of surfaces": _of_surfaces,
}
SIZES = (2, 4, 4, 8, 8, 16)


def texts(rng: random.Random, count: int) -> list[str]:
    return [
        f"Candidate with {rng.randrange(1, 20)} years of {', '.join(rng.sample(SKILLS, 3))}. " * rng.randrange(1, 6)
        for _ in range(count)
    ]


def rank_body(rng: random.Random, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Most requests are small, some are large: `sizes` are numbers of candidates."""
    return {
        "query": f"We need somebody who knows {rng.choice(SKILLS)} and {rng.choice(SKILLS)}.",
        "candidates": texts(rng, rng.choice(sizes)),
    }


@contextlib.asynccontextmanager
async def served(*flags: str) -> AsyncIterator[Any]:
    """A client of a fresh `uma serve`, for as long as the context lasts."""
    import httpx

    environment = os.environ | {"UMA_API_KEYS": f"bench admin {ADMIN}"}
    command = [sys.executable, "-m", "uma_engine.cli.main", "serve", "--port", "0", *flags]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 300)).decode()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found, line
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        headers = {"authorization": f"Bearer {ADMIN}"}
        async with httpx.AsyncClient(base_url=found.group(), headers=headers, timeout=300, limits=limits) as client:
            await ready(client)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def ready(client: Any) -> None:
    import httpx

    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the server does not become ready")


async def asked(client: Any, body: dict[str, Any], began: float) -> dict[str, Any]:
    """One streamed ranking: when its scores came and when all of it was there, in seconds after `began`, when it was due."""
    first, status = None, 0
    async with client.stream("POST", "/v1/rank", json=body | {"stream": True}) as answer:
        status = answer.status_code
        async for _ in answer.aiter_bytes():
            first = time.perf_counter() - began if first is None else first
    return {"first": first, "whole": time.perf_counter() - began, "status": status}


async def open_loop(
    ask: Callable[[dict[str, Any], float], Awaitable[Any]], rate: float, burst: int, seconds: float, seed: int = 0
) -> list[Any]:
    """Ask `rate` times a second in exponential gaps, `burst` at once, whether or not answers have come."""
    rng = random.Random(seed)
    began, due, tasks = time.perf_counter(), 0.0, []
    while due < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks += [asyncio.create_task(ask(rank_body(rng), began + due)) for _ in range(burst)]
        due += rng.expovariate(rate / burst)
    return await asyncio.gather(*tasks)


async def capacity(client: Any, seconds: float = 15.0, sizes: Sequence[int] = SIZES) -> tuple[float, float]:
    """(requests a second of a closed loop of eight, the median seconds of one that is alone)"""
    rng = random.Random(99)
    alone = []
    for _ in range(12):
        alone.append((await asked(client, rank_body(rng, sizes), time.perf_counter()))["whole"])
    done, end = 0, time.perf_counter() + seconds

    async def again() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await asked(client, rank_body(rng, sizes), time.perf_counter())
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(again() for _ in range(8)))
    return done / (time.perf_counter() - began), quantiles(alone)[1]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{q}_ms": round(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))] * 1e3, 1) for q in (50, 95, 99)
    }


async def load(args: argparse.Namespace) -> None:
    async with served("--model", args.model, "--front-ends", "1") as client:
        most, idle = await capacity(client)
        for burst in args.burst:
            for share in args.share:
                rate = share * most
                answers = await open_loop(lambda b, t: asked(client, b, t), rate, burst, args.seconds)
                good = [a for a in answers if a["status"] == 200]
                within = sum(a["whole"] <= IDLE_TIMES * idle for a in good)
                keep(args, {
                    "kind": "load", "model": args.model, "share": share, "burst": burst, "asked_per_s": round(rate, 2),
                    "requests": len(answers), "failed": len(answers) - len(good), "idle_ms": round(idle * 1e3, 1),
                    "first": percentiles([a["first"] for a in good]), "whole": percentiles([a["whole"] for a in good]),
                    "goodput_per_s": round(within / args.seconds, 2), "within_objective": round(within / len(answers), 3),
                })  # fmt: skip


async def front(args: argparse.Namespace) -> None:
    """Small requests, in turns: what the socket and the second process cost."""
    rng = random.Random(3)
    body = rank_body(rng) | {"candidates": texts(rng, 1)}
    flags = ("--model", args.model)
    async with served(*flags) as one, served(*flags, "--front-ends", "1") as two:
        found: dict[str, dict[str, list[float]]] = {"rank": {}, "models": {}}
        for _ in range(args.rounds):
            for name, client in (("one", one), ("two", two)):
                for kind in found:
                    began = time.perf_counter()
                    answer = await (client.post("/v1/rank", json=body) if kind == "rank" else client.get("/v1/models"))
                    assert answer.status_code == 200
                    found[kind].setdefault(name, []).append(time.perf_counter() - began)
        for kind, by in found.items():
            one_ms, two_ms = (quantiles(by[name])[1] * 1e3 for name in ("one", "two"))
            keep(args, {
                "kind": "front", "request": kind, "model": args.model, "rounds": args.rounds,
                "one_process_p50_ms": round(one_ms, 3), "front_end_p50_ms": round(two_ms, 3), "adds_ms": round(two_ms - one_ms, 3),
            })  # fmt: skip


async def stream(args: argparse.Namespace) -> None:
    import tempfile

    from bench.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as home:
        model = make_tiny_model(Path(home) / "tiny")
        async with served("--model", str(model), "--front-ends", "1", "--max-waiting", "1000") as client:
            pids = [
                int(p)
                for p in subprocess.run(["pgrep", "-f", "serve_process"], capture_output=True, text=True).stdout.split()
            ]
            front = [p for p in pids if "libtorch" not in Path(f"/proc/{p}/maps").read_text()]

            def spent() -> float:
                fields = [Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split() for p in front]
                return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")

            async def one(number: int) -> int:
                body = {
                    "model": str(model),
                    "prompt": f"say {number}",
                    "max_tokens": 300,
                    "stream": True,
                    "temperature": 1,
                }
                chunks = 0
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    async for data in answer.aiter_bytes():
                        chunks += data.count(b"data: ")
                return chunks

            await one(0)
            before, began = spent(), time.perf_counter()
            chunks = sum(await asyncio.gather(*(one(n) for n in range(args.streams))))
            seconds, cpu = time.perf_counter() - began, spent() - before
    keep(args, {
        "kind": "stream", "streams": args.streams, "chunks": chunks, "chunks_per_s": round(chunks / seconds),
        "chunks_per_front_end_cpu_s": round(chunks / max(cpu, 0.01)),
    })  # fmt: skip


def batching(args: argparse.Namespace) -> None:
    """Each mix of lengths is drawn once; rounds take the ways in turns."""
    from uma_engine import Engine, SamplingParams

    def timed(prompts: list[list[int]], lengths: list[int], size: int) -> float:
        """Seconds for batches of `size`, each row of which is computed until its longest is done; 0: all at once, each as long as it is."""
        began = time.perf_counter()
        for i in range(0, len(prompts), size or len(prompts)):
            part = slice(i, i + (size or len(prompts)))
            asked = [max(lengths[part])] * len(lengths[part]) if size else lengths
            engine.generate(prompts[part], [SamplingParams(max_tokens=n, ignore_eos=True) for n in asked])
        return time.perf_counter() - began

    with Engine(args.model, precision=args.precision, enable_prefix_cache=False) as engine:
        for mix in args.mixes:
            rng = random.Random(5)
            prompts = [[rng.randrange(1000, 40000) for _ in range(rng.randrange(16, 128))] for _ in range(64)]
            lengths = [MIXES[mix](rng) for _ in prompts]
            timed(prompts[:2], lengths[:2], 0)
            times: dict[int, list[float]] = {0: [], **{size: [] for size in BATCHES}}
            for _ in range(args.rounds):
                for size, taken in times.items():
                    taken.append(timed(prompts, lengths, size))
            wasted = {n: sum(n * max(lengths[i : i + n]) for i in range(0, len(lengths), n)) for n in BATCHES}
            keep(args, {
                "kind": "batching", "mix": mix, "model": args.model, "precision": args.precision, "prompts": len(prompts),
                "mean_length": round(sum(lengths) / len(lengths), 1), "longest": max(lengths), "rounds": args.rounds,
                "continuous_tokens_per_s": round(sum(lengths) / quantiles(times[0])[1], 1),
                "static": [
                    {
                        "batch": n, "tokens_per_s": round(sum(lengths) / quantiles(times[n])[1], 1),
                        "times": [round(q, 2) for q in quantiles([b / a for a, b in zip(times[0], times[n], strict=True)])],
                        "tokens_computed_times": round(wasted[n] / sum(lengths), 2),
                    }
                    for n in BATCHES
                ],
            })  # fmt: skip


async def priority(args: argparse.Namespace) -> None:
    """Interactive requests have the same times and sizes in each round."""
    async with served("--model", args.model, "--front-ends", "1") as client:
        most, _ = await capacity(client)
        found: dict[str, list[float]] = {}
        done: dict[str, int] = {}
        for name in ("alone", "beside batch", "beside interactive"):
            stop = asyncio.Event()
            done[name] = 0

            async def flood(seed: int, name: str = name, stop: asyncio.Event = stop) -> None:
                rng = random.Random(seed)
                headers = {"x-uma-priority": "batch" if name == "beside batch" else "interactive"}
                while not stop.is_set():
                    body = rank_body(rng) | {"candidates": texts(rng, 64)}
                    answer = await client.post("/v1/rank", json=body, headers=headers)
                    assert answer.status_code == 200, answer.text
                    done[name] += 1

            floods = [asyncio.create_task(flood(seed)) for seed in range(4)] if name != "alone" else []
            await asyncio.sleep(2 if floods else 0)
            answers = await open_loop(lambda b, t: asked(client, b, t), args.rate * most, 1, args.seconds)
            stop.set()
            await asyncio.gather(*floods)
            assert all(a["status"] == 200 for a in answers)
            found[name] = [a["whole"] for a in answers]
    keep(args, {
        "kind": "priority", "model": args.model, "asked_share": args.rate, "requests": len(found["alone"]),
        "batches_done": {name: n for name, n in done.items() if n},
        **{name.replace(" ", "_"): percentiles(values) for name, values in found.items()},
    })  # fmt: skip


async def swaps(args: argparse.Namespace) -> None:
    asked_for: list[Asked] = []
    pauses: list[float] = []
    rates: dict[str, float] = {}
    phases: dict[str, list[float]] = {}
    async with served("--model", args.models[0], "--front-ends", "1") as client:

        async def swap(model: str) -> float:
            began = time.perf_counter()
            told = (await client.post("/admin/swap", json={"model": model, "wait": True})).json()["swap"]
            assert told["phase"] == "done", told
            for phase, seconds in told["took"].items():
                phases.setdefault(phase, []).append(seconds)
            return time.perf_counter() - began

        circle_once = [*args.models[1:], args.models[0]]
        for model in circle_once:  # each base by itself; the caches are filled by the way
            await swap(model)
            rates[model] = args.share * (await capacity(client, sizes=args.sizes))[0]
        if (
            not args.own_rate
        ):  # what waits at the door while a base flips is answered by the next one, which may be many times slower
            rates = dict.fromkeys(rates, min(rates.values()))
        phases.clear()

        async def ask(asked: Asked, due: float) -> Asked:
            answer = await client.post("/v1/rank", json=asked.body)
            return replace(asked, answer=answer, seconds=time.perf_counter() - due)

        now = args.models[0]

        async def circle() -> None:
            nonlocal now
            for number in range(1, args.swaps + 1):
                model = args.models[number % len(args.models)]
                pauses.append(await swap(model))
                now = model
                sys.stderr.write(f"  swap {number}/{args.swaps}: {model} after {pauses[-1]:.1f} s\n")

        rng, tasks = random.Random(1), []
        swapping = asyncio.create_task(circle())
        began, due = time.perf_counter(), 0.0
        while not swapping.done():
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(Asked(due, rank_body(rng, args.sizes)), began + due)))
            due += rng.expovariate(rates[now])
        asked_for = list(await asyncio.gather(*tasks))
        await swapping
        good = [a for a in asked_for if a.answer.status_code == 200]
        quiet: dict[str, list[float]] = {}
        for model in circle_once:  # the same requests at the same times, and nobody swaps
            await swap(model)
            quiet[model] = []
            for part in spans(good, lambda a, m=model: a.model == m):
                began = time.perf_counter()

                async def again(asked: Asked, began: float = began, first: float = part[0].due) -> float:
                    due = began + asked.due - first
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    return (await ask(asked, due)).seconds

                quiet[model] += await asyncio.gather(*map(again, part))
            sys.stderr.write(f"  {model}, no swaps: {percentiles(quiet[model])}\n")
    wrong = recomputed(args.models, [(a.body, a.answer.json()) for a in good], args.checked)
    by_base: dict[str, Any] = {}
    added: dict[str, list[float]] = {}
    for model in args.models:
        during, without = [a.seconds for a in good if a.model == model], quiet[model]
        before, after = percentiles(without), percentiles(during)
        added[model] = [a - b for a, b in zip(during, without, strict=True)]
        by_base[model] = {
            "asked_per_s": round(rates[model], 2), "requests": len(during), "quiet": before, "during": after,
            "adds_p99_ms": round(after["p99_ms"] - before["p99_ms"], 1),
            "added": percentiles(added[model]),
        }  # fmt: skip
    keep(args, {
        "kind": "swaps", "models": args.models, "swaps": len(pauses), "requests": len(asked_for), "share": args.share,
        "sizes": args.sizes, "own_rate": args.own_rate, "failed": len(asked_for) - len(good), "checked": min(args.checked, len(good)),
        "of_another_base": wrong, "swap_s_p50": round(quantiles(pauses)[1], 2),
        "phase_s_p50": {phase: round(quantiles(found)[1], 2) for phase, found in phases.items()}, "by_base": by_base,
        "added": percentiles([change for changes in added.values() for change in changes]),
    })  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request of the swaps: when it was due after the first, what was answered and after how many seconds."""

    due: float
    body: dict[str, Any]
    answer: Any = None
    seconds: float = 0.0

    @property
    def model(self) -> str:
        return str(self.answer.json()["stack"]["model"])


def spans(asked: Sequence[Asked], wanted: Callable[[Asked], bool]) -> list[list[Asked]]:
    """The wanted ones in runs: no other lies between those of one run."""
    runs: list[list[Asked]] = []
    last = None
    for place, one in enumerate(asked):
        if wanted(one):
            if last != place - 1 or not runs:
                runs.append([])
            runs[-1].append(one)
            last = place
    return runs


def recomputed(models: Sequence[str], answers: Sequence[tuple[dict[str, Any], Any]], most: int) -> int:
    """How many of at most `most` answers are not bit for bit what the base that they name says by itself."""
    from uma_engine import Engine

    chosen = random.Random(2).sample(list(answers), min(most, len(answers)))
    wrong = len(chosen)
    for model in models:
        with Engine(model, max_lora_rank=256) as engine:
            for body, said in chosen:
                if said["stack"]["base_digest"] == engine.stack_info().base_digest:
                    mine = engine.rank(body["query"], body["candidates"]).results
                    wrong -= [(r["id"], r["score"]) for r in said["results"]] == [(r.id, r.score) for r in mine]
    return wrong


def keep(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if not args.no_save:
        append_row("serve", {"bench": "serve", **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    made = {name: kinds.add_parser(name) for name in ("load", "front", "stream", "batching", "priority", "swaps")}
    for sub in made.values():
        sub.add_argument("--model", default="smollm2-135m")
        sub.add_argument("--precision", default="near")
        sub.add_argument("--seconds", type=float, default=30)
        sub.add_argument("--rounds", type=int, default=200 if sub is made["front"] else 3)
        sub.add_argument("--no-save", action="store_true")
    made["stream"].add_argument("--streams", type=int, default=48)
    made["batching"].add_argument("--mixes", choices=MIXES, nargs="+", default=list(MIXES), help="of lengths")
    made["load"].add_argument("--share", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    made["load"].add_argument("--burst", type=int, nargs="+", default=[1, 8])
    made["swaps"].add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"])
    made["swaps"].add_argument("--swaps", type=int, default=50)
    made["swaps"].add_argument("--share", type=float, default=0.7)
    made["priority"].add_argument(
        "--rate", type=float, default=0.2, help="of the capacity that interactive requests take"
    )
    made["swaps"].add_argument("--own-rate", action="store_true", help="of each base, not of the slowest")
    made["swaps"].add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of candidates of a request")
    made["swaps"].add_argument("--checked", type=int, default=200)
    args = parser.parse_args()
    if args.kind == "batching":
        batching(args)
    else:
        asyncio.run(
            {"load": load, "front": front, "stream": stream, "priority": priority, "swaps": swaps}[args.kind](args)
        )


if __name__ == "__main__":
    main()
