"""Metrics: as published on cases made by hand, and as other code computes them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from monkey_model.evaluation.metrics import METRICS, edit_distance
from monkey_model.evaluation.vqa_answers import normalised

DATA = Path(__file__).parents[1] / "data" / "metric_scores.json"


#: VQA's definition and CIDEr have tests of their own.
BY_OTHERS = sorted(set(METRICS) - {"vqa_accuracy", "cider"})


def score(metric, answer, *references):
    return METRICS[metric].scores([answer], [references])[0]


@pytest.fixture(scope="module")
def golden():
    return json.loads(DATA.read_text(encoding="utf-8"))


def test_every_metric_is_held_against_other_code(golden):
    assert len(golden["answers"]) == 1000
    assert sorted(golden["scores"]) == BY_OTHERS


@pytest.mark.parametrize("metric", BY_OTHERS)
def test_other_code_gives_the_same_scores(metric, golden):
    expected = golden["scores"][metric]
    ours = METRICS[metric].scores(golden["answers"], golden["references"])
    assert ours == pytest.approx(expected, abs=1e-11)
    assert 0 < sum(expected) < METRICS[metric].best * len(expected)


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_is_the_mean_of_leaving_one_person_out(matches):
    people = ["yes"] * matches + ["no"] * (10 - matches)
    with_one_less = min(1, max(0, matches - 1) / 3)
    expected = (matches * with_one_less + (10 - matches) * min(1, matches / 3)) / 10
    for metric in ("vqa_accuracy", "vqa_accuracy_upstream"):
        assert score(metric, "yes", *people) == pytest.approx(expected)


def test_vqa_accuracy_normalises_both_sides():
    assert score("vqa_accuracy", "2 dogs", *["The two dogs"] * 10) == 1
    # VQA's code does so with the answer alone.
    assert score("vqa_accuracy_upstream", "The two dogs", *["2 dogs"] * 10) == 1
    assert score("vqa_accuracy_upstream", "2 dogs", *["The two dogs"] * 10) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  Red\tCar\n", "red car"),
        ("the answer is Ten", "answer is 10"),
        ("none", "0"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("were", "were"),
        ("Stop!", "stop"),
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("U.S.A.", "usa"),
        ("3.50", "3.50"),
        ("man's", "man's"),
        ("12:30", "12:30"),
        ("a", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize(
    ("answer", "references", "published", "upstream"),
    [
        ("Pizzeria", ["pizzeria"], 1, 1),
        ("pizzeri", ["pizzeria", "shop"], 7 / 8, 7 / 8),
        ("ab", ["ax"], 0, 0.5),  # half of the length is too far, or just not
        ("abc", ["axx"], 0, 0),
        ("pizza  bar", ["pizza bar"], 1, 9 / 10),
        ("", ["yes"], 0, 0),
    ],
)
def test_anls(answer, references, published, upstream):
    assert score("anls", answer, *references) == pytest.approx(published)
    assert score("anls_upstream", answer, *references) == pytest.approx(upstream)


@pytest.mark.parametrize(
    ("answer", "reference", "published", "upstream"),
    [
        ("105", "100", 1, 1),
        ("105.1", "100", 0, 1),  # within 5 % of the answer
        ("95", "100", 1, 0),  # within 5 % of the reference
        ("94", "100", 0, 0),
        ("7%", "0.07", 1, 1),
        ("7", "7%", 0, 0),
        ("-100", "100", 0, 0),
        ("0", "0", 1, 1),
        ("0.0", "0", 0, 0),  # there are no 5 % of nothing
        ("Blue", "blue ", 1, 0),
        ("blue", "dark blue", 0, 0),
    ],
)
def test_relaxed_accuracy(answer, reference, published, upstream):
    assert score("relaxed_accuracy", answer, reference) == published
    assert score("relaxed_accuracy_upstream", answer, reference) == upstream


@pytest.mark.parametrize(
    ("answer", "exact", "containment", "gqa"),
    [
        (" Red car ", 1, 1, 1),
        ("It is a red car.", 0, 1, 1),
        ("a bus, no red car", 0, 1, 0),
        ("car", 0, 0, 0),
        ("red ca.r", 0, 1, 0),
    ],
)
def test_the_same_text_or_a_part(answer, exact, containment, gqa):
    for metric, expected in (("exact", exact), ("containment", containment), ("gqa", gqa)):
        assert score(metric, answer, "red car", "motor") == expected, metric


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer of CIDEr runs on Java")
def test_cider():
    """Shared n-grams of 1 to 4 words, a quarter each; those of two records count half as much."""
    answers = ["A red car.", "a dog runs away", "", "the\ngreen  bus\u2028stops, here"]
    references = [["a red car"], ["a dog ran away", "cats"], ["x"], ["The green bus stops here!"]]
    found = METRICS["cider"].scores(answers, references)
    rare, common = math.log(4), math.log(2)  # idf of a word of one record, and of "a"
    words = (common**2 + 2 * rare**2) / (common**2 + 3 * rare**2)
    # "a dog" of three pairs of words, none of three or four; the mean of two references.
    second = 10 / 4 * (words + 1 / 3) / 2
    assert found == pytest.approx([7.5, second, 0, 10])


def test_cider_says_what_it_lacks(monkeypatch):
    with pytest.raises(ValueError, match="cider needs 2 records or more"):
        METRICS["cider"].check(1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="cider needs Java"):
        METRICS["cider"].check(2)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ValueError, match=r'pip install "monkey-vision\[captions\]"'):
        METRICS["cider"].check(2)
