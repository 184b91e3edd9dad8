"""Jobs and candidates as token ids, exactly as the engine's own surface with one read asks about them.

Knows the rank prompt and where texts are cut; does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uma_engine.catalog.chat_template import ChatTemplate
from uma_engine.ranking.surface import question_of
from uma_engine.tasks import rank as ranking
from uma_engine.train.recipe import Recipe
from uma_engine.train.tree_forward import JobTree

__all__ = ["JobPrompts", "cut_job"]


def cut_job(tokenizer: Any, text: str, limit: int) -> str:
    """The job's text, cut to `limit` tokens where it is longer: what training saw is what is asked later."""
    ids = tokenizer.encode(text.strip())
    return text.strip() if len(ids) <= limit else tokenizer.decode(ids[:limit]).strip()


class JobPrompts:
    """Makes the tree of a job. `label_ids`: the two label words, right and wrong."""

    def __init__(self, files: Any, recipe: Recipe) -> None:
        self.tokenizer = files.tokenizer
        self._recipe = recipe
        template = ChatTemplate(files.chat_template, self.tokenizer)
        self._prompt = ranking.RankPrompt.build(self.tokenizer, template, question_of(recipe.probe, recipe.labels))
        self._instruction = self.tokenizer.encode((recipe.instruction or ranking.DEFAULT_INSTRUCTION).strip())
        self.label_ids = ranking.label_ids(self.tokenizer, recipe.labels)

    def tree(self, job: str, texts: Sequence[str]) -> JobTree:
        sampling, prompt = self._recipe.sampling, self._prompt
        job_ids = self.tokenizer.encode(cut_job(self.tokenizer, job, sampling.max_job_tokens))
        prefix = prompt.head + self._instruction + prompt.after_instruction + job_ids + prompt.after_job
        encoded = self.tokenizer.encode_batch([t.strip() for t in texts])
        return JobTree(prefix, [ids[: sampling.max_candidate_tokens] + prompt.after_candidate for ids in encoded])
