"""Hugging Face transformers, fp32 or torch's dynamic int8; mixed adapters through PEFT.

The job's cache is computed once and copied into batches of candidates, which is this library's best form. Batches of 4
(16 with adapters) were the fastest on a 2-core machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2")
BUILD: dict[str, str] = {}


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(settings["hf"], dtype=torch.float32).eval()
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    names: list[str] = []
    if variant == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    if variant == "peft":
        import peft

        names = [f"a{i}" for i in range(len(settings["adapters"]))]
        model = peft.PeftModel.from_pretrained(model, settings["adapters"][0], adapter_name=names[0])
        for name, path in zip(names[1:], settings["adapters"][1:], strict=True):
            model.load_adapter(path, adapter_name=name)
        model.eval()
        version += f", peft {peft.__version__}"
    tails = [c + w["suffix"] for c in w["candidates"]]

    def adapters(rows: Iterable[int]) -> dict[str, Any]:
        return {"adapter_names": [names[i % len(names)] for i in rows]} if names else {}

    def margins(logits: Any) -> list[float]:
        return (logits[:, -1, w["yes"]] - logits[:, -1, w["no"]]).tolist()

    @torch.inference_mode()
    def rank(n: int, batch: int) -> list[float]:
        heads = range(max(1, len(names)))
        base = model(
            input_ids=torch.tensor([w["prefix"]] * len(heads)), use_cache=True, logits_to_keep=1, **adapters(heads)
        ).past_key_values
        scores: list[float] = []
        for first in range(0, n, batch):
            rows = range(first, min(n, first + batch))
            cache = copy.deepcopy(base)
            if names:
                cache.batch_select_indices(torch.tensor([i % len(names) for i in rows]))
            else:
                cache.batch_repeat_interleave(len(rows))
            ids = torch.tensor([tails[i] for i in rows])
            scores += margins(
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **adapters(rows)).logits
            )
        return scores

    @torch.inference_mode()
    def prefill(n: int) -> list[float]:
        scores: list[float] = []
        for first in range(0, n, 4):
            ids = torch.tensor(w["flat"][first : min(n, first + 4)])
            scores += margins(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits)
        return scores

    def decode(batch: int) -> Callable[[int], None]:
        @torch.inference_mode()
        def run(steps: int) -> None:
            ids = torch.tensor([row[:64] for row in w["flat"][:batch]])
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            for _ in range(steps - 1):
                ids = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)

        return run

    if variant == "peft":
        return {"rank_lora": lambda n: rank(n, 16)}, version
    return {
        "rank": lambda n: rank(n, 4),
        "prefill": prefill,
        "decode_1": decode(1),
        "decode_16": decode(16),
    }, version
