"""What a run leaves behind: the adapter in PEFT's format, and beside it the recipe, the data card, metrics and a picture.

    adapter_config.json  adapter_model.safetensors      what any PEFT reader loads
    recipe.json  data_card.json  metrics.jsonl  curves.svg

Knows files; does not know how the numbers came about. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adapter_digest", "curves_svg", "save_adapter", "write_json"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(model: Any, target: Path, base: str) -> str:
    """Write a peft model's adapter, its factors in 16 bits, and return its digest. `base` is written as the base's name."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in sorted(state.items())}
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    kept = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(config.target_modules),
        "inference_mode": True,
    }
    if config.layers_to_transform is not None:
        kept["layers_to_transform"] = list(config.layers_to_transform)
    write_json(target / CONFIG, kept)
    return adapter_digest(target)


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the bytes of configuration and weights: equal adapters, equal digests."""
    h = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(data, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    partial.replace(path)


def curves_svg(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Line charts under each other, one a curve of (step, value) points, each with its own scale."""
    width, height, left, top = 720, 170, 70, 40
    parts = [f'<text x="12" y="24" font-size="16" font-weight="600">{escape(title)}</text>']
    for place, (name, points) in enumerate(curves.items()):
        y0 = top + place * height
        parts.append(f'<text x="12" y="{y0 + 14}" font-size="12" font-weight="600">{escape(name)}</text>')
        if not points:
            continue
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        x_scale = (width - left - 20) / (max(xs) - min(xs) or 1)
        low, high, bottom = min(ys), max(ys), y0 + height - 30
        y_scale = (height - 60) / (high - low or 1)
        line = " ".join(f"{left + (x - min(xs)) * x_scale:.1f},{bottom - (y - low) * y_scale:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6f54" stroke-width="1.5"/>')
        for value, y in ((high, y0 + 34), (low, y0 + height - 26)):
            parts.append(f'<text x="{left - 6}" y="{y}" font-size="11" text-anchor="end">{value:.4g}</text>')
        for x, anchor, place_x in ((min(xs), "start", left), (max(xs), "end", width - 20)):
            parts.append(
                f'<text x="{place_x}" y="{y0 + height - 12}" font-size="11" text-anchor="{anchor}">step {x:g}</text>'
            )
    total = top + height * len(curves)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" viewBox="0 0 {width} {total}"'
        f' font-family="system-ui, sans-serif" fill="#20262c"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
