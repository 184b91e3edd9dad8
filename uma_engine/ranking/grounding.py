"""Is a sentence grounded in what it cites? Rules first, and rules only: what they do not understand is not said.

Knows words, numbers and cited sources; does not know models or who wrote the sentence. In strict mode the world is closed: a word
either stands in a cited source or in a short list of words that claim nothing by themselves. So a skill, a name or an employer that
nobody has heard of cannot slip through. What rules cannot see: words of one source put together in another way.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.resources import files

from uma_engine.ranking.assessment import Finding, Section, Source

__all__ = ["KNOWN_SKILLS", "PLAIN_WORDS", "check", "numbers_in", "words_in"]

MIDDLE = 0.5  # a factor from here on speaks for a candidate, below it against
SHORTEST, LONGEST = 8, 400  # characters of a sentence


def _tables() -> tuple[frozenset[str], frozenset[str]]:
    tables = json.loads((files("uma_engine.ranking") / "data" / "words.json").read_text(encoding="utf-8"))
    return frozenset(tables["plain"]), frozenset(tables["skills"])


# Words that say nothing about anybody: function words, and the frame in which an assessment speaks. And, for lenient mode, skills:
# they are claims although they are written small.
PLAIN_WORDS, KNOWN_SKILLS = _tables()
NEGATIONS = frozenset(
    (
        "no",
        "not",
        "never",
        "none",
        "without",
        "lack",
        "lacks",
        "lacking",
        "missing",
        "nor",
        "neither",
        "cannot",
        "absent",
    )
) | {"unknown", "n't"}
MONTHS = frozenset(
    (
        "january",
        "february",
        "march",
        "april",
        "may",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
    )
) | {"jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"}
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
NUMBER_WORDS = {word: Decimal(i) for i, word in enumerate(_UNITS.split())}
NUMBER_WORDS |= {
    w: Decimal(10 * i)
    for i, w in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
NUMBER_WORDS |= {
    w: Decimal(n)
    for w, n in (
        ("once", "1"), ("twice", "2"), ("double", "2"), ("triple", "3"), ("half", "0.5"), ("dozen", "12"), ("dozens", "12"),
        ("hundred", "100"), ("hundreds", "100"), ("thousand", "1000"), ("thousands", "1000"), ("million", "1000000"),
        ("millions", "1000000"), ("billion", "1000000000"), ("decade", "10"), ("decades", "10"),
        ("first", "1"), ("second", "2"), ("third", "3"), ("fourth", "4"), ("fifth", "5"), ("tenth", "10"),
    )
}  # fmt: skip

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:\.[^\W\d_][^\W_]*)*[+#]*")
_CONTRACTION = re.compile(r"(?i)n['\u2019]t\b")
_APPENDED = re.compile(r"(?i)['\u2019](?:s|re|ve|ll|d|m)\b")  # of somebody, or a verb cut short
_PUNCTUATION = frozenset(
    " .,;:!?'\"()[]{}/&%+-*#@_=<>|$~`^\\\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u20ac\u00a3\u2022"
)
_SUFFIXES = ("'s", "ing", "ed", "es", "s", "d")


def check(
    text: str, section: Section, cites: Sequence[Source], candidate_text: str, *, strict: bool = True
) -> tuple[Finding, ...]:
    """What is not grounded in a sentence of `section` that cites `cites`; empty when all is.

    Semantics:  every number, number word, date, capitalised word and known skill stands in a cited source; so does, in strict mode,
                every other word but `PLAIN_WORDS`; and something of what is cited is said. A strength is grounded in the candidate's
                own text or in a factor that speaks for them, and denies nothing that the text does not; a gap rests on a factor that
                speaks against them or on the texts, and does not deny what the candidate's text holds. `candidate_text` is the text
                as reads have seen it
    """
    text = unicodedata.normalize("NFKC", text)
    found = [*_form(text, section, cites)]
    if not cites:
        return (*found, Finding("source", "nothing is cited"))
    grounds = [c for c in cites if c.kind != "job"] if section == "strengths" else list(cites)
    said = [unicodedata.normalize("NFKC", c.text) for c in grounds]
    found += _numbers(text, said)
    found += _words(text, said, strict)
    if not _says_something(text, grounds, said):
        found.append(Finding("form", "says nothing"))
    found += _side(section, cites)
    found += _polarity(text, section, cites, candidate_text)
    return tuple(dict.fromkeys(found))


def words_in(text: str) -> list[str]:
    """The words of a text, small: `c++`, `node.js` and `c#` are words, and `c` is another one."""
    return [m[0].casefold() for m in _WORD.finditer(unicodedata.normalize("NFKC", text))]


def numbers_in(text: str) -> list[Decimal]:
    """Every number of a text, in digits or in words, in order."""
    text = unicodedata.normalize("NFKC", text)
    found = [(m.start(), _value(m[0])) for m in _NUMBER.finditer(text)]
    for match in _WORD.finditer(text):
        word = match[0].casefold()
        if word in NUMBER_WORDS:
            found.append((match.start(), NUMBER_WORDS[word]))
    return [value for _, value in sorted(found)]


def _value(digits: str) -> Decimal:
    """1,000 and 1000 are one number, and so are 3.50 and 3.5."""
    plain = digits
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        plain = digits.replace(",", "")
    elif digits.count(",") == 1 and "." not in digits:
        plain = digits.replace(",", ".")
    try:
        return Decimal(plain).normalize()
    except InvalidOperation:  # 1.2.3: a version, compared by its parts
        return Decimal("".join(c for c in digits if c.isdigit()) or "0") + Decimal("0.000000001")


def _form(text: str, section: Section, cites: Sequence[Source]) -> Iterable[Finding]:
    stripped = text.rstrip("\"')] ")
    if not SHORTEST <= len(text) <= LONGEST:
        yield Finding("form", f"{len(text)} characters")
    if not stripped.endswith("?" if section == "questions" else (".", "!", "\u3002")):
        yield Finding("form", "no end")
    if section != "questions" and "?" in text:
        yield Finding("form", "a question")
    cited = {c for s in cites for c in unicodedata.normalize("NFKC", s.text)}
    odd = [c for c in text if not (c.isalnum() or c in _PUNCTUATION or c in cited)]
    if odd or any(unicodedata.category(c)[0] == "C" for c in text):
        yield Finding("form", "characters " + " ".join(f"U+{ord(c):04X}" for c in odd[:4]))


def _numbers(text: str, said: Sequence[str]) -> Iterable[Finding]:
    known = {value for source in said for value in numbers_in(source)}
    for match in _NUMBER.finditer(text):
        if _value(match[0]) not in known:
            yield Finding("number", match[0])
    for match in _WORD.finditer(text):
        value = NUMBER_WORDS.get(match[0].casefold())
        if value is not None and value not in known:
            yield Finding("number", match[0])
    for char in text:  # digits that no pattern took: superscripts, numerals of other scripts
        if char.isnumeric() and not char.isdecimal() and not any(char in source for source in said):
            yield Finding("number", char)


def _words(text: str, said: Sequence[str], strict: bool) -> Iterable[Finding]:
    exact = {word for source in said for word in words_in(source)}
    stems = {_stem(word) for word in exact}
    whole = _APPENDED.sub("", _CONTRACTION.sub("", text))
    for match in _WORD.finditer(whole):
        word = match[0]
        small = word.casefold()
        if small in NUMBER_WORDS or word.isdecimal():
            continue  # judged as numbers
        begins = not whole[: match.start()].strip(" \"'([")
        is_name = word != word.lower() and not (begins and word[1:] == word[1:].lower())
        if small in exact or _singular(small) in exact or small + "s" in exact:
            continue
        if is_name or small in MONTHS - {"may", "march"} or any(c.isdigit() or c in "+#." for c in small):
            yield Finding("date" if small in MONTHS else "name", word)
        elif small in KNOWN_SKILLS:
            yield Finding("skill", word)
        elif begins and word[0].isupper() and small not in PLAIN_WORDS and _stem(small) not in stems:
            yield Finding("name", word)
        elif strict and small not in PLAIN_WORDS and _stem(small) not in stems:
            yield Finding("word", word)


def _says_something(text: str, grounds: Sequence[Source], said: Sequence[str]) -> bool:
    """Whether a word of substance, a number or a factor by its name comes from what is cited."""
    words = set(words_in(text))
    known = {word for source in said for word in words_in(source)}
    stems = {_stem(word) for word in known}
    if any(w not in PLAIN_WORDS and len(w) > 1 and (w in known or _stem(w) in stems) for w in words):
        return True
    if set(numbers_in(text)) & {value for source in said for value in numbers_in(source)}:
        return True
    names = [set(words_in(g.text.partition(" (")[0])) for g in grounds if g.kind == "factor"]
    return any(name and name <= words for name in names)


def _side(section: Section, cites: Sequence[Source]) -> Iterable[Finding]:
    """A factor is cited for what it says."""
    if section == "strengths" and all(c.kind == "job" for c in cites):
        yield Finding("source", "a strength cites the job alone")
    for cite in cites:
        if cite.kind != "factor":
            continue
        if section == "strengths" and (cite.value is None or cite.value < MIDDLE):
            yield Finding("source", f"factor {cite.name} is no strength")
        if section == "gaps" and cite.value is not None and cite.value >= MIDDLE:
            yield Finding("source", f"factor {cite.name} is no gap")


def _polarity(text: str, section: Section, cites: Sequence[Source], candidate_text: str) -> Iterable[Finding]:
    denies = bool(_negations(text))
    own = [c for c in cites if c.kind == "candidate"]
    if section == "strengths" and own:
        if denies != any(_negations(c.text) for c in own):
            yield Finding("denial", "the cited text says the opposite, or may")
    elif section == "strengths" and denies:
        yield Finding("denial", "a strength that denies")
    if section == "gaps" and denies:
        beside = {w for c in cites if c.kind != "job" for w in words_in(c.text)}
        theirs = {_stem(w) for w in words_in(candidate_text)}
        for word in words_in(_CONTRACTION.sub("", text)):
            if word not in PLAIN_WORDS and word not in NUMBER_WORDS and word not in beside and _stem(word) in theirs:
                yield Finding("denial", word)


def _negations(text: str) -> list[str]:
    found = [word for word in words_in(_CONTRACTION.sub(" ", text)) if word in NEGATIONS]
    return found + ["n't"] * len(_CONTRACTION.findall(text))


@cache
def _stem(word: str) -> str:
    """A word without its ending, where at least four letters are left: `databases` and `database`, `designed` and `design`."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4 and word.isalpha():
            word = word.removesuffix(suffix)
            break
    if len(word) >= 5 and word.endswith("e"):
        word = word[:-1]
    if len(word) >= 5 and word[-1] == word[-2]:
        word = word[:-1]
    return word


def _singular(word: str) -> str:
    return word.removesuffix("'s").removesuffix("s")
