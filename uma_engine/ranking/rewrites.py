"""Rewrites of a job post that mean the same: order, form and words change, what is asked for does not.

Knows rules over text; does not know engines. Deterministic for a seed. Rules are cautious rather than rich: a sentence that points back
is not moved, and a synonym is one that ESCO gives as another label of the same thing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

__all__ = ["RULES", "Rewrite", "esco_synonyms", "rewrites"]

_BULLET = re.compile(r"^[ \t]*(?:[-*\u2022]|\d{1,2}[.)])[ \t]+(?=\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+(?=[A-Z])")
_POINTS_BACK = re.compile(
    r"(?:this|that|these|those|it|its|they|their|he|she|his|her|such|also|then|however|therefore|thus|but|and|so|both|here|there|"
    r"finally|in addition|at the same time|furthermore|moreover|instead|otherwise|as a result)\b",
    re.IGNORECASE,
)
Rule = Callable[[str, random.Random, Mapping[str, Sequence[str]]], str]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A text and the rules that made it."""

    text: str
    rules: tuple[str, ...]


@cache
def esco_synonyms() -> Mapping[str, tuple[str, ...]]:
    """For a term in lower case, other labels of the same ICT occupation or skill in ESCO."""
    data = json.loads((files("uma_engine.ranking") / "data" / "synonyms.json").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, ...]] = {}
    for group in data["groups"]:
        for term in group:
            found.setdefault(term.lower(), tuple(other for other in group if other != term))
    return found


def rewrites(text: str, n: int, *, seed: int = 0, synonyms: Mapping[str, Sequence[str]] | None = None) -> list[Rewrite]:
    """Up to `n` different rewrites: first each rule alone, then several at once. Fewer where the text gives no more."""
    words = esco_synonyms() if synonyms is None else {k.lower(): v for k, v in synonyms.items()}
    rng = random.Random(seed)
    found: list[Rewrite] = []
    seen = {text.strip()}
    names = list(RULES)
    plans: list[tuple[str, ...]] = [(name,) for name in names]
    plans += [tuple(sorted(rng.sample(names, rng.randint(2, 4)), key=names.index)) for _ in range(8 * n)]
    for plan in plans:
        if len(found) >= n:
            break
        changed, used = text.strip(), []
        for name in plan:
            after = RULES[name](changed, rng, words)
            if after != changed:
                changed = after
                used.append(name)
        if used and changed not in seen:
            seen.add(changed)
            found.append(Rewrite(changed, tuple(used)))
    return found


def _shuffle_bullets(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    def shuffle(lines: list[str]) -> list[str]:
        marks = [_BULLET.match(line) for line in lines]
        bodies = [line[m.end() :] for line, m in zip(lines, marks, strict=True) if m]
        rng.shuffle(bodies)
        return [m[0] + body for m, body in zip(marks, bodies, strict=True) if m]

    return _over_lists(text, shuffle)


def _bullets_to_prose(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    def join(lines: list[str]) -> list[str]:
        bodies = [_BULLET.sub("", line).strip().rstrip(".;,") for line in lines]
        return ["; ".join(bodies) + "."]

    return _over_lists(text, join)


def _over_lists(text: str, change: Callable[[list[str]], list[str]]) -> str:
    """Every run of two or more list items, changed. A run with items of several depths, or with lines that go on below an item,
    is left alone: what belongs to what would be lost.
    """
    result: list[str] = []
    run: list[str] = []

    def close() -> None:
        flat = all(_BULLET.match(line) and _indent(line) == _indent(run[0]) for line in run)
        result.extend(change(run) if len(run) > 1 and flat else run)
        run.clear()

    for line in text.split("\n"):
        if _BULLET.match(line) or (run and line[:1].isspace() and line.strip()):
            run.append(line)
        else:
            close()
            result.append(line)
    close()
    return "\n".join(result)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _shuffle_sentences(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    """Within paragraphs whose sentences stand for themselves."""

    def shuffle(sentences: list[str]) -> str | None:
        if any(_POINTS_BACK.match(sentence) for sentence in sentences):
            return None
        rng.shuffle(sentences)
        return " ".join(sentences)

    return _over_prose(text, shuffle)


def _prose_to_bullets(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    return _over_prose(text, lambda sentences: "\n".join(f"- {s}" for s in sentences))


def _over_prose(text: str, change: Callable[[list[str]], str | None]) -> str:
    """Every line of two sentences or more, changed: no heading, no list item, and nothing that leads to a list."""
    lines = text.split("\n")
    for place, line in enumerate(lines):
        sentences = _SENTENCE_END.split(line.strip())
        if len(sentences) > 1 and not line.startswith("#") and not _BULLET.match(line) and line.rstrip()[-1] in ".!?":
            changed = change(sentences)
            lines[place] = line if changed is None else changed
    return "\n".join(lines)


def _plain_headings(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    return re.sub(r"(?m)^#{1,6}[ \t]+(\S[^\n]*?)[ \t]*$", lambda m: m[1] if m[1].endswith(":") else f"{m[1]}:", text)


def _reorder_sections(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    """Sections under headings of the second level change places; what comes before the first stays."""
    parts = re.split(r"(?m)^(?=##[ \t])", text)
    if len(parts) < 3:
        return text
    sections = [p.strip() for p in parts[1:]]
    rng.shuffle(sections)
    return "\n\n".join([parts[0].strip(), *sections]).strip()


def _other_marks(text: str, rng: random.Random, _: Mapping[str, Sequence[str]]) -> str:
    """Another bullet and single line breaks: what a form does to a text."""
    return re.sub(r"\n{2,}", "\n", re.sub(r"(?m)^[ \t]*[-*][ \t]+", "\u2022 ", text))


def _synonyms(text: str, rng: random.Random, words: Mapping[str, Sequence[str]]) -> str:
    if not words:
        return text
    terms = sorted((t for t in words if words[t] and t in text.lower()), key=lambda t: (-len(t), t))
    if not terms:
        return text
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, terms))})(s?)(?![\w-])", re.IGNORECASE)
    chosen = {term: rng.choice(list(words[term])) for term in terms}  # the same word all through

    def other(match: re.Match[str]) -> str:
        by = chosen[match[1].lower()]
        by = by[0].upper() + by[1:] if match[1][0].isupper() else by
        return by + ("" if by.endswith("s") else match[2])

    return pattern.sub(other, text)


RULES: dict[str, Rule] = {
    "bullets shuffled": _shuffle_bullets,
    "sentences shuffled": _shuffle_sentences,
    "sections reordered": _reorder_sections,
    "synonyms": _synonyms,
    "bullets to prose": _bullets_to_prose,
    "prose to bullets": _prose_to_bullets,
    "plain headings": _plain_headings,
    "other marks": _other_marks,
}
