"""Which requirements a job post states: sentences with the spans that people marked, as conversations to learn from and to measure on.

Knows SkillSpan's form (Zhang et al. 2022, arXiv 2204.12811; MIT), how a sentence becomes a question and lines become spans again; does not
know training or engines. Skills and knowledge are requirements alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uma_engine.errors import InvalidRequest
from uma_engine.train.chat import Chat
from uma_engine.train.groups import numbered_lines, share_of

__all__ = ["F1", "INSTRUCTION", "NONE", "Sentence", "f1", "find_spans", "question", "read_skillspan", "to_chats"]

INSTRUCTION = (
    "List the skills and the knowledge that this sentence of a job post asks for, word for word, one a line."
    " If there are none, say none."
)
NONE = "none"
NO_SPACE_BEFORE = frozenset(".,;:!?)]%'\"\u2019")  # how tokens become text again
NO_SPACE_AFTER = frozenset("([$€£#")
Span = tuple[int, int]  # of characters


@dataclass(frozen=True, slots=True)
class Sentence:
    """`post` keeps the sentences of one post together; `spans` in the order in which they begin, the longer first."""

    id: str
    post: str
    text: str
    spans: tuple[Span, ...]

    @property
    def requirements(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans]


def read_skillspan(path: str | Path) -> list[Sentence]:
    """The sentences of one of SkillSpan's files, one JSON object a line. Errors: InvalidRequest naming the line"""
    found: list[Sentence] = []
    split = Path(path).stem
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
            tokens: list[str] = row["tokens"]
            text, ends = _joined(tokens)
            spans = {span for tags in (row["tags_skill"], row["tags_knowledge"]) for span in _marked(tags, ends)}
            post = f"{split}-{row['source']}-{row['idx']}"
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidRequest(f"`{path}`, line {number}: {type(error).__name__}: {error}", param="data") from None
        ordered = tuple(sorted(spans, key=lambda s: (s[0], -s[1])))
        found.append(Sentence(f"{split}-{number}", post, text, ordered))
    return found


def _joined(tokens: Sequence[str]) -> tuple[str, list[Span]]:
    """The tokens as a sentence, and where each lies in it."""
    text, places = "", []
    for token in tokens:
        if text and not (set(token) <= NO_SPACE_BEFORE or text[-1] in NO_SPACE_AFTER):
            text += " "
        places.append((len(text), len(text) + len(token)))
        text += token
    return text, places


def _marked(tags: Sequence[str], places: Sequence[Span]) -> Iterable[Span]:
    """The spans of BIO tags."""
    start: int | None = None
    for index, tag in enumerate([*tags, "O"]):
        if start is not None and not tag.startswith("I"):
            yield places[start][0], places[index - 1][1]
            start = None
        if tag.startswith("B"):
            start = index
    if len(tags) != len(places):
        raise ValueError(f"{len(tags)} tags for {len(places)} tokens")


def question(text: str) -> str:
    """What a model is asked about one sentence."""
    return f"{INSTRUCTION}\n\n{text}"


def to_chats(sentences: Sequence[Sentence], empty_share: float = 1.0) -> list[Chat]:
    """Conversations to learn from; of sentences without a requirement only a share, always the same ones."""
    return [
        Chat(
            s.id,
            (
                {"role": "user", "content": question(s.text)},
                {"role": "assistant", "content": "\n".join(s.requirements) or NONE},
            ),
        )
        for s in sentences
        if s.text.strip() and (s.spans or share_of(s.id) < empty_share)
    ]


def find_spans(text: str, lines: Iterable[str]) -> tuple[set[Span], int]:
    """Where the lines of an answer stand in the sentence, whole words alone, and how many lines stand nowhere: those count for nothing."""
    spans: set[Span] = set()
    lost = 0
    for line in lines:
        wanted = line.strip().lstrip("-•* ").strip()
        if not wanted or wanted.lower() == NONE:
            continue
        places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)]
        free = [p for p in places if p not in spans]
        if free:
            spans.add(free[0])
        else:
            lost += not places
    return spans, lost


@dataclass(frozen=True, slots=True)
class F1:
    """Of spans that agree to the character, and of the words that they cover."""

    precision: float
    recall: float
    f1: float
    words_f1: float
    spans: int


def f1(found: Sequence[set[Span]], sentences: Sequence[Sentence]) -> F1:
    """Micro-averaged over all sentences."""
    hit = said = wanted = word_hit = word_said = word_wanted = 0
    for spans, sentence in zip(found, sentences, strict=True):
        gold = set(sentence.spans)
        hit, said, wanted = hit + len(spans & gold), said + len(spans), wanted + len(gold)
        ours, theirs = _words(sentence.text, spans), _words(sentence.text, gold)
        word_hit, word_said, word_wanted = (
            word_hit + len(ours & theirs),
            word_said + len(ours),
            word_wanted + len(theirs),
        )
    return F1(
        hit / max(1, said),
        hit / max(1, wanted),
        _mean(hit, said, wanted),
        _mean(word_hit, word_said, word_wanted),
        wanted,
    )


def _mean(hit: int, said: int, wanted: int) -> float:
    return 2 * hit / max(1, said + wanted)


def _words(text: str, spans: Iterable[Span]) -> set[Span]:
    covered = sorted(spans)
    return {m.span() for m in re.finditer(r"\w+", text) if any(a <= m.start() and m.end() <= b for a, b in covered)}
