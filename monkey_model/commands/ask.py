"""``monkey ask``: questions about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    one_error,
    out_console,
    progress_bar,
    report,
    say,
)
from monkey_model.commands.loading import (
    DeviceMapOption,
    QuantizationOption,
    check_one_place,
    load_answerer,
)

if TYPE_CHECKING:
    from monkey_model.serving.answer import Answerer, Question


def _answer(answerer: Answerer, question: Question, checkpoint: str | None) -> None:
    """Print an answer: as JSON if a checkpoint is given, on a terminal as it is written."""
    from monkey_model.serving.answer import answer_record

    if checkpoint is not None or not out_console.is_terminal:
        (answer,) = answerer.answer([question])
        if checkpoint is None:
            say(out_console, answer)
        else:
            typer.echo(answer_record(question, answer, checkpoint), nl=False)
        return
    written = ""
    for text in answerer.stream(answerer.prompt(question), answerer.read_images(question)):
        say(out_console, text[len(written) :], end="")
        written = text
    say(out_console, "")


def ask(
    image: Annotated[str | None, typer.Argument(help="The picture.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to ask about it.")] = None,
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint directory, or OUTPUT_DIR/model of finetune.")
    ] = ...,  # type: ignore[assignment]
    batch: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"image" or "images", "question", "id"} instead of IMAGE.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL of answers, with --batch; what it has is skipped.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in one pass.")] = 1,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of relative paths in --batch. Default: its own.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in ChatML.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as a line of --out's.")
    ] = False,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Ask a model about a picture, or about many with --batch and --out."""
    single = image is not None and question is not None and batch is None and out is None
    many = image is None and question is None and batch is not None and out is not None
    if not (single or many):
        raise typer.BadParameter("give IMAGE and QUESTION, or --batch and --out")
    if as_json and many:
        raise typer.BadParameter("--json is for one question; --out has such lines anyway")
    check_one_place(device, device_map)
    if batch is not None and out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"--out must be a file; got the directory {out}")
        if out.resolve() == batch.resolve():
            raise typer.BadParameter("--out must be another file than --batch")

    from monkey_model.serving.answer import (
        Question,
        answer_file,
        read_questions,
    )

    def load() -> Answerer:
        return load_answerer(
            checkpoint,
            device,
            device_map,
            quantization,
            dtype,
            allow_pickle=allow_pickle,
            chat=chat,
            max_new_tokens=max_new_tokens,
        )

    problems: list[str] = []
    whose = str(checkpoint.resolve())
    with one_error():
        if batch is None or out is None:
            one = Question(str(question), (image,), 1)
            _answer(load(), one, whose if as_json else None)
            return
        questions, problems = read_questions(batch, image_root)
        for problem in problems:
            report(problem)
        with progress_bar("Asking") as progress:
            task = progress.add_task("Asking", total=len(questions))
            failed = answer_file(
                load,
                questions,
                out,
                checkpoint=whose,
                batch_size=batch_size,
                on_done=lambda count: progress.advance(task, count),
                on_problem=report,
            )
    if failed or problems:
        count = failed + len(problems)
        report(f"{count} of {len(questions) + len(problems)} questions were not answered")
        raise typer.Exit(1)
