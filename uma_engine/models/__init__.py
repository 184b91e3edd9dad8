"""Decoder-only language models: one short file per architecture over the shared layers."""

from uma_engine.models.decoder import DecoderModel, WeightSource
from uma_engine.models.packed_cache import PackedCache
from uma_engine.models.registry import ARCHITECTURES, load_model

__all__ = ["ARCHITECTURES", "DecoderModel", "PackedCache", "WeightSource", "load_model"]
