"""An evaluation: a folder that gets the answers as they come, then scores and the worst cases.

The folder holds ``settings.json`` from the start, which says what the answers are answers of;
``answers*.jsonl``, a line for each, one file for each process; and in the end ``records.jsonl``
(answer and scores of each record), ``worst.html`` and, last, ``scores.json``.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from monkey_model.evaluation.metrics import Metric
from monkey_model.evaluation.records import Id, Record
from monkey_model.files import atomic, json_lines, list_problems, read_json, sha256_of
from monkey_model.serving.answer import Answerer, Question, answer_file, unanswered

SETTINGS = "settings.json"
SCORES = "scores.json"
RECORDS = "records.jsonl"
WORST = "worst.html"

_CHAT_ENDS = "Answer: "  # of a template, where ChatML says itself whose turn it is


@dataclass(frozen=True)
class Answered:
    """What one side answered.

    Args:
        questions: by id: the question's text.
        answers: by id.
        references: by id, none where nothing says what is right.
        scores: by metric and id.
        images: by id, the pictures' paths.
    """

    questions: Mapping[str | int, str]
    answers: Mapping[str | int, str]
    references: Mapping[str | int, Sequence[str]]
    scores: Mapping[str, Mapping[str | int, float]]
    images: Mapping[str | int, Sequence[str]]


@dataclass(frozen=True)
class Scored:
    """What came out of an evaluation.

    Args:
        records: of the data.
        answers: one for each record.
        scores: by metric, the score of each record.
    """

    records: Sequence[Record]
    answers: Sequence[str]
    scores: Mapping[str, Sequence[float]]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """By metric: the mean, and its standard error (None for one record)."""
        return {name: mean_and_error(values) for name, values in self.scores.items()}

    def by_id(self) -> Answered:
        """The same, by the ids of the records."""
        ids = [record.id for record in self.records]
        questions = [record.question for record in self.records]
        return Answered(
            {question.id: question.text for question in questions},
            dict(zip(ids, self.answers, strict=True)),
            {record.id: record.references for record in self.records},
            {name: dict(zip(ids, values, strict=True)) for name, values in self.scores.items()},
            {question.id: [os.fsdecode(i) for i in question.images] for question in questions},
        )


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of ``values``, and its standard error: None where there is one value alone."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "standard_error": None}
    spread = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return {"mean": mean, "standard_error": math.sqrt(spread / count)}


def score(
    records: Sequence[Record], answers: Mapping[Id, str], metrics: Sequence[Metric]
) -> Scored:
    """Scores of answers by the ids of their records.

    Raises:
        ValueError: a metric that cannot score; records without an answer.
    """
    if lacking := [repr(record.id) for record in records if record.id not in answers]:
        raise ValueError(
            f"{len(lacking)} of {len(records)} questions have no answer: "
            f"{list_problems(lacking, 5, ', ')}"
        )
    given = [answers[record.id] for record in records]
    references = [record.references for record in records]
    return Scored(
        records, given, {metric.name: metric.scores(given, references) for metric in metrics}
    )


def questions_for(records: Sequence[Record], template: str, chat: bool) -> list[Question]:
    """What to ask: in ChatML the words of the template around the question are part of it."""
    if not chat:
        return [record.question for record in records]
    words = template.removesuffix(_CHAT_ENDS).strip()
    return [
        Question(words.replace("{}", record.question.text), record.question.images, record.id)
        for record in records
    ]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return sha256_of(file)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` into a folder, or hold them against those of the answers in it.

    Raises:
        OSError: it cannot be written.
        ValueError: the folder has answers of something else.
    """
    path = folder / SETTINGS
    if found := sorted(file.name for file in folder.glob("answers*.jsonl")):
        if not path.is_file():
            raise ValueError(
                f"{folder} has answers ({found[0]}), but no {SETTINGS} that says of what"
            )
        old = read_json(path)
        for key in sorted({*old, *settings}):
            if f"{key}_sha256" in old:
                continue  # a path: the same file may have several
            if old.get(key) != settings.get(key):
                raise ValueError(
                    f"{folder} has another evaluation's answers: {key} is {old.get(key)!r} there "
                    f"and {settings.get(key)!r} here. Write to another folder"
                )
    else:
        write_json(path, settings)


def answer_all(
    answerer: Callable[[], Answerer],
    questions: Sequence[Question],
    folder: Path,
    *,
    shard: tuple[int, int] | None = None,
    batch_size: int = 1,
    on_done: Callable[[int], None] = lambda count: None,
    on_problem: Callable[[str], None] = lambda message: None,
) -> dict[Id, str]:
    """Answer what no file of the folder answers yet.

    Args:
        answerer: makes one; called only if something is left to answer.
        questions: all of them.
        folder: of the evaluation.
        shard: (i, n) to answer every n-th question alone, from the i-th, counted from 0. Each shard
            has a file of its own, so n processes can run at once.
        batch_size: questions at a time.
        on_done: called with the number of questions that are through.
        on_problem: called with what is wrong with a question that cannot be answered.

    Returns:
        The answers that there are now: to all questions, or to those of the shard.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file holds something else, or answers to other questions.
    """
    if shard is None:
        mine, name, pattern = questions, "answers.jsonl", "answers*.jsonl"
    else:  # the other shards' files may be being written to
        mine = questions[shard[0] :: shard[1]]
        name = pattern = f"answers-{shard[0]}-of-{shard[1]}.jsonl"
    answered = _answers_in(sorted(folder.glob(pattern)), mine)
    left = [question for question in mine if question.id not in answered]
    on_done(len(answered))
    if left:
        answer_file(
            answerer(),
            left,
            folder / name,
            batch_size=batch_size,
            on_done=on_done,
            on_problem=on_problem,
        )
        answered |= _answers_in([folder / name], left)
    return answered


def _answers_in(files: Sequence[Path], questions: Sequence[Question]) -> dict[Id, str]:
    """The answers that files have to these questions; of one question, the first file's."""
    answers: dict[Id, str] = {}
    asked = {question.id for question in questions}
    for path in files:
        asked -= answers.keys()
        unanswered(questions, path)  # checks the file, and removes a last line that was cut off
        for _, record in json_lines(path.read_bytes()):
            if record["id"] in asked:
                answers[record["id"]] = record["answer"]
    return answers


def versions() -> dict[str, str]:
    """Of Python and of what the scores depend on."""
    found = {"python": platform.python_version()}
    for name in ("monkey-vision", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a clone on Python's path
            found[name] = "not installed"
    return found


def write_results(
    folder: Path, scored: Scored, settings: Mapping[str, Any], page: str
) -> dict[str, Any]:
    """Write the records, the page and, last, the scores, each whole.

    Returns:
        What ``scores.json`` holds.

    Raises:
        OSError: a file cannot be written.
    """
    with (
        atomic(folder / RECORDS) as name,
        open(
            # A path that is no UTF-8 has half surrogates, and JSON the same escapes.
            name,
            "w",
            encoding="utf-8",
            errors="backslashreplace",
        ) as file,
    ):
        for number, (record, answer) in enumerate(zip(scored.records, scored.answers, strict=True)):
            line = {
                "id": record.id,
                "question": record.question.text,
                "images": [os.fsdecode(image) for image in record.question.images],
                "answer": answer,
                "references": record.references,
                "scores": {metric: values[number] for metric, values in scored.scores.items()},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with atomic(folder / WORST) as name:
        Path(name).write_text(page, encoding="utf-8")
    pictures = {image for record in scored.records for image in record.question.images}
    content = {
        "scores": scored.summary(),
        "counts": {"records": len(scored.records), "pictures": len(pictures)},
        "settings": dict(settings),
        "versions": versions(),
    }
    write_json(folder / SCORES, content)
    return content


def write_json(path: Path, content: Any) -> None:
    with atomic(path) as name:
        text = json.dumps(content, ensure_ascii=False, indent=1)
        Path(name).write_text(text + "\n", encoding="utf-8")
