"""Strings that tokenizers get wrong: the corpus of the tokenizer tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

_CORPUS = json.loads((Path(__file__).parents[1] / "data" / "awkward_text.json").read_text("utf-8"))
AWKWARD: list[str] = _CORPUS["awkward"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts in which all alphabets meet, each of up to 60 pieces."""
    rng = random.Random(seed)

    def piece() -> str:
        return rng.choice(rng.choice(_CORPUS["alphabets"])) if rng.random() < 0.6 else rng.choice(_CORPUS["words"])

    return ["".join(piece() for _ in range(rng.randint(1, 60))) for _ in range(count)]
