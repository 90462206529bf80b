"""``monkey demo``: a page to show the model a picture on and talk about it."""

from __future__ import annotations

import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    check_free,
    default_dtype,
    err_console,
    one_error,
    say,
    usable_device,
)
from monkey_model.commands.demo_checkpoint import write_demo_checkpoint
from monkey_model.files import need_extra
from monkey_model.inputs.fetch import shown

_RANDOM = (
    "No checkpoint was given: a tiny model of random weights answers, to try the page. What it "
    "says carries no meaning."
)
_RANDOM_TOKENS = 48  # it would not stop by itself


def _wait() -> None:
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="Checkpoint directory, or OUTPUT_DIR/model of finetune. Without it, a tiny model "
            "of random weights.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Others than 127.0.0.1 let others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Serve a page for a browser: a picture, a talk about it, boxes, and the crops."""
    from PIL import Image

    from monkey_model.serving.answer import Answerer
    from monkey_model.serving.demo import serving

    # The limit itself is an error of load_image's; this process is ours to keep quiet.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with one_error():
        # What is wrong with these should not wait for the model.
        need_extra("gradio", "demo", "monkey demo")
        check_free(host, port)
        target = usable_device(device)
        with tempfile.TemporaryDirectory() as folder:
            note = f"Checkpoint: `{shown(str(checkpoint)).replace('`', '')}`"
            if checkpoint is None:
                note = _RANDOM
                max_new_tokens = min(max_new_tokens, _RANDOM_TOKENS)
                write_demo_checkpoint(folder)
            answerer = Answerer.from_pretrained(
                folder if checkpoint is None else checkpoint,
                device=target,
                dtype=default_dtype(dtype, target),
                allow_pickle=allow_pickle,
                max_new_tokens=max_new_tokens,
            )
            say(err_console, note)
            with serving(answerer, note, host, port) as address:
                say(err_console, f"{address} (Ctrl-C ends it)")
                _wait()
