"""How VQA compares answers: https://visualqa.org/evaluation.html, with its code's own details.

Case, punctuation, articles, number words and missing apostrophes make no difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = ("a", "an", "the")
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

# The words that get an apostrophe back which they lack: for "isn't", "isnt". Where a word has
# several, one of them may be missing. VQA's list has no "she'll" and "we're": "shell" and "were".
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
_WITH_APOSTROPHE = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # which VQA's list has the wrong way round


def without_punctuation(text: str) -> str:
    """Punctuation removed where it stands beside a space, else replaced by one; no full stops.

    Where a number is written with a comma ("1,000"), all punctuation is removed.
    """
    number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", result, count=32)  # VQA's code passes a flag, 32, in the count's place


def plain_words(text: str) -> str:
    """In lower case, numbers up to ten as digits, without articles, with apostrophes."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def normalised(text: str) -> str:
    """What VQA compares."""
    return plain_words(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def agreement(answer: str, references: Sequence[str]) -> float:
    """min(1, people who gave ``answer`` / 3), the mean of leaving out each of them."""
    same = [answer == reference for reference in references]
    matches = sum(same)
    return sum(min(1.0, (matches - one) / 3) for one in same) / len(same)
