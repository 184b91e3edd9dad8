"""Decoder-only language models: one short file per architecture over the shared layers."""

from uma_engine.models.decoder import DecoderModel, WeightSource
from uma_engine.models.registry import ARCHITECTURES, load_model

__all__ = ["ARCHITECTURES", "DecoderModel", "WeightSource", "load_model"]
