"""Takes out of a text what must not decide: who somebody is, not what they can do.

Knows patterns, the name a candidate goes by, and tables of frequent names; does not know models or scores. Deterministic: the same
text and names give the same bytes. It is a list of rules and not a reader: a name that is neither given nor introduced nor frequent
stays, and so does what only a reader would understand. Further finders (a named-entity model, say) plug in as functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise

from uma_engine.errors import SurfaceError

__all__ = ["KINDS", "Finder", "Redaction", "check_kinds", "redact"]

KINDS = ("name", "pronoun", "email", "phone", "link", "photo", "age", "school")


@dataclass(frozen=True, slots=True, order=True)
class Redaction:
    """Characters [start, end) of the candidate's text were replaced by `[kind]`."""

    start: int
    end: int
    kind: str


Finder = Callable[[str], Iterable[Redaction]]

_APOSTROPHES = "'\u2019"
_CAP = rf"(?<!\w)[A-ZÀ-ÖØ-Þ](?:\.|[\w{_APOSTROPHES}-]{{0,40}})"
_NAME = rf"{_CAP}(?:[ \t]+{_CAP}){{0,3}}"
_YEAR = r"(?:19|20)\d\d"
_SITES = "linkedin|github|gitlab|bitbucket|twitter|facebook|instagram|behance|dribbble|medium|stackoverflow|xing|tiktok|youtube"
_IMAGE = r"(?:jpe?g|png|gif|webp|heic|bmp)"

# What each kind looks like. A group `x`, where there is one, is what goes; else the whole match. Every repetition is bounded or runs
# over a class that its follower does not start with: no text makes these slow.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "photo": (
        r"!\[[^\]\n]{0,300}\]\([^)\s]{1,2000}\)",
        r"(?i:<img\b[^>]{0,2000}>)",
        r"(?i:data:image/[\w.+-]{1,40};base64,[A-Za-z0-9+/=]+)",
        rf"(?i:(?<!\S)[^\s()\[\]<>\"']{{1,300}}\.{_IMAGE}\b)",
        r"(?im:^[ \t]*(?:profile )?(?:photo|picture|headshot|avatar)[ \t]*:[ \t]*(?P<x>\S[^\n]{0,200})$)",
    ),
    "email": (
        r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}",
        r"(?i:(?<![\w.+-])[\w.+-]{1,64}[ \t]?[\[(][ \t]?at[ \t]?[\])][ \t]?[\w-]{1,63}"
        r"(?:[ \t]?(?:\.|[\[(][ \t]?dot[ \t]?[\])])[ \t]?[\w-]{2,63}){1,4})",
    ),
    "link": (
        r"(?i:\b(?:https?|ftp)://[^\s<>()\[\]]{1,2000}|\bmailto:[^\s<>()]{1,300})",
        r"(?i:(?<![\w.@])www\.[^\s<>()\[\]]{1,500})",
        rf"(?i:(?<![\w.@])(?:[\w-]{{1,63}}\.)?(?:{_SITES})\.(?:com|org|net|io)(?:/[^\s<>()\[\]]{{0,500}})?)",
        r"(?i:\b(?:skype|telegram|whatsapp|twitter|instagram|github|linkedin|handle)[ \t]{0,3}(?:id)?:[ \t]{0,3}(?P<x>@?[\w.-]{2,60}))",
    ),
    "phone": (r"(?<![\w.,])(?P<x>\+?\(?\d(?:[ \t().\-/]{0,3}\d){6,16})(?![\w])",),
    "pronoun": (
        r"(?i:\b(?:she|he|they|ze|xe)[ \t]?/[ \t]?(?:her|hers|him|his|them|theirs|they|zir|xem)"
        r"(?:[ \t]?/[ \t]?(?:hers?|his|theirs|zirs|xyrs))?\b)",
        r"(?i:\b(?:he|him|his|himself|she|her|hers|herself)\b)",
        r"(?i:\b(?:(?:fe)?male|(?:wo)?man|wife|husband|(?:grand)?(?:mother|father)|mom|mum|dad|lady|gentleman)\b(?!-))",
        r"(?im:^[ \t]*(?:gender|sex|pronouns?)[ \t]*:[ \t]*(?P<x>\S[^\n]{0,60})$)",
    ),
    "age": (
        r"(?i:\b(?:aged?|age:)[ \t]{0,3}\d{2}\b)",
        r"(?i:\b\d{2}[ -]years?[ -](?:old|young)\b)",
        rf"(?i:\bborn[ \t]+(?:(?:in|on)[ \t]+)?[^\n.;]{{0,40}}?{_YEAR}\b)",
        r"(?i:\b(?:date of birth|d\.?o\.?b\.?|birth ?(?:date|day))[ \t]{0,3}:?[ \t]{0,3}[^\n;|]{1,40})",
        rf"(?i:\bclass of[ \t]+(?:{_YEAR}|[{_APOSTROPHES}]\d\d)\b)",
        rf"(?i:\b(?:graduat(?:ed|ion)|alumn(?:us|a|i)|degree|diploma|ph\.?d|m\.?b\.?a|(?:b|m)\.?(?:sc?|a|eng|tech))\b"
        rf"[^\n;|]{{0,60}}?\b(?P<x>{_YEAR})\b)",
        r"(?i:\b(?:digital native|recent graduate|(?:fresh|new) graduate|retiree|retired)\b)",
        r"(?i:\bin my (?:twenties|thirties|forties|fifties|sixties)\b)",
    ),
    "school": (
        rf"(?:{_CAP}[ \t]+(?:(?:&|and|of|the|State)[ \t]+)?){{1,4}}(?:University|College|Institute|Polytechnic|Academy)\b"
        rf"(?:[ \t]+of(?:[ \t]+the)?[ \t]+{_NAME})?",
        rf"\b(?:University|College|Institute|Polytechnic|Academy|Universit(?:é|ät|à|at))"
        rf"(?:[ \t]+(?:of|de|di|des)(?:[ \t]+the)?)?[ \t]+{_NAME}",
        rf"\bSchool of[ \t]+{_NAME}",
        r"\b(?:MIT|UCLA|UCSD|NYU|LSE|UCL|Caltech|ETH Zürich|ETH Zurich|EPFL)\b",
    ),
    "name": (
        rf"(?i:\bmy name is|\bname[ \t]?:|\bi am called|\bcall me|\b(?:kind |best )?regards,|\bsincerely,)\s{{1,3}}(?P<x>{_NAME})",
        rf"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Madam)\b\.?[ \t]+{_NAME}",
    ),
}  # fmt: skip
_RULES = {kind: tuple(re.compile(p) for p in patterns) for kind, patterns in _PATTERNS.items()}
_CAP_WORDS = re.compile(rf"{_CAP}(?:[ \t]+{_CAP})*")
_INTRODUCED = re.compile(
    rf"\b(?:I[{_APOSTROPHES}]m|I am|[Tt]his is|[Mm]eet|[Hh]ire|[Cc]ontact|[Aa]sk for)[ \t]+(?P<x>{_CAP}(?:[ \t]+{_CAP}){{0,3}})"
)
_YEARS_ONLY = re.compile(rf"\(?{_YEAR}(?:\D{{1,3}}{_YEAR})*\)?")
_GAP = re.compile(r"[ \t]*")


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds in their usual order. Errors: SurfaceError for one that is not known"""
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise SurfaceError(f"`redact` holds `{kind}`", hint="the kinds are " + ", ".join(f"`{k}`" for k in KINDS))
    return tuple(kind for kind in KINDS if kind in kinds)


def redact(
    text: str, kinds: Collection[str] = KINDS, names: Sequence[str] = (), finders: Sequence[Finder] = ()
) -> tuple[str, tuple[Redaction, ...]]:
    """The text with placeholders such as `[name]`, and what they stand for as spans of the text given.

    Semantics:  `names` are names that the candidate is known by: they go wherever they stand, whole or in words. Spans
                that overlap become one, of the kind that begins first (the longer one where both begin at once), and so do
                spans of one kind with nothing but blanks between them: how many words a name has does not show.
    """
    spans = sorted(_found(text, kinds, names, finders), key=lambda s: (s.start, -s.end))
    merged: list[Redaction] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and span.start < last.end:
            merged[-1] = Redaction(last.start, max(last.end, span.end), last.kind)
        elif last is not None and last.kind == span.kind and _GAP.fullmatch(text, last.end, span.start):
            merged[-1] = Redaction(last.start, span.end, last.kind)
        else:
            merged.append(span)
    pieces, position = [], 0
    for span in merged:
        pieces += [text[position : span.start], f"[{span.kind}]"]
        position = span.end
    return "".join(pieces) + text[position:], tuple(merged)


def _found(text: str, kinds: Collection[str], names: Sequence[str], finders: Sequence[Finder]) -> Iterator[Redaction]:
    for kind in kinds:
        for rule in _RULES[kind]:
            for match in rule.finditer(text):
                start, end = match.span("x") if "x" in rule.groupindex else match.span()
                if kind == "phone" and not _is_phone(text[start:end]):
                    continue
                yield Redaction(start, end, kind)
    if "name" in kinds:
        yield from _known_names(text, names)
        yield from _frequent_names(text)
    for finder in finders:
        for span in finder(text):
            if 0 <= span.start < span.end <= len(text):
                yield span


def _is_phone(text: str) -> bool:
    """Seven or eight digits may be a phone or a range of years, a date, a budget: they must look like 555-0199."""
    digits = sum(c.isdigit() for c in text)
    if _YEARS_ONLY.fullmatch(text):
        return False
    return digits >= 9 or text.startswith("+") or re.fullmatch(r"\d{3}[ -]\d{4}", text) is not None


def _known_names(text: str, names: Sequence[str]) -> Iterator[Redaction]:
    """Whole names in any case; single words of a name as names are written, so that a Mark does not cost us `mark`."""
    for name in names:
        words = [w for w in re.split(r"[\s,]+", name.strip()) if w]
        if not words:
            continue
        whole = r"[\s,]+".join(map(re.escape, words))
        flags = re.IGNORECASE if len(words) > 1 else 0
        variants = [w for word in words if len(word) > 1 for w in dict.fromkeys((word, word.title(), word.upper()))]
        patterns = [re.compile(rf"(?<!\w){whole}(?:[{_APOSTROPHES}]s)?(?!\w)", flags)]
        patterns += [
            re.compile(rf"(?<!\w){re.escape(w)}(?:[{_APOSTROPHES}]s)?(?!\w)") for w in variants if w[0].isupper()
        ]
        if len(words) == 1 and not words[0][0].isupper():
            patterns.append(re.compile(rf"(?<!\w){re.escape(words[0])}(?!\w)", re.IGNORECASE))
        for pattern in patterns:
            for match in pattern.finditer(text):
                yield Redaction(match.start(), match.end(), "name")


@cache
def _name_tables() -> tuple[frozenset[str], frozenset[str]]:
    tables = json.loads((files("uma_engine.ranking") / "data" / "names.json").read_text(encoding="utf-8"))
    return frozenset(tables["first"]), frozenset(tables["last"])


def _frequent_names(text: str) -> Iterator[Redaction]:
    """A frequent first name before a frequent surname, or where somebody introduces themselves. A first name alone stays: Ruby
    and Julia are languages as well.
    """
    first, last = _name_tables()
    for match in _CAP_WORDS.finditer(text):
        words = list(re.finditer(r"\S+", match[0]))
        for a, b in pairwise(words):
            if _bare(a[0]) in first and _bare(b[0]) in last:
                end = b.end() - (b[0].endswith("."))
                yield Redaction(match.start() + a.start(), match.start() + end, "name")
    for match in _INTRODUCED.finditer(text):
        words = list(re.finditer(r"\S+", match["x"]))
        if _bare(words[0][0]) in first:
            known = [w for w in words[1:] if _bare(w[0]) in last]
            end = known[0].end() if known and known[0] is words[1] else words[0].end()
            stop = match.start("x") + end
            yield Redaction(match.start("x"), stop - (text[stop - 1] == "."), "name")


def _bare(word: str) -> str:
    return word.strip(".").removesuffix("'s").removesuffix("\u2019s").title()
