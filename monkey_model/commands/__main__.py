"""The ``monkey`` command."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from monkey_model.commands import (
    ask,
    compare,
    demo,
    demo_checkpoint,
    doctor,
    encode,
    evaluate,
    export,
    finetune,
    look,
    serve,
)

# torch takes seconds to import, so `monkey --help` does without: it is imported where it is used.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    ask.ask,
    finetune.finetune,
    finetune.merge,
    encode.encode,
    look.look,
    evaluate.evaluate,
    compare.compare,
    export.export,
    demo.demo,
    demo_checkpoint.demo_checkpoint,
    doctor.doctor,
):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"monkey-vision {version('monkey-vision')}")
        except PackageNotFoundError:  # a clone on Python's path
            print("monkey-vision is not installed, so that it has no version")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """The Monkey multimodal model and its visual encoder."""


def main() -> None:
    """Entry point of the ``monkey`` command."""
    try:
        app()
    except OSError as error:  # of the terminal or pipe: the commands report all others
        # Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"Error: output: {error}")


if __name__ == "__main__":
    main()
