"""The ranking workload: one job of 300 tokens, 64 candidates of 150, a closing of 10, labels ' Yes' and ' No'.

Knows how the token ids are made, always the same ones; does not know who runs them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

SKILLS = (
    "Python", "Rust", "Go", "Java", "Kubernetes", "PostgreSQL", "Kafka", "Spark", "Terraform", "React", "bookkeeping",
    "payroll", "nursing", "triage", "welding", "drafting", "logistics", "forklift", "negotiation", "copywriting",
    "Photoshop", "Salesforce", "SAP", "Tableau", "statistics", "PyTorch", "CUDA",
)  # fmt: skip
ROLES = (
    "backend engineer", "data scientist", "nurse", "accountant", "welder", "product manager", "site reliability engineer",
    "warehouse lead", "sales manager", "designer", "machine learning engineer", "teacher",
)  # fmt: skip
CITIES = ("Berlin", "Lagos", "Austin", "Pune", "Leeds", "Osaka", "Lima", "Oslo")
LABELS = (" Yes", " No")


class Encoder(Protocol):
    def encode(self, text: str, special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Workload:
    prefix: list[int]
    candidates: list[list[int]]
    suffix: list[int]
    labels: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{len(self.prefix)}+{len(self.candidates)}x{len(self.candidates[0]) + len(self.suffix)}"


def make_workload(
    tokenizer: Encoder, *, prefix: int = 300, candidates: int = 64, candidate: int = 150, suffix: int = 10
) -> Workload:
    """Token ids of exactly the given lengths; the same for every tokenizer that is the same."""
    rng = random.Random(7)

    def profile(i: int) -> str:
        text = f"Candidate {i}: {rng.choice(ROLES)} from {rng.choice(CITIES)}. "
        while len(text) < 10 * candidate:
            text += (
                f"Worked {rng.randint(1, 9)} years as a {rng.choice(ROLES)} in {rng.choice(CITIES)}, using {rng.choice(SKILLS)}, "
                f"{rng.choice(SKILLS)} and {rng.choice(SKILLS)}; led {rng.randint(1, 30)} people, cut costs by {rng.randint(2, 60)} %. "
            )
        return text

    job = "You judge whether a candidate fits a job. Answer Yes or No.\nJob post: We need a machine learning engineer in Berlin. "
    while len(job) < 10 * prefix:
        job += (
            f"You will build services with {rng.choice(SKILLS)} and {rng.choice(SKILLS)}, support the {rng.choice(ROLES)} team in "
            f"{rng.choice(CITIES)} and mentor {rng.randint(2, 9)} colleagues. "
        )
    closing = tokenizer.encode("\nDoes the candidate fit the job post? Answer with one word, Yes or No. The answer is")
    labels = [tokenizer.encode(label) for label in LABELS]
    if any(len(ids) != 1 for ids in labels) or len(closing) < suffix:
        raise ValueError("this tokenizer does not fit the workload")
    return Workload(
        prefix=tokenizer.encode(job)[:prefix],
        candidates=[tokenizer.encode(profile(i))[:candidate] for i in range(candidates)],
        suffix=closing[-suffix:],
        labels=(labels[0][0], labels[1][0]),
    )
