"""``monkey evaluate``: how well a model answers the questions of a data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    ShardOption,
    default_dtype,
    err_console,
    one_error,
    out_console,
    parse_shard,
    progress_bar,
    report,
    say,
    usable_device,
)
from monkey_model.commands.loading import (
    DeviceMapOption,
    QuantizationOption,
    check_one_place,
    check_output_folder,
    load_answerer,
)
from monkey_model.files import check_directory
from monkey_model.inputs.fetch import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from monkey_model.evaluation.datasets import DataSet
    from monkey_model.evaluation.metrics import Metric
    from monkey_model.evaluation.records import Id, Record
    from monkey_model.serving.answer import Answerer


def _print_list(root: Path) -> None:
    """The data sets, and whether their files are there; and the metrics."""
    from monkey_model.evaluation.datasets import DATA_SETS
    from monkey_model.evaluation.metrics import METRICS

    table = Table("data set", "metric", "files", "there")
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut off is of no use
    for one in DATA_SETS.values():
        files = [file for file in (one.data, one.annotations) if file is not None]
        there = all((root / file).is_file() for file in files)
        table.add_row(one.name, "\n".join(one.metrics), "\n".join(files), "yes" if there else "no")
    out_console.print(table)
    table = Table("metric", "about")
    for metric in METRICS.values():
        table.add_row(metric.name, metric.about)
    out_console.print(table)


def _known(name: str, options: dict[str, Any]) -> DataSet:
    """The data set of --list, which has what ``options`` would say."""
    from monkey_model.evaluation.datasets import DATA_SETS

    if name not in DATA_SETS:
        raise ValueError(f"data set must be one of {', '.join(DATA_SETS)} (--list); got {name!r}")
    for option, given in options.items():
        if given is not None:
            raise ValueError(f"{option} is for --data; {name} has its own")
    return DATA_SETS[name]


def _hashed(**files: Path | None) -> dict[str, str]:
    """Paths and hashes of the files that are given."""
    from monkey_model.evaluation.evaluate import file_hash

    found: dict[str, str] = {}
    for name, path in files.items():
        if path is not None:
            found |= {name: str(path), f"{name}_sha256": file_hash(path)}
    return found


def find_metrics(names: list[str]) -> list[Metric]:
    """The metrics of these names."""
    from monkey_model.evaluation.metrics import METRICS

    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metric must be one of {', '.join(METRICS)}; got {name!r}")
    return [METRICS[name] for name in dict.fromkeys(names)]


def _print_scores(title: str, content: dict[str, Any]) -> None:
    table = Table("metric", "score", "standard error", "questions", title=shown(title))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, score in content["scores"].items():
        error = score["standard_error"]
        table.add_row(
            name, f"{100 * score['mean']:.2f}", "" if error is None else f"{100 * error:.2f}",
            str(content["counts"]["records"]),
        )  # fmt: skip
    out_console.print(table)


def _ask(
    records: list[Record],
    out: Path,
    load: Callable[[], Answerer],
    settings: dict[str, Any],
    shard: tuple[int, int] | None,
    batch_size: int,
) -> tuple[dict[Id, str], int]:
    """The answers, and how many questions they should answer."""
    from monkey_model.evaluation.evaluate import answer_all, questions_for
    from monkey_model.evaluation.records import check_pictures

    check_pictures(records)
    questions = questions_for(records, settings["prompt"], settings["chat"])
    mine = len(questions if shard is None else questions[shard[0] :: shard[1]])
    with progress_bar("Answering") as progress:
        task = progress.add_task("Answering", total=mine)
        answers = answer_all(
            load,
            questions,
            out,
            shard=shard,
            batch_size=batch_size,
            on_done=lambda count: progress.advance(task, count),
            on_problem=report,
        )
    return answers, mine


def evaluate(
    name: Annotated[str | None, typer.Argument(help="A data set of --list.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers, scores and the page of worst cases.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint directory, or OUTPUT_DIR/model of finetune.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score these answers (JSONL, or a JSON list) instead of a model's."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL of {"image", "question", "answer", "question_id"}, or VQA\'s JSON of '
            "questions, instead of NAME."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="With --data, or more for NAME; can be repeated.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="VQA's JSON of annotations, with --data.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of relative paths. Default: the current one for NAME, --data's own else."
        ),
    ] = None,
    image_pattern: Annotated[
        str | None,
        typer.Option(help="Picture of a VQA question, such as COCO_val2014_{image_id:012}.jpg."),
    ] = None,
    number_lines: Annotated[
        bool, typer.Option("--number-lines", help="Take lines' numbers for ids, if these repeat.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(help='Text after the picture, {} being the question. Default: "{} Answer: ".'),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: NAME's, or 100.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in ChatML.")] = False,
    shard: ShardOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in one pass.")] = 1,
    worst: Annotated[int, typer.Option(min=1, help="Cases on the page.")] = 60,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Print data sets, the files they need, and metrics.")
    ] = False,
) -> None:
    """Score a model, or answers that are there already, on a data set."""
    if list_all:
        _print_list(root or Path())
        return
    if (name is None) == (data is None):
        raise typer.BadParameter("give NAME or --data (--list prints the names)")
    if (checkpoint is None) == (predictions is None):
        raise typer.BadParameter("give --checkpoint or --predictions")
    if out is None:
        raise typer.BadParameter("give --out, a folder for answers and scores")
    check_one_place(device, device_map)

    from monkey_model.evaluation.datasets import PROMPT, DataSet
    from monkey_model.evaluation.evaluate import (
        WORST,
        claim_folder,
        score,
        write_results,
    )
    from monkey_model.evaluation.records import check_metrics, read_predictions, read_records
    from monkey_model.evaluation.worst_page import build_worst_page

    with one_error():
        check_output_folder(out)
        part = None if shard is None else parse_shard(shard)
        if part is not None and checkpoint is None:
            raise ValueError("--shard is for --checkpoint: predictions are scored at once")
        if prompt is not None and "{}" not in prompt:
            raise ValueError(f"--prompt must have a place {{}} for the question; got {prompt!r}")
        if data is not None:
            chosen = DataSet(data.name, str(data), (), 100, prompt=prompt or PROMPT)
            folder, image_root = Path(), root
        else:
            its_own = {"--annotations": annotations, "--prompt": prompt,
                       "--image-pattern": image_pattern}  # fmt: skip
            chosen = _known(str(name), its_own)
            folder = image_root = root or Path()
            if chosen.annotations is not None:
                annotations = folder / chosen.annotations
        data = folder / chosen.data
        metrics = find_metrics([*chosen.metrics, *(metric or ())])
        if not metrics:
            raise ValueError("--data needs a --metric (--list has them)")
        records = read_records(
            data,
            annotations=annotations,
            image_root=image_root,
            image_pattern=image_pattern,
            number_lines=number_lines,
        )
        check_metrics(metrics, records)
        settings: dict[str, Any] = {
            "data_set": chosen.name,
            **_hashed(data=data, annotations=annotations, predictions=predictions),
        }
        if predictions is not None:
            answers, asked = read_predictions(predictions, records), len(records)
            claim_folder(out, settings)
        else:
            assert checkpoint is not None
            check_directory("checkpoint", checkpoint)
            asking = {
                "chat": chat,
                "max_new_tokens": max_new_tokens or chosen.max_new_tokens,
            }
            target_dtype = default_dtype(dtype, usable_device(device))
            settings |= {
                "checkpoint": str(checkpoint.resolve()),
                "dtype": str(target_dtype).removeprefix("torch."),
                "quantization": None if quantization is None else quantization.value,
                "prompt": chosen.prompt,
                **asking,
            }
            claim_folder(out, settings)
            load = partial(
                load_answerer, checkpoint, device, device_map, quantization, dtype,
                allow_pickle=allow_pickle, template=chosen.prompt, **asking,
            )  # fmt: skip
            answers, asked = _ask(records, out, load, settings, part, batch_size)
        content = None
        if len(answers) == asked and part is None:
            scored = score(records, answers, metrics)
            page = build_worst_page(scored, shown(chosen.name), settings, worst)
            content = write_results(out, scored, settings, page)
    if len(answers) < asked:
        report(f"{asked - len(answers)} of {asked} questions were not answered")
        raise typer.Exit(1)
    if content is None:
        say(err_console, f"{asked} questions answered. Score all without --shard.")
        return
    _print_scores(chosen.name, content)
    say(err_console, f"{shown(str(out / WORST))} has the worst cases")
