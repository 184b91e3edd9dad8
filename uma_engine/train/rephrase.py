"""Posts said in other words by a model that cannot change what they ask for.

Every fact of a post (numbers with what they count, tools, sums) is put into the answer's grammar, in order, and nothing else of it may be
a digit: so a model, however small, neither loses a fact nor invents a number. What it may still do wrong is filtered afterwards: a post
that stayed as it was, one that names a tool of somebody else's, one that repeats itself, one that profiles share words with. Where a
filter rejects, the post stays as the template made it.

Knows posts of `synthetic` and what they are made of; does not know models: it is given an engine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from uma_engine.train.groups import Group
from uma_engine.train.synthetic import copies, word_overlap

__all__ = ["Rephrased", "facts_of", "rephrase", "schema_of"]

ASK = (
    "Rewrite this job post in other words, as a different client would write it. Keep what it asks for."
    " Answer with the new post alone.\n\n{post}"
)
NUMBER = re.compile(r"\d+(?: years| USD an hour| hours)?")
TOOLS = re.compile(r"You work with [^\n]+?\.(?= Our budget| We need| Kind regards|$)")
FREE = 140  # characters between two facts, at most
LEAST = 0.4  # of the post's length, and at most twice it
SAME = 0.6  # overlap of four words in a row with the template: nothing was rephrased
AT_ONCE = 16


class Writer(Protocol):
    """`Engine`, as far as it is needed."""

    def generate(self, prompts: Any, params: Any = None, *, chat: bool = False) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Rephrased:
    """`groups` in the order given, those in `kept` with another post; `rejected`: how often each filter spoke."""

    groups: tuple[Group, ...]
    kept: tuple[str, ...]
    rejected: dict[str, int]


def facts_of(post: str) -> list[str]:
    """What a post of `synthetic` says that must stay letter by letter, in order."""
    found = [(m.start(), m.group()) for m in NUMBER.finditer(post)]
    if match := TOOLS.search(post):
        start = match.start() + len("You work with ")
        inside = match.group()[len("You work with ") : -1]
        found = [(at, fact) for at, fact in found if not match.start() <= at < match.end()]
        for tool in inside.split(" and ", 1):
            found.append((start + inside.index(tool), tool))
    return [fact for _, fact in sorted(found)]


def schema_of(post: str) -> dict[str, Any]:
    """A JSON schema that accepts `{"post": ...}` with the facts of `post` in order and no other digit."""
    free = f'[^\\p{{N}}\\\\"\\n]{{0,{FREE}}}'
    pattern = free.join(("[A-Z]", *(f" {re.escape(fact)}[ .,;:!)]" for fact in facts_of(post)), "[.!]"))
    return {
        "type": "object",
        "properties": {"post": {"type": "string", "pattern": f"^{pattern}$"}},
        "required": ["post"],
        "additionalProperties": False,
    }


def _most_tokens(post: str) -> int:
    """Enough for the longest answer that the schema accepts, whatever a token spells."""
    facts = facts_of(post)
    return (FREE + 2) * (len(facts) + 1) + len("".join(facts).encode()) + len('{"post":""}') + 8


def rephrase(
    groups: Sequence[Group],
    engine: Writer,
    tools: Iterable[str] = (),
    *,
    temperature: float = 0.8,
    seed: int = 0,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Rephrased:
    """Ask `engine` for another wording of every post. A function of its arguments and the engine's stack.

    tools:  all names of tools there are: one that a post does not name is not to appear in its other wording
    say:    told after each batch how many of how many are done
    Errors: those of `Engine.generate`; MissingPackage without llguidance
    """
    from uma_engine import SamplingParams

    names = {tool.lower() for tool in tools}
    rejected: Counter[str] = Counter()
    made: list[Group] = []
    kept: list[str] = []
    for start in range(0, len(groups), AT_ONCE):
        part = groups[start : start + AT_ONCE]
        params = [
            SamplingParams(
                max_tokens=_most_tokens(g.job),
                temperature=temperature,
                seed=seed + start + i,
                json_schema=schema_of(g.job),
            )
            for i, g in enumerate(part)
        ]
        answers = engine.generate([ASK.format(post=g.job) for g in part], params, chat=True)
        for group, answer in zip(part, answers, strict=True):
            new = replace(group, job=json.loads(answer.text)["post"])
            reason = _wrong(group, new, names)
            if reason is not None:
                rejected[reason] += 1
            else:
                kept.append(group.id)
            made.append(group if reason is not None else new)
        say(len(made), len(groups))
    return Rephrased(tuple(made), tuple(kept), dict(rejected))


def _wrong(old: Group, new: Group, tools: set[str]) -> str | None:
    post, before = new.job, old.job.lower()
    if not LEAST * len(old.job) <= len(post) <= 2 * len(old.job):
        return "length"
    if word_overlap(old.job, post) >= SAME:
        return "the same words"
    words = post.lower().split()
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if fours and fours.most_common(1)[0][1] > 1:
        return "repeats itself"
    theirs = {" ".join(words[i : i + n]).strip(".,;:!") for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    if any(tool not in before for tool in theirs & tools):
        return "another tool"
    return "copied words" if copies(new) else None
