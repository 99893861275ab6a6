"""Near copies against cosines that are counted by hand."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from hkft.data import near
from hkft.data.near import Near, near_duplicates

PLOT = "the plot of this film is as old as the hills and yet it never feels tired"


def cosine(one: str, other: str) -> float:
    first, second = (Counter(text[i : i + 5] for i in range(len(text) - 4)) for text in (one, other))
    lengths = math.sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))
    return sum(first[gram] * second[gram] for gram in first) / lengths


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = "a film that never tires of its own plot and yet feels warm cold dull bright".split()
    return [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(count)]


def test_a_changed_word_is_near_and_another_text_is_not():
    train = ["nothing to see here , move along", PLOT.replace("never", "hardly"), "the acting is as old as the hills"]
    (found,), compared = near_duplicates(train, ["a warm and funny story", PLOT], least=0.8)
    assert (found.validation, found.train, compared) == (1, 1, 2)
    assert found.similarity == pytest.approx(cosine(PLOT, train[1]), abs=1e-6)
    assert 0.8 < found.similarity < 0.95
    assert near_duplicates(train, [PLOT], least=found.similarity + 0.01) == ([], 1)


def test_the_cosine_by_hand():
    """abcdefg has abcde, bcdef and cdefg; abcdefX has two of them and another: 2 / 3."""
    (found,), _ = near_duplicates(["abcdefX"], ["abcdefg"], least=0.6)
    assert found.similarity == pytest.approx(2 / 3, abs=1e-6)
    assert near_duplicates(["abcdefX"], ["abcdefg"], least=0.67)[0] == []


def test_equal_texts_are_near_and_come_first():
    train = ["other words altogether", PLOT + " out", "The  Plot\n", PLOT]
    found, _ = near_duplicates(train, [PLOT + " !", "the plot", PLOT], least=0.9)
    assert found[:2] == [Near(1, 2, 1.0), Near(2, 3, 1.0)]
    assert (found[2].validation, found[2].train, len(found)) == (0, 3, 3)


def test_texts_shorter_than_a_gram_compare_whole():
    train, validation = ["good", "Bad", "", "ok ok ok"], ["goo", "BAD", "good ", "ok", "bad!"]
    assert near_duplicates(train, validation, least=0.1)[0] == [Near(1, 1, 1.0), Near(2, 0, 1.0)]


def test_the_same_grams_in_another_order_are_no_more_than_1():
    text = "abcabcabcabc"
    (found,), _ = near_duplicates([text + "abc"], [text], least=0.9)
    assert found.similarity == pytest.approx(cosine(text + "abc", text), abs=1e-6)
    assert found.similarity <= 1.0


@pytest.mark.parametrize("sizes", [(near.CHARACTERS, near.PAIRS), (300, 20), (1, 1)])
def test_every_row_finds_its_most_similar_in_pieces_too(monkeypatch, sizes):
    train, validation = sentences(60, 1), sentences(40, 2)
    monkeypatch.setattr(near, "CHARACTERS", sizes[0])
    monkeypatch.setattr(near, "PAIRS", sizes[1])
    found, _ = near_duplicates(train, validation, least=0.5)
    expected = {}
    for row, text in enumerate(validation):
        cosines = [
            1.0 if text == other else cosine(text, other) if len(other) > 4 < len(text) else 0 for other in train
        ]
        if max(cosines) >= 0.5:
            expected[row] = max(cosines)
    assert 10 < len(expected) < 40
    assert {one.validation: one.similarity for one in found} == pytest.approx(expected, abs=1e-6)
    for one in found:
        if one.similarity < 1:
            assert cosine(validation[one.validation], train[one.train]) == pytest.approx(one.similarity, abs=1e-6)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)


def test_of_many_rows_some_are_drawn_with_the_seed():
    texts = [f"{word} number {i}" for i, word in enumerate(sentences(50, 3))]
    everything, compared = near_duplicates(texts, texts)
    assert compared == 50
    assert sorted((one.validation, one.train) for one in everything) == [(i, i) for i in range(50)]
    some, compared = near_duplicates(texts, texts[:30], most_rows=40, seed=1)
    assert compared == 30
    assert 0 < sum(one.similarity == 1 for one in some) < 30  # their copies are not all among the 40
    few, compared = near_duplicates(texts, texts, most_rows=10, seed=1)
    assert compared == 10
    assert (few, compared) == near_duplicates(texts, texts, most_rows=10, seed=1)
    assert {one.validation for one in few} != {one.validation for one in near_duplicates(texts, texts, most_rows=10)[0]}


def test_no_rows():
    assert near_duplicates([], ["a film"]) == ([], 1)
    assert near_duplicates(["a film"], []) == ([], 0)
