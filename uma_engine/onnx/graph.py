"""Writes an ONNX graph: nodes by the names of their outputs, small constants inside, weights in one file beside it.

Knows the form of ONNX; does not know models. The operators are those of opset 17, so that any runtime can take the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uma_engine._version import __version__
from uma_engine.onnx.session import require

__all__ = ["DATA", "GRAPH", "GraphWriter"]

GRAPH, DATA = "model.onnx", "model.onnx.data"
OPSET, IR_VERSION = 17, 8
ALIGNMENT = 4096  # of a weight in its file, so that a runtime can map it into memory


class GraphWriter:
    """Collects a graph whose weights go to disk as they come: no more than one of them is in memory."""

    def __init__(self, directory: Path) -> None:
        self._onnx = require("onnx", "onnx", "writing an ONNX graph")
        self._directory = directory
        self._data = (directory / DATA).open("wb")
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """An input of the graph; strings in `shape` name sizes that differ from run to run."""
        self._inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(self._value(name, dtype, shape))

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of one operator."""
        return self.nodes(op, 1, *inputs, **attributes)[0]

    def nodes(self, op: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """The `count` outputs of one operator."""
        name = f"{op}_{len(self._nodes)}"
        outputs = [name if count == 1 else f"{name}.{i}" for i in range(count)]
        self._nodes.append(self._onnx.helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def ints(self, *values: int) -> str:
        """A vector of int64."""
        return self._constant(np.array(values, np.int64))

    def number(self, value: float | int) -> str:
        """A scalar: fp32 of a float, int64 of an int."""
        return self._constant(np.array(value, np.float32 if isinstance(value, float) else np.int64))

    def weight(self, name: str, value: torch.Tensor) -> str:
        """A tensor of the model, in fp32, written to the file of weights."""
        array = value.detach().to("cpu", torch.float32).contiguous().numpy()
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        place = {"location": DATA, "offset": str(self._data.tell()), "length": str(array.nbytes)}
        tensor = self._onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=self._onnx.TensorProto.FLOAT,
            data_location=self._onnx.TensorProto.EXTERNAL,
        )
        for key, text in place.items():
            tensor.external_data.add(key=key, value=text)
        self._data.write(array.data)
        self._initializers.append(tensor)
        return name

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write what was collected; `metadata` travels in the graph's file."""
        helper = self._onnx.helper
        self._data.close()
        graph = helper.make_graph(self._nodes, "uma", self._inputs, self._outputs, self._initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name, model.producer_version = "uma-engine", __version__
        helper.set_model_props(model, dict(metadata))
        (self._directory / GRAPH).write_bytes(model.SerializeToString())

    def close(self) -> None:
        self._data.close()

    def _constant(self, array: np.ndarray) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return self._constants[key]

    def _value(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> Any:
        element = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, element, list(shape))
