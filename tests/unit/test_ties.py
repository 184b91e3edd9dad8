"""Who is in a tie, and in which order ties are shown."""

from __future__ import annotations

import random

from uma_engine.ranking.ties import arrange, lot


def test_a_tie_is_less_than_the_resolution_below_its_best_and_does_not_chain() -> None:
    places = arrange([0.5, 0.9, 0.89, 0.885, 0.88, 0.1], 0.02)
    assert [(p.index, p.place, p.tied_with) for p in places] == [
        (1, 1, 2), (2, 1, 2), (3, 1, 2), (4, 4, 0), (0, 5, 0), (5, 6, 0),
    ]  # fmt: skip
    assert [p.group for p in places] == [0, 0, 0, 1, 2, 3]


def test_equal_scores_tie_at_any_resolution_and_others_do_not_at_none() -> None:
    assert [(p.index, p.place, p.tied_with) for p in arrange([0.5, 0.5, 0.5, 0.6], 0.0)] == [
        (3, 1, 0), (0, 2, 2), (1, 2, 2), (2, 2, 2),
    ]  # fmt: skip
    assert [p.tied_with for p in arrange([0.5, 0.5000001], 0.0)] == [0, 0]
    assert arrange([], 0.1) == []


def test_places_hold_for_random_scores() -> None:
    rng = random.Random(4)
    for _ in range(300):
        scores = [round(rng.random(), rng.randint(1, 4)) for _ in range(rng.randint(1, 40))]
        resolution = rng.choice([0.0, 0.01, 0.1, 1.0])
        places = arrange(scores, resolution, [lot("job", str(i)) for i in range(len(scores))])
        assert sorted(p.index for p in places) == list(range(len(scores)))
        for a in places:
            better = [b for b in places if b.group < a.group]
            same = [b for b in places if b.group == a.group]
            assert (a.place, a.tied_with) == (len(better) + 1, len(same) - 1)
            assert all(scores[b.index] > scores[a.index] for b in better)
            top = max(scores[b.index] for b in same)
            assert scores[a.index] == top or top - scores[a.index] < resolution


def test_the_lot_is_the_same_for_the_same_question_and_favours_nobody_over_many() -> None:
    assert lot("job", "a") == lot("job", "a")
    assert lot("job", "ab") != lot("joba", "b")
    first = [arrange([0.5, 0.5], 0.0, [lot(f"job {i}", "a"), lot(f"job {i}", "b")])[0].index for i in range(1000)]
    assert 400 < sum(first) < 600
    draws = [lot("job", name) for name in "abcd"]
    shown = [p.index for p in arrange([0.5] * 4, 0.0, draws)]
    assert shown == sorted(range(4), key=lambda i: draws[i])
    swapped = [p.index for p in arrange([0.5] * 4, 0.0, draws[::-1])]
    assert [3 - i for i in swapped] == shown, "the order of the input does not matter"
