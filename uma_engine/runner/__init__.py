"""Tensors of one step: from the scheduler's chunks to model inputs, and from hidden states to logits and tokens."""

from uma_engine.runner.device_runner import DeviceRunner
from uma_engine.runner.model_runner import ModelRunner

__all__ = ["DeviceRunner", "ModelRunner"]
