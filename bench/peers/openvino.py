"""OpenVINO's runtime on the stateful model that OpenVINO GenAI reads from a Q8_0 GGUF file.

The job's state is copied into batches of four candidates, and the graph is cut so that only the last position goes
through the head. GenAI's own pipeline cannot return a chosen token's logit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIREMENTS = ("openvino==2026.4.1", "openvino-genai==2026.4.1", "numpy")
BUILD: dict[str, str] = {}


def prepare(settings: dict[str, Any]) -> None:
    import openvino_genai

    out = Path(settings["work"]) / "q8_0"
    if (out / "openvino_model.xml").exists():
        return
    source = Path(settings["work"]).parents[1] / "llama_cpp" / settings["model"] / "q8_0.gguf"
    if not source.exists():
        raise RuntimeError(f"{source} is missing: run the peer `llama_cpp` first, whose tool writes it")
    out.mkdir(parents=True, exist_ok=True)
    copied = out / "model.gguf"
    shutil.copy(source, copied)
    openvino_genai.LLMPipeline(str(copied), "CPU", enable_save_ov_model=True)
    copied.unlink()


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import numpy as np
    import openvino as ov
    from openvino import opset13

    core = ov.Core()
    model = core.read_model(str(Path(settings["work"]) / variant / "openvino_model.xml"))
    logits = next(r for r in model.get_results() if "logits" in r.input_value(0).get_names())
    product = logits.input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last = [opset13.constant([value]) for value in (-1, 2**31 - 1, 1, 1)]
    product.input(0).replace_source_output(opset13.slice(product.input_value(0), *last).output(0))
    model.validate_nodes_and_infer_types()
    config = {"INFERENCE_NUM_THREADS": settings["threads"], "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", config)
    names = {i.get_any_name() for i in compiled.inputs}
    request = compiled.create_infer_request()

    def run(ids: Any, before: int = 0) -> Any:
        ids = np.asarray(ids, np.int64)
        batch, new = ids.shape
        feed = {"input_ids": ids, "attention_mask": np.ones((batch, before + new), np.int64)}
        if "position_ids" in names:
            feed["position_ids"] = np.tile(np.arange(before, before + new), (batch, 1))
        if "beam_idx" in names:
            feed["beam_idx"] = np.arange(batch, dtype=np.int32)
        request.infer(feed)
        return request.get_output_tensor(0).data[:, -1]

    def margins(rows: Any) -> list[float]:
        return (rows[:, w["yes"]] - rows[:, w["no"]]).tolist()

    def rank(n: int) -> list[float]:
        request.reset_state()
        run([w["prefix"]])
        saved = [np.array(state.state.data) for state in request.query_state()]
        scores: list[float] = []
        for first in range(0, n, 4):
            rows = [c + w["suffix"] for c in w["candidates"][first : min(n, first + 4)]]
            for state, values in zip(request.query_state(), saved, strict=True):
                state.state = ov.Tensor(np.repeat(values, len(rows), axis=0))
            scores += margins(run(rows, len(w["prefix"])))
        return scores

    def prefill(n: int) -> list[float]:
        scores: list[float] = []
        for first in range(0, n, 4):
            request.reset_state()
            scores += margins(run(w["flat"][first : min(n, first + 4)]))
        return scores

    def decode(batch: int) -> Callable[[int], None]:
        def steps(count: int) -> None:
            request.reset_state()
            rows = run([row[:64] for row in w["flat"][:batch]])
            for step in range(count - 1):
                rows = run(rows.argmax(-1)[:, None], 64 + step)

        return steps

    tasks = {"rank": rank, "prefill": prefill, "decode_1": decode(1), "decode_16": decode(16)}
    return tasks, f"openvino {ov.__version__}"
