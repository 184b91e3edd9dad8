"""More adapters than slots: time to the first score when everybody has a slot against half of them, and what a miss costs.

    python -m bench.adapters [--model smollm2-135m] [--adapters 16] [--slots 8] [--rank 16] [--requests 600] [--known 1000]

Requests ask for adapters at random (Zipf-like, exponent 1), one after the other, by turns at an engine whose slots hold all of them and at
one with `--slots`. Files are in the page cache. Goals: median at most 1.5x, misses within 30 ms at p99. `--known` names are registered in
all, and what that costs in memory is shown. Rows go to bench/results/adapters.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.rows import OthersShare, append_row, quantiles

JOB = "We need somebody who knows Rust and PostgreSQL."
PEOPLE = ["Ten years of Rust and Linux.", "A nurse in intensive care."]


def write_adapter(path: Path, engine: Any, rank: int, seed: int) -> None:
    """A PEFT directory with small random factors on every site, in 16 bits."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, (k, n) in engine._stack.model.sites().items():
        for part, shape in (("A", (rank, k)), ("B", (n, rank))):
            value = torch.randn(shape, generator=made) * (k**-0.5 if part == "A" else 1e-3)
            tensors[f"base_model.model.model.{site}.lora_{part}.weight"] = value.half()
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted({site.rpartition(".")[2] for site in engine._stack.model.sites()})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--known", type=int, default=1000)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    from uma_engine import Engine

    others = OthersShare()
    with tempfile.TemporaryDirectory() as home:
        names = [f"a{i}" for i in range(args.adapters)]
        options = {"max_lora_rank": args.rank, "enable_prefix_cache": False}
        with (
            Engine(args.model, max_loras=args.adapters, **options) as roomy,
            Engine(args.model, max_loras=args.slots, **options) as tight,
        ):
            for seed, name in enumerate(names):
                write_adapter(Path(home) / name, roomy, args.rank, seed)
                for engine in (roomy, tight):
                    engine.register_adapter(name, Path(home) / name)
            for name in names:  # memory has been touched, files are in the page cache
                roomy.prefetch_adapter(name)
                tight.prefetch_adapter(name)
            before = resident_bytes()
            for number in range(args.known - args.adapters):
                tight.register_adapter(f"known-{number}", Path(home) / names[number % len(names)])
            registered = resident_bytes() - before
            gc.collect()
            gc.freeze()  # as `uma serve` does
            rng = random.Random(7)
            weights = [1 / (1 + i) for i in range(len(names))]
            times: dict[str, list[float]] = {"roomy": [], "tight": []}
            misses: list[float] = []
            for _ in range(args.requests):
                (name,) = rng.choices(names, weights)
                for label, engine in (("roomy", roomy), ("tight", tight)):
                    cold = engine.is_cold(name)
                    began = time.perf_counter()
                    engine.prefetch_adapter(name)
                    if cold:
                        misses.append(time.perf_counter() - began)
                    engine.rank(JOB, PEOPLE, adapter=name)
                    times[label].append(time.perf_counter() - began)
            all_there, half_there = (quantiles(times[label])[1] for label in ("roomy", "tight"))
            misses.sort()
            row = {
                "bench": "adapters", "model": args.model, "adapters": args.adapters, "slots": args.slots, "rank": args.rank,
                "requests": args.requests, "miss_share": round(len(misses) / args.requests, 3),
                "all_resident_p50_ms": round(all_there * 1e3, 2), "p50_ms": round(half_there * 1e3, 2),
                "ratio": round(half_there / all_there, 3),
                "miss_p50_ms": round(quantiles(misses)[1] * 1e3, 2), "miss_p99_ms": round(misses[int(0.99 * len(misses))] * 1e3, 2),
                "known": len(tight.known_adapters()), "resident": tight.counters()["num_adapters"],
                "bytes_per_known": round(registered / max(1, args.known - args.adapters)), "others_share": others.read(),
            }  # fmt: skip
            print(json.dumps(row))
            if not args.no_save:
                append_row("adapters", row)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
