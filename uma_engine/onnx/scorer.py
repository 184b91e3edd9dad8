"""Scores many items behind one prefix with an exported graph on ONNX Runtime, on the CPU or a CUDA device.

Knows the graph's inputs and outputs (uma_engine/onnx/export.py); does not know text, templates or adapters. The prefix runs
once; its keys and values stay on the device and serve all batches of items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uma_engine.errors import CorruptFile, InvalidRequest, ModelOverflow, TooLarge
from uma_engine.onnx.graph import GRAPH
from uma_engine.onnx.session import runtime_session

__all__ = ["OnnxScorer"]

FORMAT = "1"


class OnnxScorer:
    """A graph of `export_onnx`, ready to run. A call's batches hold at most `max_num_batched_tokens` tokens, filling included,
    but at least one item. Scores equal the engine's (`precision="exact"`) within REDUCTION; their bits may depend on the batch.

    Errors:  as `runtime_session`; CorruptFile when the graph is not one of `export_onnx`
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        max_num_batched_tokens: int = 1024,
    ) -> None:
        if max_num_batched_tokens < 1:
            raise InvalidRequest(f"`max_num_batched_tokens` is {max_num_batched_tokens} but must be at least 1")
        self.path = Path(directory).expanduser() / GRAPH
        self.device = device
        self.max_num_batched_tokens = max_num_batched_tokens
        self._session = runtime_session(self.path, extra="onnx", device=device, num_threads=num_threads)
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        if (found := self.metadata.get("uma.format")) != FORMAT:
            raise CorruptFile(
                f"`{self.path}` has the format `{found}` but `{FORMAT}` is read", hint="write it with `uma export`"
            )
        self.num_layers, heads, head_dim, self.vocab_size, self.max_model_len = (
            int(self.metadata[f"uma.{name}"])
            for name in ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "max_model_len")
        )
        kinds = [f"{kind}.{layer}" for layer in range(self.num_layers) for kind in ("key", "value")]
        self._past = [f"past_{kind}" for kind in kinds]
        self._present = [f"present_{kind}" for kind in kinds]
        self._nothing = np.zeros((1, heads, 0, head_dim), np.float32)

    def score(self, prefix: Sequence[int], items: Sequence[Sequence[int]], label_ids: Sequence[int]) -> np.ndarray:
        """Logits of the labels after prefix + item, for each item in input order: [N, L] fp32.

        Errors:  InvalidRequest for an empty item, no label or an id outside the vocabulary; TooLarge when prefix and item
                 together exceed the length that the graph was written for; ModelOverflow for logits that are not finite
        """
        ids = [np.asarray(item, np.int64) for item in items]
        self._check(np.asarray(prefix, np.int64), ids, np.asarray(label_ids, np.int64))
        logits = np.empty((len(ids), len(label_ids)), np.float32)
        if not ids:
            return logits
        labels = np.asarray(label_ids, np.int64)
        past = self._values([self._nothing] * len(self._past))
        if len(prefix):
            past = self._run([np.asarray(prefix, np.int64)], labels, past, self._present)
        for batch in self._batches([len(item) for item in ids]):
            (out,) = self._run([ids[i] for i in batch], labels, past, ["label_logits"])
            logits[batch] = out.numpy()
        if len(bad := np.flatnonzero(~np.isfinite(logits).all(axis=1))):
            raise ModelOverflow(
                f"the logits of item {bad[0]} are not finite", hint="the weights or the adapter are too large"
            )
        return logits

    def rank(
        self, prefix: Sequence[int], items: Sequence[Sequence[int]], label_ids: Sequence[int], top_n: int | None = None
    ) -> list[tuple[int, float]]:
        """(index, probability of the first label among the labels), the best first, ties by index. Errors as `score`"""
        logits = self.score(prefix, items, label_ids).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = weights[:, 0] / weights.sum(axis=1)
        order = np.argsort(-scores, kind="stable")[:top_n]
        return [(int(i), float(scores[i])) for i in order]

    def _check(self, prefix: np.ndarray, items: Sequence[np.ndarray], labels: np.ndarray) -> None:
        if not len(labels):
            raise InvalidRequest("`label_ids` is empty", param="label_ids")
        for name, ids in (("prefix", prefix), ("label_ids", labels), *((f"item {i}", x) for i, x in enumerate(items))):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise InvalidRequest(
                    f"{name} holds the token ids {ids.min()} to {ids.max()} but the vocabulary has {self.vocab_size}"
                )
        for i, item in enumerate(items):
            if not len(item):
                raise InvalidRequest(f"item {i} is empty", param="items")
            if (total := len(prefix) + len(item)) > self.max_model_len:
                raise TooLarge(
                    f"item {i} and the prefix have {total} tokens but the graph takes {self.max_model_len}",
                    hint=f"export it again with `--max-model-len {total}`, if the model takes as many",
                )

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of items in batches, neighbours in length together."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if batch and lengths[batch[0]] * (len(batch) + 1) > self.max_num_batched_tokens:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def _run(
        self, items: Sequence[np.ndarray], labels: np.ndarray, past: Sequence[Any], wanted: list[str]
    ) -> list[Any]:
        """One run: the outputs `wanted`, left on the device, logits excepted."""
        ids = np.zeros((len(items), max(map(len, items))), np.int64)
        for row, item in zip(ids, items, strict=True):
            row[: len(item)] = item
        last = np.array([len(item) - 1 for item in items], np.int64)
        binding = self._session.io_binding()
        for name, value in zip(("input_ids", "last", "label_ids"), self._values([ids, last, labels]), strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, "cpu" if name == "label_logits" else self.device)
        self._session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def _values(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(array, self.device, 0) for array in arrays]
