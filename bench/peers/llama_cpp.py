"""llama.cpp through the low-level calls of llama-cpp-python, built for this machine.

The job's cells are shared by the candidate's sequence (`llama_memory_seq_cp`, unified cache), one candidate a batch: the
fastest grouping found. Variants are formats of the same weights: Q4_1 is the file itself, the others are requantised from it by
llama.cpp's own tool, Q4_0 being the one with the fastest kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIREMENTS = ("llama-cpp-python==0.3.36",)
BUILD = {  # the server, tools and vision parts take long to compile and are not used
    "PIP_NO_BINARY": "llama-cpp-python",
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
    " -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF",
}
FORMATS = {"f32": 0, "q4_0": 2, "q8_0": 7}  # llama_ftype


def _library() -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    global _quiet  # the C side holds only a pointer
    _quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    return llama_cpp


def prepare(settings: dict[str, Any]) -> None:
    lib = _library()
    for name, ftype in FORMATS.items():
        target = Path(settings["work"]) / f"{name}.gguf"
        if not target.exists():
            params = lib.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize, params.nthread = ftype, True, settings["threads"]
            part = target.with_suffix(".part")
            if lib.llama_model_quantize(settings["gguf"].encode(), str(part).encode(), ctypes.byref(params)):
                raise RuntimeError(f"llama.cpp could not write {target}")
            part.rename(target)


class _Context:
    def __init__(self, lib: Any, model: Any, size: int, sequences: int, threads: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = size, 2048, 512, sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._lib = lib
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self.memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(2048, 0, 1)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[Any]:
        """Rows of (token, position, sequence, wants logits), at most 2048; the logits wanted, in order."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [
            np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i), shape=(self._vocabulary,))
            for i, row in enumerate(rows)
            if row[3]
        ]

    def feed(self, ids: list[int], start: int, sequence: int) -> Any:
        """Logits after the last of `ids`, put at positions `start`.. of a sequence."""
        return self.run([(t, start + i, sequence, i == len(ids) - 1) for i, t in enumerate(ids)])[0]


def start(variant: str, settings: dict[str, Any], w: dict[str, Any]) -> tuple[dict[str, Callable[[int], Any]], str]:
    import llama_cpp

    lib = _library()
    path = settings["gguf"] if variant == "file" else str(Path(settings["work"]) / f"{variant}.gguf")
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    tails = [c + w["suffix"] for c in w["candidates"]]
    longest = max(len(w["prefix"]) + max(map(len, tails)), *map(len, w["flat"]))
    one = _Context(lib, model, longest + 192, 2, settings["threads"])
    many = _Context(lib, model, 16 * 192, 16, settings["threads"])

    def margin(logits: Any) -> float:
        return float(logits[w["yes"]] - logits[w["no"]])

    def rank(n: int) -> list[float]:
        lib.llama_memory_clear(one.memory, True)
        one.feed(w["prefix"], 0, 0)
        scores = []
        for tail in tails[:n]:
            lib.llama_memory_seq_rm(one.memory, 1, -1, -1)
            lib.llama_memory_seq_cp(one.memory, 0, 1, -1, -1)
            scores.append(margin(one.feed(tail, len(w["prefix"]), 1)))
        return scores

    def prefill(n: int) -> list[float]:
        scores = []
        for row in w["flat"][:n]:
            lib.llama_memory_clear(one.memory, True)
            scores.append(margin(one.feed(row, 0, 0)))
        return scores

    def decode(context: _Context, batch: int) -> Callable[[int], None]:
        def run(steps: int) -> None:
            lib.llama_memory_clear(context.memory, True)
            rows = [(t, i, s, i == 63) for s in range(batch) for i, t in enumerate(w["flat"][s][:64])]
            tokens = [int(logits.argmax()) for logits in context.run(rows)]
            for step in range(steps - 1):
                logits = context.run([(t, 64 + step, s, True) for s, t in enumerate(tokens)])
                tokens = [int(row.argmax()) for row in logits]

        return run

    tasks = {"rank": rank, "prefill": prefill, "decode_1": decode(one, 1), "decode_16": decode(many, 16)}
    return tasks, f"llama.cpp through llama-cpp-python {llama_cpp.__version__}"
