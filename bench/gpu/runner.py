"""The whole engine on a GPU, over models of real shapes with random weights.

    python -m bench.gpu.runner [--quick] [--only check ranking fp8 graphs mixed memory decode host]

Knows workloads, clocks and the peer; does not know kernels. The peer is transformers, scoring each candidate's whole prompt
(bf16, sdpa, last token's logits only) at the best of several batch sizes. Scores are checked against a plain fp32 run of the
same weights first: where they are off, nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.gpu.harness import ceilings, environment, require_gpu, save
from bench.gpu.models import SHAPES, TokenEngine, random_ids
from uma_engine.config import ModelConfig
from uma_engine.core import RequestKind, SamplingParams, Segment

JOB, CANDIDATE, COUNT = 600, 250, 100
LABELS = (9693, 2152)
BF16 = torch.bfloat16
rows: list[dict[str, Any]] = []


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def report(name: str, **values: Any) -> None:
    row = {"name": name, **{key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}}
    rows.append(row)
    save("runner", [row])
    print(row, flush=True)


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_engine(shape: ModelConfig, dtype: torch.dtype = BF16, **options: Any) -> TokenEngine:
    freed()
    max_len = options.pop("max_model_len", 2048)
    return TokenEngine(shape, device(), dtype, max_len, **options)


def requests(
    rng: np.random.Generator, shape: ModelConfig, sizes: tuple[int, int, int]
) -> tuple[list[int], list[list[int]]]:
    job, candidate, count = sizes
    return random_ids(rng, shape.vocab_size, job), [random_ids(rng, shape.vocab_size, candidate) for _ in range(count)]


def flops_of(engine: TokenEngine, sizes: tuple[int, int, int]) -> float:
    """Matrix products that one rank request needs: in the last layer only the scored rows go beyond keys and values."""
    job, candidate, count = sizes
    tokens = job + candidate * count
    last = f"layers.{engine.model.config.num_layers - 1}."
    pruned = 2.0 * sum(
        k * n
        for site, (k, n) in engine.model.sites().items()
        if site.startswith(last) and not site.endswith(("k_proj", "v_proj"))
    )
    return tokens * (engine.model.flops_per_token - pruned) + count * pruned


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def check(shape: ModelConfig) -> None:
    """Scores in bf16 against fp32, both of the same weights, and each candidate alone against all together."""
    small = replace(shape, num_layers=4)
    sizes, scores = (90, 40, 6), []
    for dtype in (torch.float32, BF16):
        rng = np.random.default_rng(7)
        engine = make_engine(small, dtype, kv_cache_bytes=2**28, enforce_eager=True)
        job, people = requests(rng, small, sizes)
        together = engine.score(job, people, LABELS).wait().logits
        alone = engine.score(job, people[2:3], LABELS).wait().logits
        if together[3] != alone[1]:
            sys.exit(f"a candidate scores {alone[1]} alone but {together[3]} in company ({dtype})")
        scores.append(np.array([together[i] for i in sorted(together)]))
        engine.close()
    spread, error = float(np.abs(scores[0]).max()), float(np.abs(scores[0] - scores[1]).max())
    report("check", largest_logit=spread, largest_difference=error, relative=error / spread)
    if not error <= 0.1 * spread:
        sys.exit("bf16 scores are not those of fp32")


def ranking(shape: ModelConfig, quick: bool) -> None:
    """600/250/100: one request after the other, several at once, both modes of the matrix products in turn, and the peer."""
    sizes, rng = (JOB, CANDIDATE, COUNT), np.random.default_rng(0)
    best: dict[str, float] = {}
    for budget in (16384,) if quick else (8192, 16384, 32768):
        options: dict[str, Any] = {"max_num_batched_tokens": budget, "kv_cache_bytes": 2**30}
        engines = {mode: make_engine(shape, mode=mode, **options) for mode in ("audit", "fast")}
        alone: dict[str, list[float]] = {mode: [] for mode in engines}
        four: dict[str, list[float]] = {mode: [] for mode in engines}
        for turn in range(8):
            for mode, engine in engines.items():
                work = [requests(rng, shape, sizes) for _ in range(5)]  # new ids: nothing is in the prefix cache
                start = time.perf_counter()
                engine.score(*work[0], LABELS).wait()
                middle = time.perf_counter()
                for waiter in [engine.score(*one, LABELS) for one in work[1:]]:
                    waiter.wait()
                if turn >= 2:  # before, kernels are compiled and steps settle
                    alone[mode].append(middle - start)
                    four[mode].append((time.perf_counter() - middle) / 4)
        for mode, engine in engines.items():
            seconds = statistics.median(four[mode])
            rate = flops_of(engine, sizes) / seconds / 1e12
            best[mode] = min(best.get(mode, seconds), seconds)
            report(
                "ranking",
                mode=mode,
                max_num_batched_tokens=budget,
                ms_alone=statistics.median(alone[mode]) * 1e3,
                ms_of_four_at_once=seconds * 1e3,
                tflop_s=rate,
                share_of_matmul=rate / ceilings().bf16_tflop_s,
                candidates_s=COUNT / seconds,
            )
        ratios = [a / f for a, f in zip(four["audit"], four["fast"], strict=True)]
        report("audit against fast", max_num_batched_tokens=budget, cost=statistics.median(ratios) - 1)
        for engine in engines.values():
            engine.close()
    peer = transformers_pointwise(shape, sizes, quick)
    report(
        "ranking against transformers", peer_ms=peer * 1e3, times=peer / best["audit"], times_fast=peer / best["fast"]
    )


def fp8(shape: ModelConfig, quick: bool) -> None:
    """600/250/100 with 8-bit products of the blocks and without, in turn, and how far apart their scores are: of random weights, so that
    the quality of a real model is in the table of `bench.accuracy`."""
    sizes, rng = (JOB, CANDIDATE, COUNT), np.random.default_rng(4)
    options: dict[str, Any] = {"max_num_batched_tokens": 16384, "kv_cache_bytes": 2**30}
    engines = {name: make_engine(shape, quantization=name, **options) for name in (None, "fp8")}
    times: dict[str | None, list[float]] = {name: [] for name in engines}
    differences, spreads = [], []
    for turn in range(6 if quick else 12):
        work = [requests(rng, shape, sizes) for _ in range(3)]
        scores = {}
        for name, engine in engines.items():
            start = time.perf_counter()
            waiters = [engine.score(*one, LABELS) for one in work]
            scores[name] = np.array([waiter.wait().logits[1] for waiter in waiters])
            if turn >= 2:
                times[name].append((time.perf_counter() - start) / len(work))
        differences.append(np.abs(scores["fp8"] - scores[None]).max())
        spreads.append(np.abs(scores[None]).max())
    report(
        "8-bit products",
        ms=statistics.median(times["fp8"]) * 1e3,
        ms_bf16=statistics.median(times[None]) * 1e3,
        times=statistics.median([b / f for b, f in zip(times[None], times["fp8"], strict=True)]),
        weights_gb=engines["fp8"].model.num_bytes / 1e9,
        weights_gb_bf16=engines[None].model.num_bytes / 1e9,
        largest_difference=float(max(differences)),
        largest_logit=float(max(spreads)),
    )
    for engine in engines.values():
        engine.close()


def mixed(shape: ModelConfig, quick: bool) -> None:
    """64 sequences that decode while one ranking of 120/180/10 after the other comes in, with graphs of such steps and without."""
    rng = np.random.default_rng(5)
    options: dict[str, Any] = {"max_num_batched_tokens": 2048, "kv_cache_bytes": 2**32}
    for name, eager in (("graphs", False), ("eager", True)):
        engine = make_engine(shape, enforce_eager=eager, **options)
        for part in ("warm", "timed"):
            tokens = 32 if part == "warm" else 128 if quick else 512
            start = time.perf_counter()
            decoding = [engine.generate(random_ids(rng, shape.vocab_size, 64), tokens) for _ in range(64)]
            ranked = 0
            while len(decoding[0].tokens) < tokens:
                engine.score(*requests(rng, shape, (120, 180, 10)), LABELS).wait()
                ranked += 1
            for waiter in decoding:
                waiter.wait()
            seconds = time.perf_counter() - start
        report(
            f"decoding beside rankings, {name}",
            tokens_s=64 * tokens / seconds,
            rankings_s=ranked / seconds,
            ms_per_step=engine.loop.step_seconds / engine.loop.num_steps * 1e3,
        )
        engine.close()


def graphs(shape: ModelConfig, quick: bool) -> None:
    """600/250/100 with the graphs of scoring steps and without, in turn: the host's part shows where steps are small."""
    sizes, rng = (JOB, CANDIDATE, COUNT), np.random.default_rng(1)
    for budget in (1024, 8192) if quick else (1024, 2048, 4096, 8192):
        options: dict[str, Any] = {"max_num_batched_tokens": budget, "kv_cache_bytes": 2**30}
        start = time.perf_counter()
        engines = {"graphs": make_engine(shape, **options)}
        captured = time.perf_counter() - start
        engines["eager"] = make_engine(shape, enforce_eager=True, **options)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(8):
            for name, engine in engines.items():
                work = [requests(rng, shape, sizes) for _ in range(2)]
                start = time.perf_counter()
                for waiter in [engine.score(*one, LABELS) for one in work]:
                    waiter.wait()
                if turn >= 2:
                    times[name].append((time.perf_counter() - start) / len(work))
        ratios = [e / g for e, g in zip(times["eager"], times["graphs"], strict=True)]
        report(
            "graphs of scoring steps",
            max_num_batched_tokens=budget,
            ms_graphs=statistics.median(times["graphs"]) * 1e3,
            ms_eager=statistics.median(times["eager"]) * 1e3,
            times=statistics.median(ratios),
            seconds_to_start=captured,
        )
        for engine in engines.values():
            engine.close()


def transformers_pointwise(shape: ModelConfig, sizes: tuple[int, int, int], quick: bool) -> float:
    """Seconds that transformers needs for one job and all its candidates, at its best batch size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    freed()
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with device():
            model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    job, candidate, count = sizes
    prompts = torch.randint(1000, shape.vocab_size - 1000, (count, job + candidate), device=device())
    found: dict[int, float] = {}

    def score(batch: int) -> None:
        for first in range(0, count, batch):
            model(prompts[first : first + batch], use_cache=False, logits_to_keep=1).logits[
                :, -1, list(LABELS)
            ].tolist()

    with torch.inference_mode():
        for batch in (10, 25) if quick else (5, 10, 20, 25, 50):
            score(batch)
            found[batch] = statistics.median(seconds_of(lambda batch=batch: score(batch), 2))  # type: ignore[misc]
    best = min(found, key=lambda batch: found[batch])
    report(
        "transformers pointwise", batch=best, ms=found[best] * 1e3, tried={b: round(s * 1e3) for b, s in found.items()}
    )
    return found[best]


def memory(shape: ModelConfig) -> None:
    """500 candidates of 250 tokens after a job of 600: what the device holds beyond the weights."""
    freed()
    torch.cuda.reset_peak_memory_stats()
    for budget in (8192, 16384):
        engine = make_engine(shape, max_num_batched_tokens=budget, kv_cache_bytes=2**27, enforce_eager=True)
        torch.cuda.reset_peak_memory_stats()
        rng = np.random.default_rng(1)
        engine.score(*requests(rng, shape, (JOB, CANDIDATE, 500)), LABELS).wait()
        report(
            "memory of 500 candidates",
            max_num_batched_tokens=budget,
            weights_gb=engine.model.num_bytes / 1e9,
            extra_gb=(torch.cuda.max_memory_allocated() - engine.model.num_bytes) / 1e9,
            extra_reserved_gb=(torch.cuda.max_memory_reserved() - engine.model.num_bytes) / 1e9,
        )
        engine.close()


def decode(names: Sequence[str], quick: bool) -> None:
    """One sequence after a prompt of 128 tokens: time of a token against the bytes of weights that it reads."""
    for name in names:
        shape = SHAPES[name]
        engine = make_engine(shape, max_num_seqs=1, max_num_batched_tokens=1024, kv_cache_bytes=2**29)
        prompt = random_ids(np.random.default_rng(2), shape.vocab_size, 128)
        tokens = 64 if quick else 256

        def run(count: int, engine: TokenEngine = engine, prompt: Sequence[int] = prompt) -> float:
            return statistics.median(seconds_of(lambda: engine.generate(prompt, count).wait(), 3))

        run(8)  # compiles
        per_token = (run(1 + tokens) - run(1)) / tokens
        embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size * 2
        read = engine.model.num_bytes - embedding - 4 * 2048 * shape.head_dim
        report(
            f"decode of one sequence, {name}",
            ms_per_token=per_token * 1e3,
            gb_per_token=read / 1e9,
            gb_s=read / per_token / 1e9,
            share_of_read_bandwidth=read / per_token / 1e9 / ceilings().read_gb_s,
        )
        engine.close()


def host(shape: ModelConfig, quick: bool) -> None:
    """What the host does for a step of 256 decoding sequences, the device's time apart; and such steps one behind the other, of which
    each is launched before the host has seen the last one's tokens."""
    engine = make_engine(shape, max_num_seqs=256, max_num_batched_tokens=8192, kv_cache_bytes=16 * 2**30)
    engine.loop.close()  # driven by hand here
    scheduler, runner = engine.scheduler, engine.runner
    rng = np.random.default_rng(3)
    for _ in range(256):
        ids = random_ids(rng, shape.vocab_size, 32)
        params = SamplingParams(max_tokens=1000, ignore_eos=True)
        scheduler.add_request(engine.request(RequestKind.GENERATE, [Segment(ids)], sampling=params))
    parts: dict[str, list[float]] = {"schedule": [], "launch": [], "wait": [], "update": []}
    gc.collect()
    gc.disable()
    for step in range(120 if quick else 300):
        marks = [time.perf_counter()]
        output = scheduler.schedule()
        marks.append(time.perf_counter())
        launched = runner.launch(output)
        marks.append(time.perf_counter())
        result = launched.result()
        marks.append(time.perf_counter())
        scheduler.update(output, result)
        marks.append(time.perf_counter())
        if step >= 20 and output.num_tokens == 256:
            for part, (start, end) in zip(parts, itertools.pairwise(marks), strict=True):
                parts[part].append((end - start) * 1e6)
    gc.enable()
    medians = {part: statistics.median(values) for part, values in parts.items()}
    report(
        "host at 256 sequences",
        **{f"{part}_us": value for part, value in medians.items()},
        host_us=medians["schedule"] + medians["launch"] + medians["update"],
    )
    engine.close()
    engine = make_engine(shape, max_num_seqs=256, max_num_batched_tokens=8192, kv_cache_bytes=16 * 2**30)

    def run(tokens: int) -> float:
        waiters = [engine.generate(random_ids(rng, shape.vocab_size, 32), tokens) for _ in range(256)]
        start = time.perf_counter()
        for waiter in waiters:
            waiter.wait()
        return time.perf_counter() - start

    run(8)
    steps = 64 if quick else 256
    step_us = (run(8 + steps) - run(8)) / steps * 1e6
    report(
        "256 sequences, steps launched ahead",
        step_us=step_us,
        by_hand_us=sum(medians.values()),
        times=sum(medians.values()) / step_us,
        tokens_s=256 / step_us * 1e6,
    )
    engine.close()


PARTS = ("check", "ranking", "fp8", "graphs", "mixed", "memory", "decode", "host")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the engine on a GPU.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b", help="of ranking, memory and host")
    args = parser.parse_args(arguments)
    require_gpu()
    ceilings()
    shape, failed = SHAPES[args.model], []
    work: dict[str, Callable[[], None]] = {
        "check": lambda: check(shape),
        "ranking": lambda: ranking(shape, args.quick),
        "fp8": lambda: fp8(shape, args.quick),
        "graphs": lambda: graphs(shape, args.quick),
        "mixed": lambda: mixed(shape, args.quick),
        "memory": lambda: memory(shape),
        "decode": lambda: decode(("qwen3-8b",) if args.quick else ("qwen3-8b", "llama-3.1-8b"), args.quick),
        "host": lambda: host(shape, args.quick),
    }
    for part in PARTS:
        if part in args.only:
            try:
                work[part]()
            except Exception as error:  # the other parts are still of use
                failed.append(part)
                print(f"{part} failed: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
                freed()
    print(environment()["device"])
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
