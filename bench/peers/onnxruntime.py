"""ONNX Runtime on the graph that onnxruntime-genai's builder makes: fp32, and dynamic int8 of it.

Its GroupQueryAttention takes a past cache with more than one new token only at batch 1, so candidates go one by one behind
the job's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir",
    "onnxruntime==1.32.0",
    "onnxruntime-genai==0.18.0",
)
BUILD: dict[str, str] = {}


def prepare(settings: dict[str, Any]) -> None:
    work = Path(settings["work"])
    if not (work / "fp32/done").exists():
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            settings["hf"],
            "-o",
            str(work / "fp32"),
        ]
        command += ["-p", "fp32", "-e", "cpu", "-c", str(work / "cache"), "--extra_options", "prune_lm_head=true"]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        (work / "fp32/done").touch()
    if not (work / "int8/done").exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        (work / "int8").mkdir(exist_ok=True)
        quantize_dynamic(
            work / "fp32/model.onnx",
            work / "int8/model.onnx",
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            use_external_data_format=True,
        )
        (work / "int8/done").touch()


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import numpy as np
    import onnxruntime as ort

    work = Path(settings["work"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.log_severity_level = 3
    session = ort.InferenceSession(str(work / variant / "model.onnx"), options, providers=["CPUExecutionProvider"])
    inputs = {i.name for i in session.get_inputs()}
    past_names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    present_names = [name.replace("past_key_values", "present") for name in past_names]
    head = next(o.name for o in session.get_outputs() if not o.name.startswith("present"))
    decoder = json.loads((work / "fp32/genai_config.json").read_text())["model"]["decoder"]
    empty_shape = (decoder["num_key_value_heads"], 0, decoder["head_size"])

    def run(ids: Any, past: list[Any] | None = None, keep: bool = False) -> tuple[Any, list[Any]]:
        ids = np.asarray(ids, np.int64)
        batch, new = ids.shape
        before = 0 if past is None else past[0].shape[2]
        feed = {"input_ids": ids, "attention_mask": np.ones((batch, before + new), np.int64)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.tile(np.arange(before, before + new), (batch, 1))
        for i, name in enumerate(past_names):
            feed[name] = np.zeros((batch, *empty_shape), np.float32) if past is None else past[i]
        out = session.run([head, *present_names] if keep else [head], feed)
        return out[0][:, -1], out[1:]

    def margins(logits: Any) -> list[float]:
        return (logits[:, w["yes"]] - logits[:, w["no"]]).tolist()

    def rank(n: int) -> list[float]:
        _, past = run([w["prefix"]], keep=True)
        return [margins(run([c + w["suffix"]], past)[0])[0] for c in w["candidates"][:n]]

    def prefill(n: int) -> list[float]:
        return [m for first in range(0, n, 4) for m in margins(run(w["flat"][first : min(n, first + 4)])[0])]

    def decode(batch: int) -> Callable[[int], None]:
        def steps(count: int) -> None:
            logits, past = run([row[:64] for row in w["flat"][:batch]], keep=True)
            for _ in range(count - 1):
                logits, past = run(logits.argmax(-1)[:, None], past, keep=True)

        return steps

    tasks = {"rank": rank, "prefill": prefill, "decode_1": decode(1), "decode_16": decode(16)}
    return tasks, f"onnxruntime {ort.__version__}"
