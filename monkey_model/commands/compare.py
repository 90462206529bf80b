"""``monkey compare``: what a change of weights or settings does to tokens, answers and scores."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from monkey_model.commands.console import (
    DeviceOption,
    DType,
    DTypeOption,
    PickleOption,
    default_dtype,
    err_console,
    one_error,
    out_console,
    progress_bar,
    say,
    usable_device,
)
from monkey_model.commands.loading import check_output_folder
from monkey_model.files import atomic, check_directory
from monkey_model.inputs.fetch import shown

if TYPE_CHECKING:
    from torch import Tensor

    from monkey_model.evaluation.compare import Side, TokenDistances
    from monkey_model.evaluation.evaluate import Answered
    from monkey_model.evaluation.metrics import Metric
    from monkey_model.evaluation.records import Record
    from monkey_model.serving.answer import Answerer

_SETTINGS = ("interpolation", "fit", "dtype", "quantization", "device")
_PICTURES = 16  # of --data that are encoded where none are given
_SHOWN = 60  # answers on the page


@dataclass
class _Work:
    """What both sides are given."""

    pictures: list[str]
    records: list[Record]
    metrics: list[Metric]
    data: dict[str, Any]  # what the answers' folder says of it
    out: Path
    max_new_tokens: int
    allow_pickle: bool


def _parse_settings(option: str, pairs: Sequence[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name not in _SETTINGS or not equals:
            raise ValueError(
                f"{option} must be NAME=VALUE, NAME one of {', '.join(_SETTINGS)}; got {pair!r}"
            )
        if name == "dtype" and value not in [one.value for one in DType]:
            raise ValueError(f"{option} dtype must be one of {', '.join(DType)}; got {value!r}")
        settings[name] = value
    return settings


def _open(side: str, checkpoint: Path, settings: dict[str, str], work: _Work) -> Side:
    from monkey_model.evaluation.compare import open_side
    from monkey_model.evaluation.datasets import PROMPT

    device = usable_device(settings["device"])
    try:
        return open_side(
            checkpoint,
            device=device,
            dtype=default_dtype(DType(settings["dtype"]), device),
            whole=bool(work.records) or "quantization" in settings,
            allow_pickle=work.allow_pickle,
            cutting={name: settings[name] for name in ("interpolation", "fit") if name in settings},
            max_new_tokens=work.max_new_tokens,
            template=PROMPT,
            quantization=settings.get("quantization"),
        )
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from None


def _answers(name: str, answerer: Answerer, folder: Path, work: _Work) -> Answered:
    from monkey_model.evaluation.evaluate import answer_all, score

    questions = [record.question for record in work.records]
    problems: list[str] = []
    with progress_bar(f"Answering {name}") as progress:
        task = progress.add_task("", total=len(questions))
        answers = answer_all(
            lambda: answerer,
            questions,
            folder,
            on_done=lambda count: progress.advance(task, count),
            on_problem=problems.append,
        )
    if problems:
        raise ValueError(f"{name}: {problems[0]}")
    return score(work.records, answers, work.metrics).by_id()


def _run(
    name: str, checkpoint: Path, settings: dict[str, str], work: _Work
) -> tuple[list[Tensor], Answered | None, tuple[tuple[int, int], list[int | None]]]:
    """What one side makes of the pictures and questions; its grid and adapters."""
    from monkey_model.evaluation.evaluate import claim_folder

    folder = work.out / name.lower()
    if work.records:
        about = {"checkpoint": str(checkpoint.resolve()), "max_new_tokens": work.max_new_tokens}
        claim_folder(folder, {**work.data, **about, **settings})
    side = _open(name, checkpoint, settings, work)
    with progress_bar(f"Encoding {name}") as progress:
        tokens = [side.tokens(picture) for picture in progress.track(work.pictures)]
    answered = None
    if side.answerer is not None and work.records:
        answered = _answers(name, side.answerer, folder, work)
    return tokens, answered, (side.encoder.crop_settings.grid, side.encoder.adapter_index())


def _print(distances: TokenDistances | None, answers: dict[str, Any] | None) -> None:
    if distances is not None:
        summary = distances.summary()
        table = Table("crop", "relative L2", "largest", "cosine distance",
                      title=f"Tokens of {len(distances.pictures)} pictures")  # fmt: skip
        for row in [
            *summary["by_crop"],
            {"crop": "all", **summary, "largest_relative_l2": float(distances.picture_l2.max())},
        ]:
            values = (row["relative_l2"], row["largest_relative_l2"], row["cosine"])
            table.add_row(row["crop"].split(":")[0], *(f"{value:.3g}" for value in values))
        out_console.print(_right(table))
    if answers is not None and answers["scores"]:
        table = Table("metric", "A", "B", "B - A", "standard error", "better", "worse")
        for metric, one in answers["scores"].items():
            error = one["standard_error"]
            table.add_row(
                metric, f"{100 * one['a']:.2f}", f"{100 * one['b']:.2f}",
                f"{100 * one['difference']:+.2f}", "" if error is None else f"{100 * error:.2f}",
                str(one["better"]), str(one["worse"]),
            )  # fmt: skip
        out_console.print(_right(table))
    if answers is not None:
        say(out_console, f"{len(answers['changed'])} of {answers['questions']} answers changed")


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def compare(
    a: Annotated[Path, typer.Argument(help="Checkpoint directory, or folder of evaluate.")],
    b: Annotated[Path, typer.Argument(help="The other one; with --a or --b it may be the same.")],
    pictures: Annotated[
        list[str] | None,
        typer.Argument(help="To compare tokens of. Default: the first of --data."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for comparison.json and comparison.html.")
    ] = ...,  # type: ignore[assignment]
    a_settings: Annotated[
        list[str] | None,
        typer.Option("--a", help=f"NAME=VALUE for A; names: {', '.join(_SETTINGS)}."),
    ] = None,
    b_settings: Annotated[
        list[str] | None, typer.Option("--b", help="The same for B; can be repeated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Questions to ask both, as in monkey evaluate.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Score the answers to --data; can be repeated.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of relative paths in --data. Default: its own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 100,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Compare two encoders, models or settings: tokens, answers and scores."""
    from monkey_model.commands.evaluate import find_metrics
    from monkey_model.evaluation.compare import compare_answers, read_evaluation, token_distances
    from monkey_model.evaluation.compare_page import build_compare_page
    from monkey_model.evaluation.evaluate import SCORES, file_hash, versions, write_json
    from monkey_model.evaluation.records import check_metrics, check_pictures, read_records

    with one_error():
        sides = {
            "a": _parse_settings("--a", a_settings or ()),
            "b": _parse_settings("--b", b_settings or ()),
        }
        check_output_folder(out)
        distances = None
        if (a / SCORES).is_file() and (b / SCORES).is_file():
            if pictures or data or a_settings or b_settings:
                raise ValueError("two folders of monkey evaluate are compared as they are")
            about_a, answered_a = read_evaluation(a)
            about_b, answered_b = read_evaluation(b)
            answers: dict[str, Any] | None = compare_answers(answered_a, answered_b)
        else:
            check_directory("A", a)
            check_directory("B", b)
            target = usable_device(device)
            common = {
                "dtype": str(default_dtype(dtype, target)).removeprefix("torch."),
                "device": str(target),
            }
            sides = {name: {**common, **settings} for name, settings in sides.items()}
            if a.resolve() == b.resolve() and sides["a"] == sides["b"]:
                raise ValueError("A and B must differ, in a checkpoint or in a setting (--a, --b)")
            metrics = find_metrics(metric or [])
            if metrics and data is None:
                raise ValueError("--metric needs --data, the questions")
            records = [] if data is None else read_records(
                data, image_root=root, answered=bool(metrics)
            )  # fmt: skip
            check_metrics(metrics, records)
            check_pictures(records)
            images = [str(image) for record in records for image in record.question.images]
            pictures = pictures or list(dict.fromkeys(images))[:_PICTURES]
            if not pictures:
                raise ValueError("give PICTURES, or --data with some")
            hashed = {} if data is None else {"data": str(data), "data_sha256": file_hash(data)}
            work = _Work(pictures, records, metrics, hashed, out, max_new_tokens, allow_pickle)
            one, asked_a, cut_a = _run("A", a, sides["a"], work)
            gc.collect()  # B needs the memory
            other, asked_b, cut_b = _run("B", b, sides["b"], work)
            if cut_a[0] != cut_b[0]:
                raise ValueError(f"A and B must have the same grid; got {cut_a[0]} and {cut_b[0]}")
            distances = token_distances(pictures, one, other, *cut_a)
            answers = None
            if asked_a is not None and asked_b is not None:
                answers = compare_answers(asked_a, asked_b)
            about_a = {"checkpoint": str(a), **sides["a"]}
            about_b = {"checkpoint": str(b), **sides["b"]}
        content = {
            "a": about_a,
            "b": about_b,
            "tokens": None if distances is None else distances.summary(),
            "answers": answers,
            "versions": versions(),
        }
        page = build_compare_page(about_a, about_b, distances, answers, _SHOWN)
        with atomic(out / "comparison.html") as file:
            Path(file).write_text(page, encoding="utf-8")
        write_json(out / "comparison.json", content)
    _print(distances, answers)
    say(err_console, f"{shown(str(out / 'comparison.html'))} shows more")
