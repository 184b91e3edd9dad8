"""Ranking: a request tree from job and candidates, a score from label logits, an order from scores.

Knows the rank prompt, truncation and order; does not know threads, files or how logits are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from uma_engine.catalog.chat_template import ChatTemplate, FieldPiece, split_template
from uma_engine.catalog.tokenizer import Tokenizer
from uma_engine.core import Candidate, Segment
from uma_engine.errors import InvalidRequest, TooLarge, UnsupportedModel
from uma_engine.tasks.results import Factor, RankResult, Score

__all__ = [
    "DEFAULT_INSTRUCTION",
    "RankPrompt",
    "as_candidates",
    "cut_prompt",
    "label_ids",
    "order",
    "rank_result",
    "shared_prefix",
    "softmax",
]

DEFAULT_INSTRUCTION = "You help a client to choose a freelancer. Decide whether the candidate fits the job post."
MAX_CANDIDATE_BYTES = 4 * 2**20  # of UTF-8 text: beyond this a candidate is an error, not a truncation

_PROMPT = "{instruction}\n\nJob post:\n{job}\n\nCandidate:\n{candidate}\n\n{question}"
_FIELDS = {
    "instruction": "\u27e6uma-instruction\u27e7",
    "job": "\u27e6uma-job\u27e7",
    "candidate": "\u27e6uma-candidate\u27e7",
}


def as_candidates(candidates: Iterable[Candidate | str]) -> list[Candidate]:
    """Strings become candidates with their position as id; duplicate ids and blank texts are refused."""
    if isinstance(candidates, str | bytes) or not isinstance(candidates, Iterable):
        raise InvalidRequest(
            f"`candidates` is a single `{type(candidates).__name__}`", hint="pass a list", param="candidates"
        )
    result: list[Candidate] = []
    seen: dict[str, int] = {}
    for index, item in enumerate(candidates):
        if isinstance(item, str):
            item = Candidate(str(index), item)
        elif not isinstance(item, Candidate):
            raise InvalidRequest(
                f"candidate {index} is a `{type(item).__name__}`",
                hint="pass strings or `Candidate`",
                param="candidates",
            )
        if item.id in seen:
            raise InvalidRequest(
                f"candidates {seen[item.id]} and {index} have the same id `{item.id}`",
                hint="ids must be unique in one call",
                param="candidates",
            )
        seen[item.id] = index
        if not item.text.strip():
            raise InvalidRequest(f"candidate `{item.id}` has a blank text", param="candidates")
        if len(item.text) > MAX_CANDIDATE_BYTES or len(item.text.encode("utf-8", "replace")) > MAX_CANDIDATE_BYTES:
            raise TooLarge(
                f"candidate `{item.id}` has a text of {len(item.text):,} characters but {MAX_CANDIDATE_BYTES:,} bytes are the most",
                hint="send the relevant part of the profile",
                param="candidates",
            )
        result.append(item)
    return result


def label_ids(tokenizer: Tokenizer, labels: Sequence[str]) -> tuple[int, ...]:
    """Token ids of the label words. Raises InvalidRequest unless there are at least two, distinct, each a single token."""
    if (
        isinstance(labels, str)
        or not isinstance(labels, Sequence)
        or len(labels) < 2
        or not all(isinstance(label, str) for label in labels)
    ):
        raise InvalidRequest(f"`labels` is `{labels!r}` but must be at least two words", param="labels")
    ids = []
    for label in labels:
        token = tokenizer.single_token(label)
        if token is None:
            pieces = len(tokenizer.encode(label))
            raise InvalidRequest(
                f"label `{label}` is {pieces} tokens but must be exactly one",
                hint="choose a shorter word; `uma doctor --label WORD` tells whether one fits",
                param="labels",
            )
        ids.append(token)
    if len(set(ids)) != len(ids):
        raise InvalidRequest(f"`labels` are `{list(labels)}` but must be distinct tokens", param="labels")
    return tuple(ids)


def softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Probabilities over the labels alone, in double precision and in the order given: the same bits on every machine."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def score_of(labels: Sequence[str], logits: Sequence[float]) -> Score:
    return Score(tuple(labels), tuple(logits), softmax(logits))


def rank_result(
    index: int, candidate: Candidate, labels: Sequence[str], logits: Sequence[float], truncated_tokens: int
) -> RankResult:
    """The score with its ledger: the probability of the first label, weight 1; and where there is a prior, what it adds to that."""
    read = softmax(logits)[0]
    ledger = [Factor(name=f"read:{labels[0]}", value=read, weight=1.0, contribution=read)]
    score = read
    if candidate.prior:
        added = softmax([logits[0] + candidate.prior, *logits[1:]])[0] - read
        score = min(1.0, max(0.0, read + added))
        ledger.append(Factor(name="prior", value=float(candidate.prior), weight=1.0, contribution=added))
    return RankResult(index, candidate.id, score, tuple(logits), truncated_tokens, tuple(ledger))


def order(results: Sequence[RankResult], top_n: int | None) -> tuple[RankResult, ...]:
    """Highest score first, ties by index, at most `top_n`."""
    ranked = sorted(results, key=lambda r: (-r.score, r.index))
    return tuple(ranked if top_n is None else ranked[:top_n])


def cut_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    question: str,
    fields: Mapping[str, str] | None = None,
    turns: Sequence[Mapping[str, str]] = (),
) -> list[list[int]]:
    """The rank prompt with `question` at its end, cut at instruction, job, candidate and then `fields`: one piece more than there
    are cuts. `turns` are further messages; fields, by name and placeholder in the order of the prompt, may stand in them.
    """
    content = _PROMPT.format(question=question, **_FIELDS)
    fields = _FIELDS | dict(fields or {})
    pieces = split_template(tokenizer, template, [{"role": "user", "content": content}, *turns], fields)
    # Instruction, job and candidate come in this order, with text between them; before and after there may be none.
    around: list[list[int]] = [[]]
    for piece in pieces:
        if isinstance(piece, FieldPiece):
            around.append([])
        else:
            around[-1] += piece.token_ids
    if [p.name for p in pieces if isinstance(p, FieldPiece)] != list(fields) or not around[-1]:
        raise UnsupportedModel("the model's chat template changes the order of the prompt's parts")
    return around


def shared_prefix(tails: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, at most one less than the shortest has."""
    columns = zip(*tails, strict=False)  # as many as the shortest has tokens
    common = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    return min(common, min(map(len, tails)) - 1)


@dataclass(frozen=True, slots=True)
class RankPrompt:
    """The rank prompt of one model as token ids: what surrounds instruction, job and candidate.

    A tree of three levels: instruction -> job -> candidate. The candidate's leaf ends in the template's own closing, so
    that its last token is the one the label follows.
    """

    head: list[int]
    after_instruction: list[int]
    after_job: list[int]
    after_candidate: list[int]

    @classmethod
    def build(cls, tokenizer: Tokenizer, template: ChatTemplate, question: str) -> RankPrompt:
        """`question` is part of the prompt's own text: what comes from outside must hold no control tokens."""
        return cls(*cut_prompt(tokenizer, template, question))

    def segments(
        self,
        instruction: list[int],
        job: list[int],
        candidates: Sequence[list[int]],
        max_candidate_tokens: int,
        shared: int | None = None,
    ) -> tuple[list[Segment], list[int]]:
        """The request tree, its scored leaves in the order of the candidates, and how many tokens were cut from each candidate.

        `shared`: a candidate is a segment of its own, with so many tokens of what follows it: something else will be read there.
        """
        tree = [Segment(self.head + instruction + self.after_instruction), Segment(job + self.after_job, parent=0)]
        truncated = []
        for tokens in candidates:
            truncated.append(max(0, len(tokens) - max_candidate_tokens))
            tokens, tail, parent = tokens[:max_candidate_tokens], self.after_candidate, 1
            if shared is not None:
                tree.append(Segment(tokens + tail[:shared], parent=1))
                tokens, tail, parent = [], tail[shared:], len(tree) - 1
            tree.append(Segment(tokens + tail, parent=parent, scored=True))
        return tree, truncated

    def room(self, instruction: list[int], job: list[int], max_model_len: int) -> int:
        """Tokens left for a candidate's own text on a path of `max_model_len`. Raises TooLarge when there is none."""
        used = len(self.head) + len(instruction) + len(self.after_instruction)
        used += len(job) + len(self.after_job) + len(self.after_candidate)
        if used >= max_model_len:
            raise TooLarge(
                f"instruction and job take {used} tokens but a path may hold {max_model_len}",
                hint="shorten the job post, or start the engine with a larger `max_model_len`",
                param="query",
            )
        return max_model_len - used
