"""A model as one ONNX graph that gives label logits, and its use on ONNX Runtime: the portable baseline.

Knows the layers of a model and ONNX Runtime; does not know text, requests or the engine's own step.
"""

from __future__ import annotations

from uma_engine.onnx.export import export_onnx
from uma_engine.onnx.scorer import OnnxScorer

__all__ = ["OnnxScorer", "export_onnx"]
