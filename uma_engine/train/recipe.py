"""The recipe: everything that decides what a training run makes, as a TOML file.

Knows names, defaults and limits; does not know tensors or files other than its own.

    name = "talent-match"
    base = "smollm2-135m"
    train = "train.jsonl"            # paths are relative to the recipe
    dev = "dev.jsonl"

    [lora]
    rank = 16
    [loss]
    listwise = 1.0
    [optimizer]
    learning_rate = 2e-4
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest
from uma_engine.ranking.surface import DEFAULT_PROBE

__all__ = ["Evaluation", "LoRA", "Loss", "Optimizer", "Recipe", "Sampling"]

TASKS = ("rank", "chat")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """Shape of the adapter. `layers`: how many of the last ones are adapted, None: all of them."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    layers: int | None = None


@dataclass(frozen=True)
class Loss:
    """Weights of the terms; see `losses`. `gain`: how a grade weighs, "exponential" 2^g - 1 as in nDCG, or "linear". `prior`: the share of
    a candidate's prior that is added to its margin before the loss sees it. The dev measure always adds all of it; with 0 the model learns
    to tell candidates apart by itself, which was better (LOG.md)."""

    pointwise: float = 0.2
    listwise: float = 1.0
    pairwise: float = 0.0
    temperature: float = 1.0
    gain: str = "exponential"
    prior: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and a cosine to a tenth. The gradients of `jobs_per_step` jobs, or turns of a chat, make one step."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    epochs: int = 1
    jobs_per_step: int = 4
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    max_steps: int | None = None


@dataclass(frozen=True)
class Sampling:
    """What a step sees: candidates of a job, drawn anew each epoch, the judged ones first."""

    candidates_per_job: int = 16
    max_candidate_tokens: int = 64
    max_job_tokens: int = 256
    max_chat_tokens: int = 512  # of a conversation; longer ones are left out
    chats_per_row: int = 8  # that are computed together


@dataclass(frozen=True)
class Evaluation:
    """nDCG@10 on `jobs` of the dev jobs, spread over them, every `every` steps, by the engine itself (of chats: the loss of a token, on
    `jobs` of the conversations); training stops after `patience` without a better one."""

    every: int = 100
    jobs: int | None = None
    candidates: int | None = None
    patience: int = 3


@dataclass(frozen=True)
class Recipe:
    """A training run. `task`: "rank" learns from judged jobs (`groups`), "chat" from conversations (`chat`). `precision`: "float32", or
    "bfloat16" for the matrix products of the forward and backward pass."""

    name: str
    base: str
    train: str
    dev: str
    task: str = "rank"
    instruction: str | None = None
    probe: str = DEFAULT_PROBE
    labels: tuple[str, ...] = ("yes", "no")
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    gradient_checkpointing: bool = False
    threads: int | None = None
    lora: LoRA = field(default_factory=LoRA)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    sources: tuple[str, ...] = ()  # of the data, with their licences, for the data card
    consent: str = "public data, no personal content"

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """From a TOML file. Errors: InvalidRequest naming the key"""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequest(f"`{path}` cannot be read: {error.strerror}", param="recipe") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"`{path}` is not TOML: {error}", param="recipe") from None
        recipe = _filled(cls, data, "")
        folder = Path(path).expanduser().absolute().parent
        return replace(recipe, train=str(folder / recipe.train), dev=str(folder / recipe.dev))

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, Any, bool, str], ...] = (
            ("name", self.name, bool(self.name.strip()) and "/" not in self.name, "a name without `/`"),
            ("task", self.task, self.task in TASKS, "rank or chat"),
            ("labels", self.labels, len(self.labels) == 2, "two words: right, wrong"),
            ("device", self.device, self.device in ("cpu", "cuda"), "cpu or cuda"),
            ("precision", self.precision, self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("lora.rank", self.lora.rank, 1 <= self.lora.rank <= 256, "from 1 to 256"),
            ("lora.targets", self.lora.targets, set() < set(self.lora.targets) <= set(TARGETS), f"some of {TARGETS}"),
            ("loss.gain", self.loss.gain, self.loss.gain in ("exponential", "linear"), "exponential or linear"),
            ("loss.prior", self.loss.prior, 0 <= self.loss.prior <= 1, "from 0 to 1"),
            ("loss.temperature", self.loss.temperature, self.loss.temperature > 0, "above 0"),
            ("loss", asdict(self.loss), max(self.loss.pointwise, self.loss.listwise, self.loss.pairwise) > 0, "at least one term above 0"),
            ("optimizer.learning_rate", self.optimizer.learning_rate, 0 < self.optimizer.learning_rate < 1, "between 0 and 1"),
            ("optimizer.warmup", self.optimizer.warmup, 0 <= self.optimizer.warmup < 1, "from 0 to below 1"),
            ("sampling.candidates_per_job", self.sampling.candidates_per_job, self.sampling.candidates_per_job >= 2, "at least 2"),
        )  # fmt: skip
        positive = {
            "optimizer.epochs": self.optimizer.epochs,
            "optimizer.jobs_per_step": self.optimizer.jobs_per_step,
            "sampling.max_candidate_tokens": self.sampling.max_candidate_tokens,
            "sampling.max_job_tokens": self.sampling.max_job_tokens,
            "sampling.max_chat_tokens": self.sampling.max_chat_tokens,
            "sampling.chats_per_row": self.sampling.chats_per_row,
            "evaluation.every": self.evaluation.every,
            "evaluation.patience": self.evaluation.patience,
        }
        checks += tuple((name, value, value >= 1, "at least 1") for name, value in positive.items())
        for name, value, good, rule in checks:
            if not good:
                raise InvalidRequest(f"the recipe's `{name}` is `{value}` but must be {rule}", param=name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        """Of all that decides the outcome but the data's own bytes; where files lie is not part of it."""
        data = self.to_dict() | {"train": Path(self.train).name, "dev": Path(self.dev).name, "threads": None}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _filled(kind: type, data: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain data, types checked. Errors: InvalidRequest naming the key"""
    known = {f.name: f for f in fields(kind)}
    for key in data:
        if key not in known:
            raise InvalidRequest(f"the recipe has an unknown key `{where}{key}`", hint=f"known are {', '.join(known)}")
    values = {}
    for name, f in known.items():
        if name not in data:
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = data[name]
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                raise InvalidRequest(f"the recipe's `{where}{name}` must be a table", param=name)
            values[name] = _filled(type(default), value, f"{where}{name}.")
        else:
            values[name] = _checked(f"{where}{name}", str(f.type), value)
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidRequest(f"the recipe lacks a key: {error}", param="recipe") from None


def _checked(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind.startswith("str"):
        if isinstance(value, str):
            return value
    elif kind.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise InvalidRequest(f"the recipe's `{name}` is `{value!r}` but must be a {kind}", param=name)
