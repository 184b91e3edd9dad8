"""The judge of sentences: what is grounded passes, what is not is dropped, by rules that an independent checker confirms."""

from __future__ import annotations

import json
import random
import re
import unicodedata

import pytest

from uma_engine.ranking.assessment import SECTIONS, Assessment, Section, Source, split_sentences
from uma_engine.ranking.grounding import KNOWN_SKILLS, check, numbers_in, words_in
from uma_engine.ranking.ledger import LedgerLine
from uma_engine.ranking.templates import factor_source, stand_ins
from uma_engine.tasks.draft import Draft, Sources, schema_of

TEXT = (
    "Senior Rust engineer. Ten years of databases and Linux at Acme Corp.\n"
    "- Built payroll systems with Node.js and C++ (2015-2019)\n"
    "Saved 1,250 hours a year, a gain of 12.5 %. No experience with nursing. Since March 2020 at [name]."
)
JOB = "We need a Kubernetes and Rust specialist.\nFive years of Linux, from May 2024 on. Budget: $60 an hour."
LEDGER = (
    LedgerLine("job success", 0.93, 2.0, 0.31, kind="fact", missing=False, source="job_success", raw=96.0),
    LedgerLine("skill match", 0.2, 1.0, 0.05, kind="read", missing=False, source=None, raw=0.21),
    LedgerLine("rate", 0.5, 1.0, 0.1, kind="fact", missing=True, source="rate", raw=None),
)
SOURCES = Sources.of(TEXT, JOB, LEDGER)
NAMED = {s.name: s for s in (*SOURCES.candidate, *SOURCES.job, *SOURCES.factors)}


def kinds(text: str, section: Section, *cites: str, strict: bool = True) -> set[str]:
    return {f.kind for f in check(text, section, [NAMED[c] for c in cites], TEXT, strict=strict)}


def test_sentences_are_spans_of_the_text() -> None:
    spans = split_sentences(TEXT)
    assert [TEXT[a:b] for a, b in spans] == [
        "Senior Rust engineer.",
        "Ten years of databases and Linux at Acme Corp.",
        "- Built payroll systems with Node.js and C++ (2015-2019)",
        "Saved 1,250 hours a year, a gain of 12.5 %.",
        "No experience with nursing.",
        "Since March 2020 at [name].",
    ]
    long = "word " * 500
    assert all(b - a <= 400 for a, b in split_sentences(long))
    assert "".join(long[a:b].replace(" ", "") for a, b in split_sentences(long)) == long.replace(" ", "")
    assert split_sentences("x" * 1000 + "\n...\n\n") == [(0, 400), (400, 800), (800, 1000)]
    assert split_sentences(" \n--- ") == []
    assert len(split_sentences(TEXT, 2)) == 2


@pytest.mark.parametrize(
    ("text", "section", "cites"),
    [
        ("The candidate has ten years of experience with databases.", "strengths", ["c2"]),
        ("10 years of Linux and databases.", "strengths", ["c2"]),
        ("The candidate's payroll system was built with Node.js and C++.", "strengths", ["c3"]),
        ("Payroll systems between 2015 and 2019.", "strengths", ["c3"]),
        ("Saved 1250 hours, a gain of 12.5%.", "strengths", ["c4"]),
        ("Job success is 96, which is good.", "strengths", ["job success"]),
        ("A senior engineer with a skill for Rust.", "strengths", ["c1", "c2"]),
        ("There is no mention of Kubernetes.", "gaps", ["j1"]),
        ("The skill match is weak.", "gaps", ["skill match"]),
        ("The rate is not known.", "gaps", ["rate"]),
        ("The candidate has no experience with nursing.", "gaps", ["c5"]),
        ("Could you tell us more about the payroll systems?", "questions", ["c3"]),
        ("Do you have experience with Kubernetes?", "questions", ["j1"]),
        ("Are you available from May 2024 on?", "questions", ["j2"]),
    ],
)
def test_what_is_grounded_passes(text: str, section: Section, cites: list[str]) -> None:
    if "available" in text:
        assert kinds(text, section, *cites) == {"word"}, "a word that no source has"
        assert not kinds(text, section, *cites, strict=False)
    else:
        assert not check(text, section, [NAMED[c] for c in cites], TEXT)


@pytest.mark.parametrize(
    ("text", "section", "cites", "kind"),
    [
        ("The candidate has 12 years of databases.", "strengths", ["c2"], "number"),
        ("The candidate has twelve years of databases.", "strengths", ["c2"], "number"),
        ("Two decades of databases.", "strengths", ["c2"], "number"),
        ("The candidate has \u0661\u0662 years of databases.", "strengths", ["c2"], "number"),
        ("Databases \u00bd of the year.", "strengths", ["c2"], "number"),
        ("Built payroll systems in 2014.", "strengths", ["c3"], "number"),
        ("Payroll systems since June 2019.", "strengths", ["c3"], "date"),
        ("Databases at Google.", "strengths", ["c2"], "name"),
        ("Databases at Acme Corp and at Initech.", "strengths", ["c2"], "name"),
        ("Strong Kubernetes and databases.", "strengths", ["c2"], "name"),
        ("Strong kubernetes and databases.", "strengths", ["c2"], "skill"),
        ("Payroll systems with C.", "strengths", ["c3"], "name"),
        ("Payroll systems with c#.", "strengths", ["c3"], "name"),
        ("Payroll systems with Node.py.", "strengths", ["c3"], "name"),
        ("Databases and underwater basket weaving.", "strengths", ["c2"], "word"),
        ("Databases and L\u0456nux.", "strengths", ["c2"], "name"),  # a Cyrillic i
        ("Databases and Li\u200bnux.", "strengths", ["c2"], "form"),  # a blank that does not show
        ("Experience with nursing.", "strengths", ["c5"], "denial"),
        ("Not a senior Rust engineer.", "strengths", ["c1"], "denial"),
        ("The job success isn't known.", "strengths", ["job success"], "denial"),
        ("There is no mention of Rust.", "gaps", ["j1"], "denial"),
        ("The skill match is strong.", "strengths", ["skill match"], "source"),
        ("The job success is weak.", "gaps", ["job success"], "source"),
        ("Strong Kubernetes experience.", "strengths", ["j1"], "source"),
        ("Databases.", "strengths", [], "source"),
        ("The candidate is a good fit.", "strengths", ["c2"], "form"),
        ("Databases and Linux", "strengths", ["c2"], "form"),
        ("Databases and Linux?", "strengths", ["c2"], "form"),
        ("Databases and Linux.", "questions", ["c2"], "form"),
        ("Databases " * 60 + ".", "strengths", ["c2"], "form"),
    ],
)
def test_what_is_not_grounded_is_found(text: str, section: Section, cites: list[str], kind: str) -> None:
    assert kind in kinds(text, section, *cites)


def test_words_and_numbers_are_read_whole() -> None:
    assert words_in("C, C++, C# and Node.js.") == ["c", "c++", "c#", "and", "node.js"]
    assert [str(n) for n in numbers_in("1,250 and 1250 but 3.50, ten and half")] == [
        "1.25E+3",
        "1.25E+3",
        "3.5",
        "10",
        "0.5",
    ]
    assert numbers_in("1.2.3") != numbers_in("1.23")
    assert numbers_in("\uff11\uff10") == numbers_in("10")


def test_templates_are_grounded_and_marked() -> None:
    seen = 0
    for section in SECTIONS:
        for sentence in stand_ins(section, LEDGER, SOURCES.factors, most=3):
            assert sentence.origin == "template"
            assert not check(sentence.text, section, sentence.cites, TEXT), sentence.text
            seen += 1
    assert seen == 5
    assert stand_ins("gaps", LEDGER[:1], SOURCES.factors[:1]) == [], "no weak factor, no gap"


@pytest.mark.parametrize(
    "name", ["response_time", "  odd\nname ", "Größe", "評価", "c1", "a b c", "50/50", "no-show rate"]
)
@pytest.mark.parametrize("value", [0.004, 0.4999, 0.5, 1.0])
def test_templates_of_any_factor_are_grounded(name: str, value: float) -> None:
    for missing in (False, True):
        line = LedgerLine(
            name, value, 1 / 3, 0.1, kind="fact", missing=missing, source="f", raw=None if missing else 1e7
        )
        for section in SECTIONS:
            for sentence in stand_ins(section, [line], [factor_source(line)]):
                found = [f for f in check(sentence.text, section, sentence.cites, TEXT) if f.kind != "denial"]
                assert not found, sentence.text


# ---- an independent checker, and whoever tries to get past the judge ----

SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "fifteen": 15, "twenty": 20, "thirty": 30, "hundred": 100, "thousand": 1000, "dozen": 12,
}  # fmt: skip
SKILLS = "kubernetes rust linux payroll nursing cobol welding sommelier terraform swift haskell databases kotlin bookkeeping juggling"
SKILLS_LIST = tuple(re.findall(r"\w+", SKILLS))
NAMES = ("Google", "Initech", "Hooli", "Stanford", "Berlin", "Alice", "Kubernetes", "Terraform", "SAP")
MONTHS = ("january", "february", "april", "june", "july", "august", "september", "october", "november", "december")
OPENERS = set(
    re.findall(
        r"\w+",
        "the there this a an no not strong good clear is are do does have has could what can how would where when why your it experience "
        "skill skills relevant with",
    )
)


def complaints(text: str, sources: list[str]) -> list[str]:
    """Numbers, dates, names and skills of a sentence that its sources do not hold: another reading of the rules, sharing no code."""
    text = unicodedata.normalize("NFKC", text)
    source = unicodedata.normalize("NFKC", "\n".join(sources))
    found = []
    for char in text:
        if unicodedata.category(char) in ("Cf", "Cc", "Co", "Cn") and char not in source:
            found.append(f"U+{ord(char):04X}")

    def values(of: str) -> set[str]:
        digits = {d.replace(",", "") for d in re.findall(r"[0-9][0-9,]*(?:\.[0-9]+)?", of)}
        plain = {d.rstrip(",").rstrip("0").rstrip(".") if "." in d else d.rstrip(",") for d in digits}
        spelled = {str(SMALL[w]) for w in re.findall(r"[a-z]+", of.lower()) if w in SMALL}
        return plain | spelled

    found += sorted(values(text) - values(source))
    tokens = re.findall(r"[^\s\"'()\[\]{},;:!?/\u2019\u2018\u201c\u201d\u2013-]+", text)
    known = {
        t.strip(".").lower() for t in re.findall(r"[^\s\"'()\[\]{},;:!?/\u2019\u2018\u201c\u201d\u2013-]+", source)
    }
    for position, token in enumerate(tokens):
        word = (
            token.strip(".*_<>|=~`^\\$&%@+").rstrip(".") if not token.rstrip(".").endswith("++") else token.rstrip(".")
        )
        small = word.lower()
        if not word or small in known or small.rstrip("s") in known or small + "s" in known:
            continue
        if position == 0 and small in OPENERS:
            continue
        looks_like_a_name = word != small and not (
            position == 0 and any(small[:5] == k[:5] for k in known if len(k) > 3)
        )
        if looks_like_a_name or small in SKILLS_LIST or small in MONTHS:
            found.append(word)
    return found


def test_the_checker_itself_sees_what_is_planted() -> None:
    assert not complaints("The candidate has ten years of databases.", [NAMED["c2"].text])
    for bad in ("12 years.", "twelve years.", "Databases at Google.", "kubernetes.", "in june.", "Li\u200bnux."):
        assert complaints(bad, [NAMED["c2"].text]), bad


def adversary(draw: random.Random) -> tuple[str, str, list[str]]:
    """A section, a sentence that wants to get through, and what it claims to cite."""
    section: Section = draw.choice(SECTIONS)
    citable = SOURCES.citable(section)
    cites = [s.name for s in draw.sample(citable, draw.choice((1, 1, 2)))]
    own = " ".join(NAMED[c].text for c in cites)
    words = own.split()
    end = "?" if section == "questions" else "."
    number, name = draw.choice((7, 11, 12, 99, 2014, 1250)), draw.choice(NAMES)
    skill = draw.choice(SKILLS_LIST)
    part = " ".join(words[: draw.randint(1, len(words))]).rstrip(".?!")
    move = draw.randrange(14)
    made = {
        0: lambda: part,
        1: lambda: f"The candidate has {number} years of {part}",
        2: lambda: f"{part} at {name}",
        3: lambda: f"{part} and {skill}",
        4: lambda: f"Strong in {skill} and {part}",
        5: lambda: f"{part} since {draw.choice(MONTHS)} {number}",
        6: lambda: f"{part} and {draw.choice(list(SMALL))} more",
        7: lambda: " ".join(draw.sample(words, len(words))).replace(".", ""),
        8: lambda: part.replace("e", "\u0435", 1).replace("i", "\u0456", 1),
        9: lambda: part[: len(part) // 2] + draw.choice("\u200b\u202e\u00ad\ufeff\x07") + part[len(part) // 2 :],
        10: lambda: f"{part} {chr(draw.randrange(0x660, 0x66A))}{chr(0xFF10 + draw.randrange(10))} {name.upper()}",
        11: lambda: f"{name} needs {skill}: {part}",
        12: lambda: "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xA0, 0x2FFF)))) for _ in range(30)),
        13: lambda: f"The {part.lower()} is {draw.choice(('not', 'no', 'clearly'))} {draw.choice(words).lower()}",
    }[move]()  # fmt: skip
    if draw.random() < 0.1:
        cites.append(draw.choice(("c99", "", "j0", "score")))
    return section, made + end, cites


def written_by(draw: random.Random) -> str:
    parts: dict[str, list[object]] = {section: [] for section in SECTIONS}
    for _ in range(4):
        section, text, cites = adversary(draw)
        parts[section].append({"cites": cites, "text": text})
    return json.dumps(parts, ensure_ascii=draw.random() < 0.5, separators=(",", ":"))


def shown(assessment: Assessment) -> list[tuple[str, tuple[Source, ...]]]:
    return [(s.text, s.cites) for section in SECTIONS for s in assessment.section(section)]


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_ungrounded_leaves_two_thousand_adversarial_drafts(strict: bool) -> None:
    draw = random.Random(7)
    kept = dropped = 0
    for _ in range(2000):
        whole = written_by(draw)
        draft = Draft(0, "x", SOURCES, LEDGER, strict)
        at = 0
        streamed = []
        while at < len(whole):  # in pieces of any size, as a model writes
            size = draw.choice((1, 3, 17, 400))
            streamed += draft.feed(whole[at : at + size])
            at += size
        streamed += draft.finish(whole)
        assessment = draft.assessment()
        at_once = Draft(0, "x", SOURCES, LEDGER, strict)
        at_once.finish(whole)
        assert at_once.assessment() == assessment
        assert sorted(s.text for _, s in streamed) == sorted(text for text, _ in shown(assessment))
        for text, cites in shown(assessment):
            assert cites
            found = complaints(text, [c.text for c in cites])
            if not strict:  # a small word that no list of skills has
                found = [word for word in found if word != word.lower() or word in KNOWN_SKILLS or not word.isalpha()]
            assert not found, text
        own = [s for section in SECTIONS for s in assessment.section(section) if s.origin == "model"]
        kept, dropped = kept + len(own), dropped + len(assessment.dropped)
        assert len(own) + len(assessment.dropped) == 4, "no sentence is lost"
    assert kept > 200, "what is grounded passes"
    assert dropped > 3000


def test_random_text_is_read_without_an_error() -> None:
    draw = random.Random(3)
    for _ in range(500):
        text = "".join(draw.choice('{}[]",:\\abc strengths gaps"cites"') for _ in range(80))
        draft = Draft(0, "x", SOURCES, LEDGER)
        draft.feed(text)
        draft.finish(text)
        assert all(s.origin == "template" or s.cites for part in SECTIONS for s in draft.assessment().section(part))


def test_the_schema_offers_only_what_a_section_may_cite() -> None:
    schema = schema_of(SOURCES)["properties"]
    names = {s: schema[s]["items"]["properties"]["cites"]["items"]["enum"] for s in SECTIONS}
    assert "job success" in names["strengths"]
    assert not {"skill match", "rate", "j1"} & set(names["strengths"])
    assert {"skill match", "rate", "j1"} <= set(names["gaps"])
    assert "job success" not in names["gaps"]
    clash = Sources.of(TEXT, JOB, (LedgerLine("c1", 0.9, 1.0, 0.5, kind="read", missing=False, source=None, raw=0.9),))
    assert [f.name for f in clash.factors] == ["f1"]
    assert schema_of(Sources.of("!!!", "???", ()))["properties"]["strengths"] == {"type": "array", "maxItems": 0}
