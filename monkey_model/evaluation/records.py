"""Questions with what is right: upstream's JSONL, VQA's JSON files, and predictions for them."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monkey_model.evaluation.metrics import Metric
from monkey_model.files import json_lines, list_problems, parse_json, read_json, read_text
from monkey_model.serving.answer import Question, read_question

Id = str | int


@dataclass(frozen=True)
class Record:
    """A question and the answers that are right, of which a metric makes what it will."""

    question: Question
    references: tuple[str, ...]

    @property
    def id(self) -> Id:
        return self.question.id


def read_records(
    data: str | Path,
    *,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    image_pattern: str | None = None,
    number_lines: bool = False,
    answered: bool = True,
) -> list[Record]:
    """The records of a data set.

    Args:
        data: JSONL of ``{"image", "question", "answer", "question_id"}``, as upstream has it: the
            answer is a string or a list of them; without ``"question_id"`` (or ``"id"``) it is the
            line's number. Or VQA's JSON of questions, named ``*.json``.
        annotations: VQA's JSON of annotations. The answers are then its, by ``"question_id"``.
        image_root: folder of relative paths; by default the data's own.
        image_pattern: the picture's path for VQA's questions, such as
            ``"val2014/COCO_val2014_{image_id:012}.jpg"``; by default what ``"image"`` says.
        number_lines: whether ids are the lines' numbers even where there are others, for files
            whose ids repeat.
        answered: whether a record must have an answer; references are empty where it has none.

    Raises:
        OSError: a file cannot be read.
        ValueError: a record that is none, or has no answer; the message names it.
    """
    data = Path(data)
    root = data.parent if image_root is None else Path(image_root)
    answers = None if annotations is None else _read_annotations(Path(annotations))
    records: list[Record] = []
    problems: list[str] = []
    places: dict[Id, str] = {}
    for place, content, number in _contents(data, image_pattern):
        try:
            record = _record(content, number, root, answers, number_lines, answered)
            if record.id in places:
                raise ValueError(
                    f"'question_id' {record.id!r} must differ from that of {places[record.id]}; "
                    "number the lines (--number-lines) where ids repeat"
                )
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        places[record.id] = place
        records.append(record)
    if problems:
        raise ValueError(f"{data} has records that cannot be used: {list_problems(problems, 5)}")
    if not records:
        raise ValueError(f"{data} must have a question; it has none")
    return records


def _contents(data: Path, image_pattern: str | None) -> Iterable[tuple[str, Any, int]]:
    """Place, content and number of each record."""
    if data.suffix != ".json":
        if image_pattern is not None:
            raise ValueError(f"image_pattern is for VQA's *.json questions; got the data {data}")
        for number, content in json_lines(read_text(data)):
            yield f"line {number}", content, number
        return
    for number, content in enumerate(_list_in(data, "questions")):
        if image_pattern is not None and isinstance(content, dict):
            content = {**content, "image": _picture(image_pattern, content)}
        yield f"question {number}", content, number


def _picture(pattern: str, content: Mapping[str, Any]) -> str:
    try:
        return pattern.format_map(content)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"image_pattern must fit the questions, whose keys are {sorted(content)}; "
            f"got {pattern!r}: {error!r}"
        ) from None


def _list_in(path: Path, key: str) -> list[Any]:
    content = read_json(path).get(key)
    if not isinstance(content, list):
        raise ValueError(f"{path} must have a list {key!r}; got {reprlib.repr(content)}")
    return content


def _read_annotations(path: Path) -> dict[Id, tuple[str, ...]]:
    """VQA's: the people's answers by the question's id."""
    answers: dict[Id, tuple[str, ...]] = {}
    for number, content in enumerate(_list_in(path, "annotations")):
        try:
            name, given = content["question_id"], [one["answer"] for one in content["answers"]]
            if type(name) not in (str, int):
                raise TypeError
            answers[name] = _references(given)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, annotation {number} must have a 'question_id' and 'answers' of "
                f"{{'answer': text}}; got {reprlib.repr(content)}"
            ) from None
    return answers


def _references(answer: Any) -> tuple[str, ...]:
    references = [answer] if isinstance(answer, str) else answer
    if (
        not isinstance(references, list)
        or not references
        or not all(isinstance(reference, str) for reference in references)
    ):
        raise ValueError(
            f"'answer' must be a string, or a list of them; got {reprlib.repr(answer)}"
        )
    return tuple(references)


def _record(
    content: Any,
    number: int,
    root: Path,
    answers: Mapping[Id, tuple[str, ...]] | None,
    number_lines: bool,
    answered: bool,
) -> Record:
    own: Any = number
    if isinstance(content, dict):
        own = content.get("question_id", content.get("id", number))
        content = {**content, "id": number if number_lines else own}
    question = read_question(content, number, root)
    if answers is None:
        if "answer" not in content:
            if not answered:
                return Record(question, ())
            raise ValueError(f"must have an 'answer', or a file of annotations; id {own!r}")
        return Record(question, _references(content["answer"]))
    if own not in answers:
        raise ValueError(f"the annotations must have its 'question_id'; they lack {own!r}")
    return Record(question, answers[own])


def check_metrics(metrics: Sequence[Metric], records: Sequence[Record]) -> None:
    """Raise a ValueError, which names the records, if a metric does not fit the data."""
    for metric in metrics:
        metric.check(len(records))
        problems = [
            f"id {record.id!r}: {problem}"
            for record in records
            if (problem := metric.misfit(record.references)) is not None
        ]
        if problems:
            raise ValueError(
                f"metric {metric.name} does not fit the data: {list_problems(problems, 3)}"
            )


def check_pictures(records: Sequence[Record]) -> None:
    """Raise a FileNotFoundError, which names the records, if a picture is missing."""
    missing = [
        f"id {record.id!r}: {image}"
        for record in records
        for image in record.question.images
        if not os.path.isfile(image)
    ]
    if missing:
        raise FileNotFoundError(f"pictures are missing: {list_problems(missing, 5)}")


def read_predictions(path: str | Path, records: Sequence[Record]) -> dict[Id, str]:
    """The answers of a file, one for each record.

    Args:
        path: JSONL, or a JSON list (``*.json``), of ``{"answer"}`` with an ``"id"``,
            ``"question_id"`` or ``"questionId"``: what ``monkey ask --batch`` and upstream's
            evaluation write.
        records: that they should answer.

    Raises:
        OSError: the file cannot be read.
        ValueError: a prediction that is none, that is there twice or belongs to another question;
            a record without one. The message names it.
    """
    path = Path(path)
    asked = {record.id: record.question for record in records}
    answers: dict[Id, str] = {}
    problems: list[str] = []
    for place, content in _predictions(path):
        name = next(
            (content[key] for key in ("id", "question_id", "questionId") if key in content), None
        ) if isinstance(content, dict) else None  # fmt: skip
        if type(name) not in (str, int) or not isinstance(content.get("answer"), str):
            got = content if isinstance(content, ValueError) else reprlib.repr(content)
            problems.append(f"{place} must have an 'answer' and a 'question_id' or 'id'; got {got}")
        elif name not in asked:
            problems.append(f"{place} answers {name!r}, which the data does not ask")
        elif name in answers:
            problems.append(f"{place} answers {name!r} again")
        elif "images" in content and content.get("question") != asked[name].text:
            problems.append(
                f"{place} answers {content.get('question')!r}, but {name!r} asks "
                f"{asked[name].text!r}"
            )
        else:
            answers[name] = content["answer"]
    if problems:
        raise ValueError(f"{path} must hold predictions for the data: {list_problems(problems, 3)}")
    if lacking := [repr(name) for name in asked if name not in answers]:
        raise ValueError(
            f"{path} must answer every question; it lacks {list_problems(lacking, 5, ', ')}"
        )
    return answers


def _predictions(path: Path) -> Iterable[tuple[str, Any]]:
    if path.suffix != ".json":
        for number, content in json_lines(read_text(path)):
            yield f"line {number}", content
        return
    try:
        contents = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(contents, list):
        raise ValueError(f"{path} must hold a list; got {type(contents).__name__}")
    for number, content in enumerate(contents):
        yield f"prediction {number}", content
