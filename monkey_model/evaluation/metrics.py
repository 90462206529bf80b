"""How right an answer is: a score for each record, whose mean is that of the data set.

A metric is as published. Where upstream's evaluation script computes something else, a second
one has ``_upstream`` at the end of its name: published scores of Monkey come from these.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from monkey_model.evaluation.vqa_answers import agreement, normalised, without_punctuation


@dataclass(frozen=True)
class Metric:
    """A way to score.

    Args:
        name: what the command calls it.
        about: one line.
        scores: of answers [records], given the references of each: a float for each record.
        misfit: what is wrong with the references of a record for this metric, or None.
        check: raises a ValueError if it cannot score this number of records, or not here.
        best: the highest score.
    """

    name: str
    about: str
    scores: Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
    misfit: Callable[[Sequence[str]], str | None] = lambda references: None
    check: Callable[[int], None] = lambda records: None
    best: float = 1.0


#: By name.
METRICS: dict[str, Metric] = {}


def _metric(
    name: str, about: str, misfit: Callable[[Sequence[str]], str | None] = lambda references: None
) -> Callable[[Callable[[str, Sequence[str]], float]], Callable[[str, Sequence[str]], float]]:
    """Registers the score of one answer."""

    def register(score: Callable[[str, Sequence[str]], float]) -> Any:
        def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
            return [float(score(a, r)) for a, r in zip(answers, references, strict=True)]

        METRICS[name] = Metric(name, about, scores, misfit=misfit)
        return score

    return register


# ---- VQA ----------------------------------------------------------------------------------------


def _few_people(references: Sequence[str]) -> str | None:
    # With fewer, an answer that all gave is not right: three others have to have given it.
    if len(references) >= 4:
        return None
    return f"needs the answers of 4 people or more (VQA has 10); got {len(references)}"


@_metric("vqa_accuracy", "VQA: an answer that 3 of the other 9 people gave is right", _few_people)
def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Antol et al. 2015: https://arxiv.org/abs/1505.00468; both sides are normalised."""
    return agreement(normalised(answer), [normalised(reference) for reference in references])


@_metric(
    "vqa_accuracy_upstream",
    "the same; people's answers lose their punctuation, and that only where they differ",
    _few_people,
)
def vqa_accuracy_upstream(answer: str, references: Sequence[str]) -> float:
    """As upstream's copy of VQA's code has it."""
    if len(set(references)) > 1:
        references = [without_punctuation(reference) for reference in references]
    return agreement(normalised(answer), references)


# ---- ANLS ---------------------------------------------------------------------------------------


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: how many characters to insert, delete or replace."""
    before = list(range(len(other) + 1))
    for row, character in enumerate(one, start=1):
        now = [row]
        for column, opposite in enumerate(other, start=1):
            replaced = before[column - 1] + (character != opposite)
            now.append(min(replaced, before[column] + 1, now[-1] + 1))
        before = now
    return before[-1]


@_metric("anls", "1 - edit distance / length of the closest reference; 0 at half of it or more")
def anls(answer: str, references: Sequence[str]) -> float:
    """Biten et al. 2019: https://arxiv.org/abs/1905.13648, with threshold 0.5.

    Case and the number of spaces make no difference.
    """
    best = 0.0
    one = " ".join(answer.lower().split())
    for reference in references:
        other = " ".join(reference.lower().split())
        far = edit_distance(one, other) / (max(len(one), len(other)) or 1)
        best = max(best, 1 - far if far < 0.5 else 0.0)
    return best


@_metric("anls_upstream", "the same; half of the length is still close enough")
def anls_upstream(answer: str, references: Sequence[str]) -> float:
    """As upstream's script has it; spaces inside count, as do those around a reference."""
    one = answer.strip()
    best = max(
        1
        - edit_distance(one.lower(), reference.lower().strip())
        / (max(len(one), len(reference)) or 1)
        for reference in references
    )
    return best if best >= 0.5 else 0.0


# ---- Relaxed accuracy ---------------------------------------------------------------------------


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed(of: str, other: str) -> bool:
    """Whether two numbers differ by at most 5 % ``of`` the one, or two texts not at all."""
    base, value = _number(of), _number(other)
    if base and value is not None:
        return abs(value - base) / abs(base) <= 0.05
    return of.lower() == other.lower()


@_metric("relaxed_accuracy", "ChartQA: a number within 5 % of the reference, or the same text")
def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Masry et al. 2022: https://arxiv.org/abs/2203.10244, section 5.1. "7%" is 0.07."""
    return float(any(_relaxed(reference.strip(), answer.strip()) for reference in references))


@_metric("relaxed_accuracy_upstream", "the same; within 5 % of the answer")
def relaxed_accuracy_upstream(answer: str, references: Sequence[str]) -> float:
    """As upstream's script has it, which takes the answer for the reference."""
    return float(any(_relaxed(answer.strip(), reference) for reference in references))


# ---- The same text, or a part of it -------------------------------------------------------------


def _empty(references: Sequence[str]) -> str | None:
    if all(reference.strip() for reference in references):
        return None
    return "needs references that are not empty: every answer contains an empty one"


@_metric("exact", "the answer is a reference, but for case and space around it")
def exact(answer: str, references: Sequence[str]) -> float:
    return float(answer.strip().lower() in [reference.strip().lower() for reference in references])


@_metric("containment", 'the answer has a reference in it: upstream\'s "accuracy"', _empty)
def containment(answer: str, references: Sequence[str]) -> float:
    """As upstream's script has it: the answer loses its full stops, the references do not."""
    answer = answer.strip().lower().replace(".", "")
    return float(any(reference.strip().lower() in answer for reference in references))


@_metric("gqa", "containment in the part of the answer that names something", _empty)
def gqa(answer: str, references: Sequence[str]) -> float:
    """As upstream's script has it for GQA: "It is a red car." becomes "red car"."""
    answer = answer.strip()
    for end in ".,!":
        answer = answer.partition(end)[0]
    answer = answer.lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        parts = answer.split(word)
        answer = parts[1] if len(parts) > 1 else answer
    return containment(answer.partition(" of")[0], references)


# ---- Captions -----------------------------------------------------------------------------------


def _check_cider(records: int) -> None:
    if records < 2:
        raise ValueError(
            "metric cider needs 2 records or more: it weighs words by how few use them"
        )
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        raise ValueError(
            'metric cider needs the extra captions: pip install "monkey-vision[captions]"'
        ) from None
    if shutil.which("java") is None:
        raise ValueError("metric cider needs Java, which the tokenizer of its authors runs on")


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of captions, 0 to 10: Vedantam et al. 2015, https://arxiv.org/abs/1411.5726.

    By its authors' code, with the tokenizer that they use.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given: dict[str, list[dict[str, str]]] = {}
    for number, (answer, right) in enumerate(zip(answers, references, strict=True)):
        # One line each, whatever ends a line for the tokenizer.
        given[f"answer {number}"] = [{"caption": " ".join(answer.split())}]
        given[f"references {number}"] = [{"caption": " ".join(text.split())} for text in right]
    # Both in one go: each starts a virtual machine of Java's.
    tokens = PTBTokenizer().tokenize(given)
    if {name: len(texts) for name, texts in given.items()} != {
        name: len(texts) for name, texts in tokens.items()
    }:
        raise RuntimeError("pycocoevalcap's tokenizer, which runs on Java, failed")
    numbers = range(len(answers))
    _, scores = Cider().compute_score(
        {number: tokens[f"references {number}"] for number in numbers},
        {number: tokens[f"answer {number}"] for number in numbers},
    )
    return [float(score) for score in scores]


METRICS["cider"] = Metric(
    "cider",
    "captions: words and phrases shared with the references, rare ones above all; up to 1000",
    cider,
    check=_check_cider,
    best=10.0,
)
