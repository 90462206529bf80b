"""``monkey ask``: questions about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    default_dtype,
    out_console,
    progress_bar,
    report,
    say,
    usable_device,
)


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
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Ask a model about a picture, or about many with --batch and --out."""
    single = image is not None and question is not None and batch is None and out is None
    many = image is None and question is None and batch is not None and out is not None
    if not (single or many):
        raise typer.BadParameter("give IMAGE and QUESTION, or --batch and --out")
    if batch is not None and out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"--out must be a file; got the directory {out}")
        if out.resolve() == batch.resolve():
            raise typer.BadParameter("--out must be another file than --batch")

    from monkey_model.serving.answer import (
        Answerer,
        Question,
        answer_file,
        read_questions,
        unanswered,
    )

    problems: list[str] = []
    try:
        if batch is not None and out is not None:
            questions, problems = read_questions(batch, image_root)
            for problem in problems:
                report(problem)
            unanswered(questions, out)  # what is wrong there should not wait for the model
        target = usable_device(device)
        answerer = Answerer.from_pretrained(
            checkpoint,
            device=target,
            dtype=default_dtype(dtype, target),
            allow_pickle=allow_pickle,
            chat=chat,
            max_new_tokens=max_new_tokens,
        )
        if batch is None or out is None:
            say(out_console, answerer.answer([Question(str(question), (image,))])[0])
            return
        with progress_bar("Asking") as progress:
            task = progress.add_task("Asking", total=len(questions))
            failed = answer_file(
                answerer,
                questions,
                out,
                batch_size=batch_size,
                on_done=lambda count: progress.advance(task, count),
                on_problem=report,
            )
    except (
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # the last: a backend, or memory
        report(str(error))
        raise typer.Exit(2) from None
    if failed or problems:
        count = failed + len(problems)
        report(f"{count} of {len(questions) + len(problems)} questions were not answered")
        raise typer.Exit(1)
