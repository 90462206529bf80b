"""The ``monkey`` command."""

from __future__ import annotations

import os
import sys

import typer

from monkey_model.commands import ask, doctor, encode, finetune

# torch takes seconds to import, so `monkey --help` does without: it is imported where it is used.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The Monkey multimodal model and its visual encoder.",
)
for command in (ask.ask, finetune.finetune, finetune.merge, encode.encode, doctor.doctor):
    app.command()(command)


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
