"""What a run learns from, and by what it is judged on data that it does not learn from: judged jobs, or conversations.

Knows data files, losses of a step and the dev measure; does not know optimisers, checkpoints or the order of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from uma_engine.errors import InvalidRequest
from uma_engine.train.chat import ChatTurn, chat_losses, mean_loss, read_chats, turns_of
from uma_engine.train.groups import Group, read_groups, spread
from uma_engine.train.prompts import JobPrompts
from uma_engine.train.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Objective", "objective_of"]


class Objective(Protocol):
    """`examples`: what an epoch goes through. `measure`: the name of the dev measure, of which more is better if `higher`."""

    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def measure(self) -> str: ...
    @property
    def higher(self) -> bool: ...

    def card(self) -> dict[str, Any]:
        """What the data card says of the data's size."""
        ...

    def losses(self, model: Any, examples: Sequence[Any], seed: int) -> Iterator[tuple[str, Tensor]]:
        """The terms of a step's loss, each to be differentiated before the next is asked for, and whose they are."""
        ...

    def dev(self, model: Any, engine: Callable[[], Any]) -> float:
        """The dev measure. `engine()`: an engine that has the adapter as `current`, as it will be served."""
        ...


def objective_of(recipe: Recipe, files: Any) -> Objective:
    """Errors: InvalidRequest about the data"""
    return ChatObjective(recipe, files) if recipe.task == "chat" else RankObjective(recipe, files)


class RankObjective:
    """Judged jobs: order the candidates of each."""

    measure, higher = "nDCG@10", True

    def __init__(self, recipe: Recipe, files: Any) -> None:
        self._recipe = recipe
        self.examples = read_groups(recipe.train)
        self._dev = read_groups(recipe.dev)
        _refuse_overlap({g.id for g in self.examples}, {g.id for g in self._dev}, "job")
        if recipe.evaluation.jobs is not None:
            self._dev = spread(self._dev, recipe.evaluation.jobs)
        self.max_grade = max(c.grade for g in self.examples for c in g.candidates) or 1
        self.prompts = JobPrompts(files, recipe)

    def card(self) -> dict[str, Any]:
        return {
            "jobs": {"train": len(self.examples), "dev": len(self._dev)},
            "judged_candidates": sum(len(g.candidates) for g in self.examples),
        }

    def losses(self, model: Any, examples: Sequence[Group], seed: int) -> Iterator[tuple[str, Tensor]]:
        for group in examples:
            candidates = group.draw(self._recipe.sampling.candidates_per_job, seed)
            yield f"job `{group.id}`", self._loss(model, group, candidates) / len(examples)

    def _loss(self, model: Any, group: Group, candidates: Any) -> Tensor:
        import torch

        from uma_engine.train.losses import job_loss
        from uma_engine.train.tree_forward import label_logits

        recipe = self._recipe
        tree = self.prompts.tree(group.job, [c.text for c in candidates])
        with torch.autocast(recipe.device, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = label_logits(model, tree, self.prompts.label_ids)
        margins = logits[:, 0] - logits[:, 1]
        grades = torch.tensor([c.grade for c in candidates], device=margins.device)
        priors = torch.tensor([c.prior for c in candidates], device=margins.device)
        return job_loss(margins.float() + recipe.loss.prior * priors, grades, recipe.loss, self.max_grade)

    def dev(self, model: Any, engine: Callable[[], Any]) -> float:
        from uma_engine.train.evaluate import rank_groups

        recipe = self._recipe
        ranked = rank_groups(engine(), self._dev, recipe, adapter="current", candidates=recipe.evaluation.candidates)
        return sum(r.ndcg for r in ranked) / len(ranked)


class ChatObjective:
    """Conversations: say what the assistant said."""

    measure, higher = "loss of a token", False

    def __init__(self, recipe: Recipe, files: Any) -> None:
        self._recipe = recipe
        train, dev = read_chats(recipe.train), read_chats(recipe.dev)
        _refuse_overlap({c.id for c in train}, {c.id for c in dev}, "conversation")
        if recipe.evaluation.jobs is not None:
            dev = spread(dev, recipe.evaluation.jobs)
        self._counts = {"train": len(train), "dev": len(dev)}
        self.examples, self._left_out = turns_of(train, files, recipe)
        self._dev, _ = turns_of(dev, files, recipe)

    def card(self) -> dict[str, Any]:
        return {
            "conversations": self._counts,
            "turns_learned": len(self.examples),
            "turns_too_long": self._left_out,
            "tokens_learned": sum(len(t.answer) for t in self.examples),
        }

    def losses(self, model: Any, examples: Sequence[ChatTurn], seed: int) -> Iterator[tuple[str, Tensor]]:
        import torch

        recipe, tokens = self._recipe, sum(len(t.answer) for t in examples)
        rows = chat_losses(model, examples, recipe.sampling.chats_per_row)
        while True:
            with torch.autocast(recipe.device, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                row = next(rows, None)
            if row is None:
                return
            yield f"conversation `{examples[0].chat}` or one beside it", row[0] / tokens

    def dev(self, model: Any, engine: Callable[[], Any]) -> float:
        import torch

        with torch.autocast(self._recipe.device, dtype=torch.bfloat16, enabled=self._recipe.precision == "bfloat16"):
            return mean_loss(model, self._dev, self._recipe.sampling.chats_per_row)


def _refuse_overlap(train: set[str], dev: set[str], what: str) -> None:
    if both := train & dev:
        raise InvalidRequest(f"{what} `{min(both)}` is in the training and in the dev data", param="dev")


def data_names(recipe: Recipe) -> dict[str, str]:
    """File names without the places they lie in."""
    return {"train": Path(recipe.train).name, "dev": Path(recipe.dev).name}
