"""CTranslate2, int8 or float32: one generated token with its logits, the job as a static prompt cached in the generator.

The job stays cached from call to call, so its own 300 tokens are not in the timed work of this peer: a small favour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "ctranslate2==4.8.5", "tokenizers")
BUILD: dict[str, str] = {}


def prepare(settings: dict[str, Any]) -> None:
    from ctranslate2.converters import TransformersConverter

    out = Path(settings["work"]) / "model"
    if not (out / "model.bin").exists():
        TransformersConverter(settings["hf"], load_as_float16=False).convert(str(out), force=True)


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import ctranslate2
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(settings["hf"]) / "tokenizer.json"))
    generator = ctranslate2.Generator(
        str(Path(settings["work"]) / "model"), device="cpu", compute_type=variant, intra_threads=settings["threads"]
    )

    def pieces(ids: list[int]) -> list[str]:
        return [tokenizer.id_to_token(i) for i in ids]

    prefix = pieces(w["prefix"])
    tails = [pieces(c + w["suffix"]) for c in w["candidates"]]
    flat = [pieces(row) for row in w["flat"]]

    def margins(prompts: list[list[str]], batch: int, static: list[str] | None) -> list[float]:
        scores = []
        for first in range(0, len(prompts), batch):
            for result in generator.generate_batch(
                prompts[first : first + batch],
                max_length=1,
                sampling_topk=1,
                include_prompt_in_result=False,
                return_logits_vocab=True,
                static_prompt=static,
                cache_static_prompt=True,
            ):
                logits = np.asarray(result.logits[0][0]).reshape(-1)
                scores.append(float(logits[w["yes"]] - logits[w["no"]]))
        return scores

    def decode(batch: int) -> Callable[[int], None]:
        def run(steps: int) -> None:
            prompts = [row[:64] for row in flat[:batch]]
            generator.generate_batch(
                prompts, max_length=steps, min_length=steps, sampling_topk=1, include_prompt_in_result=False
            )

        return run

    tasks: dict[str, Callable[[int], Any]] = {
        "rank": lambda n: margins(tails[:n], 16, prefix),
        "prefill": lambda n: margins(flat[:n], 4, None),
        "decode_1": decode(1),
        "decode_16": decode(16),
    }
    return tasks, f"ctranslate2 {ctranslate2.__version__}"
