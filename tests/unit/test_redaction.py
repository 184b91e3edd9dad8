"""What redaction takes out, what it leaves, and that two people with one profile come out as one text."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from uma_engine.errors import InvalidRequest, SurfaceError
from uma_engine.ranking.identities import AXES, Identity, draw, dress
from uma_engine.ranking.redaction import KINDS, Redaction, check_kinds, redact
from uma_engine.tasks.candidates import profile_text

PROFILES = Path(__file__).resolve().parents[2] / "examples" / "candidates.jsonl"

GONE = [
    ("My name is Lakisha Washington. I code.", "My name is [name]. I code."),
    ("Name: J. R. Example\nRust", "Name: [name]\nRust"),
    ("Dr. Jane Roe leads.", "[name] leads."),
    ("Hi, I'm Emily, a nurse; ask for Greg Baker.", "Hi, I'm [name], a nurse; ask for [name]."),
    ("Reviewed by Jordan Smith and others", "Reviewed by [name] and others"),
    ("She led her team herself; he/him.", "[pronoun] led [pronoun] team [pronoun]; [pronoun]."),
    ("Pronouns: they/them", "Pronouns: [pronoun]"),
    ("A mother of two, female", "A [pronoun] of two, [pronoun]"),
    ("a.b+c@mail.example.co.uk or a (at) b (dot) org", "[email] or [email]"),
    ("Call +1 (415) 555-0199 or 555-0199, 030 1234567.", "Call [phone] or [phone], [phone]."),
    ("https://x.example/y?z=1, www.x.example and linkedin.com/in/someone", "[link] and [link]"),
    ("Skype: some.one", "Skype: [link]"),
    ("![me](me.png) and <img src=x> photo.jpeg", "[photo] and [photo]"),
    ("Profile photo: on request\nRust", "Profile photo: [photo]\nRust"),
    ("Aged 45, 45 years old, a 45-year-old, born in 1980", "[age], [age], a [age], [age]"),
    ("Date of birth: 1 May 1980\nRust", "[age]\nRust"),
    ("Graduated in 1998; BSc Physics, 2001; class of '99", "Graduated in [age]; BSc Physics, [age]; [age]"),
    ("recent graduate, digital native", "[age], [age]"),
    ("Howard University, the University of Lagos, MIT", "[school], the [school], [school]"),
    ("Indian Institute of Technology Delhi; School of Design", "[school]; [school]"),
]
STAYS = [
    "Ruby, Julia, Crystal, Ada and Jordan are not people here; Node.js, Vue.js and ASP.NET are no links.",
    "10 years of experience, 2015 - 2019, since 1998, 1,000,000 users, 100 000 items, version 3.11.7, 2019-05-31.",
    "@angular/core, @media queries, C++ and a rate of 65 USD; they work in teams, their own.",
    "Full stack development for hospitals. I will mark papers with grace, hope and joy.",
    "Manual testing, woodwork, manager, human resources, theme, sheet, mother-of-pearl inlay.",
]


@pytest.mark.parametrize(("text", "after"), GONE)
def test_what_says_who_somebody_is_goes(text: str, after: str) -> None:
    assert redact(text)[0] == after


@pytest.mark.parametrize("text", STAYS)
def test_what_somebody_can_do_stays(text: str) -> None:
    assert redact(text) == (text, ())


def test_a_known_name_goes_wherever_it_stands() -> None:
    text = "MARÍA's shop. María José Núñez, or maría josé núñez. Núñez & Co. Jose Nunez wrote `nunez`. A mark by Mark."
    after, spans = redact(text, ("name",), ["María José Núñez"])
    assert after == "[name] shop. [name], or [name]. [name] & Co. [name] wrote `nunez`. A mark by Mark."
    assert [text[s.start : s.end] for s in spans][:2] == ["MARÍA's", "María José Núñez"]
    assert redact("Ann and Bo", ("name",), ["", "  ", "Bo"])[0] == "Ann and [name]"
    assert redact("by madonna, Madonna", ("name",), ["madonna"])[0] == "by [name], [name]"
    assert redact("a.b (x) a+b", ("name",), ["A+B (x"])[0] == "a.b (x) a+b", "a name is no pattern"


def test_spans_are_of_the_text_given_and_further_finders_join_in() -> None:
    text = "Mail a@b.example. Built Apollo for Acme."
    found = lambda t: [Redaction(t.index("Acme"), t.index("Acme") + 4, "employer"), Redaction(5, 99, "x")]  # noqa: E731
    after, spans = redact(text, finders=[found])
    assert after == "Mail [email]. Built Apollo for [employer]."
    assert [(s.kind, text[s.start : s.end]) for s in spans] == [("email", "a@b.example"), ("employer", "Acme")]


def test_only_the_kinds_asked_for_go() -> None:
    text = "She is a@b.example"
    assert redact(text, ("email",))[0] == "She is [email]"
    assert redact(text, ())[0] == text
    assert check_kinds(["school", "name"]) == ("name", "school")
    with pytest.raises(SurfaceError, match="`redact` holds `names`"):
        check_kinds(["names"])


def test_the_example_profiles_keep_all_their_words() -> None:
    """None of them says who somebody is: a rule that fires here takes skills away."""
    for line in PROFILES.read_text(encoding="utf-8").splitlines():
        profile = json.loads(line)
        text = profile_text(profile, facts_in_text=False)
        assert redact(text, KINDS, [profile["name"]]) == (text, ()), profile["id"]


def test_no_text_makes_it_slow() -> None:
    """Each took minutes with one unbounded repetition; the limit is for a loaded machine."""
    hostile = ["A" * 50_000, "a." * 20_000, "1-" * 20_000, "University of " * 4_000, "![a" * 10_000, "born " * 8_000,
               "aaa@" * 10_000, "A A of " * 8_000, "Name: " * 8_000, "x" * 50_000 + ".jp", "A'" * 20_000, "+1 " * 10_000]  # fmt: skip
    began = time.process_time()
    for text in hostile:
        redact(text, names=["Ann A"])
    assert time.process_time() - began < 20


@pytest.mark.parametrize("axis", AXES)
def test_twins_are_one_text_once_redacted_and_two_before(axis: str) -> None:
    rng = random.Random(8)
    lines = [json.loads(line) for line in PROFILES.read_text(encoding="utf-8").splitlines()]
    extra = [
        "{name} knows Rust. She studied at Ohio State University and taught herself. Ask {first}'s team; it is hers. He left, it was his.",
        "I am {first}. HE SAID: {name} of MIT, Class of 2001. Mr. {name}, or him.",
        "{name}\n{name}@example.com, https://example.com/{first}. Her work, by {name}.",
    ]
    different = 0
    for number in range(600):
        profile = lines[number % len(lines)]
        text = profile_text(profile, facts_in_text=False)
        if number % 2:
            text += "\n" + extra[number % len(extra)].format(name=profile["name"], first=profile["name"].split()[0])
        pair = draw(axis, text, rng)
        assert pair is not None
        sides = []
        for identity in pair:
            dressed, facts = dress(text, {"name": profile["name"]}, identity)
            assert identity.value in dressed
            sides.append((dressed, redact(dressed, KINDS, [facts["name"]])[0]))
        assert sides[0][1] == sides[1][1]
        different += sides[0][0] != sides[1][0]
    assert different == 600


def test_a_pair_changes_one_thing_and_nothing_that_the_text_says_already() -> None:
    for seed in range(200):
        pair = draw("names", "Emily Baker and Jamal Washington at work", random.Random(seed))
        assert pair is not None
        a, b = (identity.value.split() for identity in pair)
        assert a[1] == b[1]
        assert a[0] != b[0]
        assert not {"Emily", "Jamal", "Baker", "Washington"} & {*a, *b}
    with pytest.raises(InvalidRequest, match="`axes` holds `age`"):
        draw("age", "x", random.Random(0))


def test_pronouns_are_swapped_as_they_are_used() -> None:
    she = "She knows her trade. It is hers; ask her. Herself."
    assert dress(she, {}, Identity("pronouns", "he/him", "he/him"))[0] == (
        "Pronouns: he/him\n\nHe knows his trade. It is his; ask him. Himself."
    )
    he = "He knows his trade. It is his; ask him. Himself."
    assert dress(he, {}, Identity("pronouns", "she/her", "she/her"))[0].endswith(
        "She knows her trade. It is hers; ask her. Herself."
    )
