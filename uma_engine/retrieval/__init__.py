"""The first stage of a search: texts as vectors, before any language model looks at them.

Knows texts and vectors; does not know requests, adapters or the engine.
"""

from __future__ import annotations

from uma_engine.retrieval.embedder import Embedder, Embeddings

__all__ = ["Embedder", "Embeddings"]
