"""Where models come from and how their files are read.

Knows names, sources, formats, tokenizers and templates; does not know layers, requests or devices.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uma_engine.catalog.cache import cache_dir
    from uma_engine.catalog.catalog import DEFAULT_ADAPTER, DEFAULT_MODEL, CatalogEntry, list_models, resolve
    from uma_engine.catalog.chat_template import ChatTemplate, FieldPiece, TextPiece, split_template
    from uma_engine.catalog.model_files import ModelFiles, expected_shapes, open_model
    from uma_engine.catalog.tokenizer import IncrementalDecoder, Tokenizer

__all__ = [
    "DEFAULT_ADAPTER",
    "DEFAULT_MODEL",
    "CatalogEntry",
    "ChatTemplate",
    "FieldPiece",
    "IncrementalDecoder",
    "ModelFiles",
    "TextPiece",
    "Tokenizer",
    "cache_dir",
    "expected_shapes",
    "list_models",
    "open_model",
    "resolve",
    "split_template",
]

_MODULE_OF = {
    "cache_dir": "cache",
    **dict.fromkeys(("DEFAULT_ADAPTER", "DEFAULT_MODEL", "CatalogEntry", "list_models", "resolve"), "catalog"),
    **dict.fromkeys(("ChatTemplate", "FieldPiece", "TextPiece", "split_template"), "chat_template"),
    **dict.fromkeys(("ModelFiles", "expected_shapes", "open_model"), "model_files"),
    **dict.fromkeys(("IncrementalDecoder", "Tokenizer"), "tokenizer"),
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `uma models` needs neither numpy nor the tokenizer library."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
