"""``monkey export``: a checkpoint in the form of another model, for other engines."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from monkey_model.commands.console import (
    PickleOption,
    err_console,
    one_error,
    say,
    shown,
)


class Target(str, Enum):
    qwen2 = "qwen2"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, of a whole model.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    to: Annotated[Target, typer.Option(help="What the language model becomes.")] = Target.qwen2,
    allow_pickle: PickleOption = False,
) -> None:
    """Write the language model for other engines, and the visual encoder in OUT/visual."""
    from monkey_model.serving.export import export_qwen2

    with one_error():
        config = export_qwen2(checkpoint, out, allow_pickle=allow_pickle)
    length = config.max_position_embeddings
    say(
        err_console,
        f"{shown(str(checkpoint))} -> {shown(str(out))}: the same up to {length} tokens",
    )
