"""The tiny model of `bench/tiny_model.py`, under the name that tests know."""

from bench.tiny_model import make_tiny_adapter, make_tiny_model

__all__ = ["make_tiny_adapter", "make_tiny_model"]
