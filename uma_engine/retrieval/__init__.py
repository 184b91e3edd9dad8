"""The first stage of a search: texts as vectors and words, before any language model looks at them.

Knows texts, fields and vectors; does not know requests, adapters or the engine.
"""

from __future__ import annotations

from uma_engine.retrieval.embedder import Embedder, Embeddings
from uma_engine.retrieval.index import CandidateIndex, Cut, Found, Hit, IndexInfo

__all__ = ["CandidateIndex", "Cut", "Embedder", "Embeddings", "Found", "Hit", "IndexInfo"]
