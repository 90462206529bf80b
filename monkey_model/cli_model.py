"""The commands that take the whole model: ``monkey finetune``, ``monkey merge``, ``monkey ask``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monkey_model.console import (
    DeviceOption,
    DTypeOption,
    default_dtype,
    err_console,
    out_console,
    progress_bar,
    report,
    say,
    shown,
    usable_device,
)

# torch and transformers take seconds to import: they are imported where they are used.


def finetune(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file of settings: monkey_model.finetune_config."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    data: Annotated[str | None, typer.Option(help="Conversations, JSON or JSONL.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where everything goes.")] = None,
    mode: Annotated[str | None, typer.Option(help="lora, full or frozen.")] = None,
    launch: Annotated[
        str | None, typer.Option(help="ddp, fsdp2, zero2, zero3, or a file like theirs.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, such as training.learning_rate=2e-5. Can be repeated.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write a checkpoint with LoRA merged.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last complete checkpoint; start if there is none."
        ),
    ] = False,
) -> None:
    """Train a model on conversations. Flags outrank the file.

    On several processes: torchrun --nproc_per_node 8 -m monkey_model.cli finetune --config FILE
    """
    from monkey_model.finetune_config import load_config

    flags = {
        "checkpoint": checkpoint,
        "data": data,
        "output_dir": output_dir,
        "mode": mode,
        "launch": launch,
        "merge": merge or None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        loaded = load_config(config, settings or (), given)
        # Not before: a wrong key should not wait for transformers.
        from monkey_model.finetune import finetune as run

        run(loaded, resume=resume)
    except (OSError, TypeError, ValueError, ImportError) as error:
        report(str(error))
        raise typer.Exit(2) from None
    written = "model, loss.png" + ", merged" * loaded.merge
    say(err_console, f"{shown(loaded.output_dir)}: {written}")


def merge(
    adapter: Annotated[Path, typer.Argument(help="What finetune wrote: OUTPUT_DIR/model.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint that it was trained on.")],
    out: Annotated[Path, typer.Option(help="Directory for the merged checkpoint.")],
) -> None:
    """Merge LoRA and trained parts into a checkpoint of upstream's layout."""
    from monkey_model.finetune import merge as run

    try:
        if out.exists():
            raise ValueError(f"--out must not exist yet; got {out}")
        run(checkpoint, adapter, out)
    except (OSError, ValueError) as error:
        report(str(error))
        raise typer.Exit(2) from None
    say(err_console, f"{shown(str(adapter))} -> {shown(str(out))}")


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

    from monkey_model.ask import Asker, Question, answer_file, read_questions, unanswered

    problems: list[str] = []
    try:
        if batch is not None and out is not None:
            questions, problems = read_questions(batch, image_root)
            for problem in problems:
                report(problem)
            unanswered(questions, out)  # what is wrong there should not wait for the model
        target = usable_device(device)
        asker = Asker.from_pretrained(
            checkpoint,
            device=target,
            dtype=default_dtype(dtype, target),
            chat=chat,
            max_new_tokens=max_new_tokens,
        )
        if batch is None or out is None:
            say(out_console, asker.answer([Question(str(question), (image,))])[0])
            return
        with progress_bar("Asking") as progress:
            task = progress.add_task("Asking", total=len(questions))
            failed = answer_file(
                asker,
                questions,
                out,
                batch_size=batch_size,
                on_done=lambda count: progress.advance(task, count),
                on_problem=report,
            )
    except (OSError, TypeError, ValueError) as error:
        report(str(error))
        raise typer.Exit(2) from None
    if failed or problems:
        count = failed + len(problems)
        report(f"{count} of {len(questions) + len(problems)} questions were not answered")
        raise typer.Exit(1)
