"""What lies under `rank`: label probabilities without any template, and text, whole and in pieces.

python examples/score_and_generate.py [MODEL]
"""

import sys

from uma_engine import Engine, SamplingParams

with Engine(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m") as engine:
    for score in engine.score(
        "Is Rust a programming language? Answer yes or no.\n", ["Answer: ", "I say: "], labels=("yes", "no")
    ):
        print(f"{score.value:.3f}", score.logits)
    (done,) = engine.generate("A good job post says", SamplingParams(max_tokens=12, temperature=0))
    print(repr(done.text), done.finish_reason.value)
    with engine.stream("A good job post says", SamplingParams(max_tokens=12, temperature=0.8, seed=7)) as pieces:
        print("".join(piece.text for piece in pieces))
