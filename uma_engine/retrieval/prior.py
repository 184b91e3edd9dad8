"""What a first stage knows of a candidate, as log-odds: a `prior` that the language model's own reading is added to.

Knows cosines and BM25 scores; does not know models. The two slopes were fitted by softmax over the candidates of the training jobs of
`uma data build`, whose adapters were trained with them: a reader that was trained beside this prior learned what it does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from uma_engine.core import Candidate
from uma_engine.errors import InvalidRequest, MissingPackage

__all__ = ["log_odds", "with_priors"]

COSINE, WORDS, OFFSET = 13.0, 1.7, 6.3  # OFFSET makes the mean over those whom a first stage finds about 0


def log_odds(cosine: Any, words: Any) -> Any:
    """`cosine` of job and candidate by MiniLM, `words` the BM25 score over the best one's, from 0 to 1; numbers or arrays."""
    return COSINE * cosine + WORDS * words - OFFSET


def with_priors(job: str, candidates: Sequence[Candidate | str], embedder: Any = None) -> list[Candidate]:
    """The candidates with priors, where there is no index: BM25 among these alone, and `embedder` (None: MiniLM, opened for this call).

    Errors:  InvalidRequest for a blank job, MissingPackage without the extra `retrieval`
    """
    try:
        import bm25s
        import numpy as np

        from uma_engine.retrieval.embedder import Embedder
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[retrieval]'`"
        ) from None
    if not isinstance(job, str) or not job.strip():
        raise InvalidRequest("`job` is blank", param="job")
    people = [Candidate(str(i), c) if isinstance(c, str) else c for i, c in enumerate(candidates)]
    if not people:
        return []
    if embedder is None:
        with Embedder() as opened:
            return with_priors(job, people, opened)
    texts = [p.text for p in people]
    cosines = embedder.embed(texts).vectors @ embedder.embed([job]).vectors[0]
    words = np.zeros(len(people), np.float32)
    tokens = bm25s.tokenize([job], stopwords="en", show_progress=False, return_ids=False)[0]
    known = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    if tokens and known.vocab and any(known.ids):
        bm25 = bm25s.BM25(k1=0.9, b=0.4)
        bm25.index(known, show_progress=False)
        words = np.asarray(bm25.get_scores(tokens))
        words = words / max(float(words.max()), 1e-6)
    odds = log_odds(cosines, words)
    return [replace(p, prior=round(float(x), 4)) for p, x in zip(people, odds, strict=True)]
