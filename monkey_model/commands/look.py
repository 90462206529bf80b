"""``monkey look``: a page that shows where a model looks in a picture."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    default_dtype,
    err_console,
    one_error,
    say,
    usable_device,
)
from monkey_model.commands.encode import Fit, Interpolation
from monkey_model.files import atomic
from monkey_model.inputs.fetch import shown

if TYPE_CHECKING:
    import torch

    from monkey_model.serving.look import Look


def _check_outputs(image: str, out: Path, png: Path | None) -> None:
    """What is wrong with an output should not wait for the model."""
    if out.is_dir():
        raise ValueError(f"--out must be a file; got the directory {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out must be in a directory that exists; got {out}")
    if os.path.realpath(out) == os.path.realpath(image):
        raise ValueError(f"--out must be another file than IMAGE; got {out}")
    with atomic(out, keep=False):
        pass
    if png is None:
        return
    if png.exists() and not png.is_dir():
        raise ValueError(f"--png must be a directory; got the file {png}")
    if not png.parent.is_dir():
        raise ValueError(f"--png must be in a directory that exists; got {png}")
    with atomic(png / "x" if png.is_dir() else png, keep=False):
        pass


def _look(
    image: str,
    question: str | None,
    checkpoint: Path | None,
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    chat: bool,
    max_new_tokens: int,
) -> Look:
    from monkey_model.checkpoint import load_visual
    from monkey_model.serving.answer import Answerer
    from monkey_model.serving.encode_files import seeded_encoder
    from monkey_model.serving.look import look, look_and_ask

    if checkpoint is None:
        return look(seeded_encoder(device=device, dtype=dtype, **settings), image)
    if question is None:
        encoder = load_visual(
            checkpoint, device=device, dtype=dtype, allow_pickle=allow_pickle, **settings
        )
        return look(encoder, image)
    answerer = Answerer.from_pretrained(
        checkpoint,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        chat=chat,
        max_new_tokens=max_new_tokens,
    )
    for name, value in settings.items():
        setattr(answerer.processor.image_processor, name, value)
    return look_and_ask(answerer, image, question)


def look(
    image: Annotated[str, typer.Argument(help="The picture.")],
    out: Annotated[Path, typer.Option(help="The page, an HTML file.")],
    question: Annotated[
        str | None, typer.Option(help="What to ask; the page shows what the answer attended to.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Monkey checkpoint directory; without it, random weights.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Folder that gets the page's panels as PNG files, too.")
    ] = None,
    interpolation: Annotated[
        Interpolation | None, typer.Option(help="Resize filter. Default: the config's, bicubic.")
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(help="How an aspect ratio meets the canvas. Default: the config's, stretch."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in ChatML.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Show where a model looks in a picture: one HTML page that needs no network."""
    settings = {"interpolation": interpolation, "fit": fit}
    with one_error():
        if question is not None and checkpoint is None:
            raise ValueError("--question needs --checkpoint, the directory of a whole model")
        _check_outputs(image, out, png)

        from PIL import Image

        # The limit itself is an error of load_image's; this process is ours to keep quiet.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        target = usable_device(device)
        seen = _look(
            image,
            question,
            checkpoint,
            {name: value.value for name, value in settings.items() if value is not None},
            target,
            default_dtype(dtype, target),
            allow_pickle,
            chat,
            max_new_tokens,
        )
        from monkey_model.serving.look_page import build_page, draw_figures

        note = f"Checkpoint: {shown(str(checkpoint))}"
        if checkpoint is None:
            note = (
                "No checkpoint: a small encoder with random weights (seed 0) stands in. "
                "These maps carry no meaning."
            )
            say(err_console, note)
        page = build_page(seen, shown(Path(image).name), note)
        pngs = {} if png is None else draw_figures(seen)
        panels = {} if png is None else {png / name: content for name, content in pngs.items()}
        for path in panels:
            if os.path.realpath(path) in (os.path.realpath(image), os.path.realpath(out)):
                raise ValueError(f"--png must not write over IMAGE or --out; it would, to {path}")
        for path, content in panels.items():
            with atomic(path) as file:
                Path(file).write_bytes(content)
        with atomic(out) as file:
            Path(file).write_text(page, encoding="utf-8")
    if png is not None:
        say(err_console, f"{', '.join(pngs)} -> {shown(str(png))}")
    say(err_console, f"{shown(image)} -> {shown(str(out))}")
