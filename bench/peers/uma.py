"""This engine as a contestant, and (variant `onnx`) its exported graph on ONNX Runtime in this very environment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REQUIREMENTS: tuple[str, ...] = ()
BUILD: dict[str, str] = {}


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    if variant == "onnx":
        return start_graph(settings, w)
    from uma_engine import Engine, SamplingParams, __version__

    options: dict[str, Any] = {"num_threads": settings["threads"], "precision": variant, "enable_prefix_cache": False}
    engine = Engine(settings["model"], max_loras=len(settings["adapters"]), max_lora_rank=64, **options)
    tails = [c + w["suffix"] for c in w["candidates"]]
    labels = tuple(w["label_words"])
    names: list[str] = []

    def margins(scores: Any) -> list[float]:
        return [s.logits[0] - s.logits[1] for s in scores]

    def rank(n: int) -> list[float]:
        return margins(engine.score(w["prefix"], tails[:n], labels=labels))

    def rank_lora(n: int) -> list[float]:
        if not names:
            for i, path in enumerate(settings["adapters"]):
                engine.load_adapter(f"a{i}", path)
                names.append(f"a{i}")

        def part(i: int) -> list[float]:
            return margins(engine.score(w["prefix"], tails[i : n : len(names)], labels=labels, adapter=names[i]))

        with ThreadPoolExecutor(len(names)) as callers:  # four callers at once: their candidates share steps
            parts = list(callers.map(part, range(len(names))))
        return [parts[i % len(names)][i // len(names)] for i in range(n)]

    def prefill(n: int) -> list[float]:
        return margins(engine.score([], w["flat"][:n], labels=labels))

    def decode(batch: int) -> Callable[[int], None]:
        def run(steps: int) -> None:
            prompts = [row[:64] for row in w["flat"][:batch]]
            engine.generate(prompts, SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True))

        return run

    tasks = {"rank": rank, "rank_lora": rank_lora, "prefill": prefill, "decode_1": decode(1), "decode_16": decode(16)}
    return tasks, f"uma-engine {__version__} {engine.stack_info().backend}"


def start_graph(settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import onnxruntime

    from uma_engine.catalog import open_model
    from uma_engine.onnx import OnnxScorer, export_onnx

    graph = Path(settings["work"]) / "onnx"
    if not graph.exists():
        export_onnx(open_model(settings["gguf"]), graph)
    scorer = OnnxScorer(graph, num_threads=settings["threads"])
    tails = [c + w["suffix"] for c in w["candidates"]]

    def margins(prefix: list[int], items: list[list[int]]) -> list[float]:
        logits = scorer.score(prefix, items, (w["yes"], w["no"]))
        return (logits[:, 0] - logits[:, 1]).tolist()

    tasks = {"rank": lambda n: margins(w["prefix"], tails[:n]), "prefill": lambda n: margins([], w["flat"][:n])}
    return tasks, f"onnxruntime {onnxruntime.__version__}"
