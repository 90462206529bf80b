"""``monkey finetune`` and ``monkey merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monkey_model.commands.console import WRONG_INPUT, PickleOption, err_console, one_error, say
from monkey_model.inputs.fetch import shown


def finetune(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file of settings: monkey_model.training.config."),
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
            "--resume",
            help="Go on from the last complete checkpoint; start if there is none. A run that has "
            "finished stays as it is.",
        ),
    ] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Train a model on conversations. Flags outrank the file.

    On several processes: torchrun --nproc_per_node 8 -m monkey_model.commands finetune ...
    """
    from monkey_model.training.config import load_config

    flags = {
        "checkpoint": checkpoint,
        "data": data,
        "output_dir": output_dir,
        "mode": mode,
        "launch": launch,
        "merge": merge or None,
        "allow_pickle": allow_pickle or None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    with one_error(WRONG_INPUT):
        loaded = load_config(config, settings or (), given)
        # Not before: a wrong key should not wait for transformers.
        from monkey_model.training.finetune import finetune as run

        trained = run(loaded, resume=resume)
        _leave_process_group()
    if trained is None:
        message = "the run has finished; nothing has changed"
    else:
        message = "model, loss.png" + ", merged" * loaded.merge
    say(err_console, f"{shown(loaded.output_dir)}: {message}")


def _leave_process_group() -> None:
    """Or a thread of it that is still at work when Python exits aborts the process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def merge(
    adapter: Annotated[Path, typer.Argument(help="What finetune wrote: OUTPUT_DIR/model.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint that it was trained on.")],
    out: Annotated[Path, typer.Option(help="Directory for the merged checkpoint.")],
    allow_pickle: PickleOption = False,
) -> None:
    """Merge LoRA and trained parts into a checkpoint of upstream's layout."""
    from monkey_model.training.finetune import merge as run

    with one_error(WRONG_INPUT):
        if out.exists():
            raise ValueError(f"--out must not exist yet; got {out}")
        run(checkpoint, adapter, out, allow_pickle=allow_pickle)
    say(err_console, f"{shown(str(adapter))} -> {shown(str(out))}")
