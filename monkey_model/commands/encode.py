"""``monkey encode``: pictures in, files of visual tokens out."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from monkey_model.commands.console import (
    DeviceOption,
    DTypeOption,
    PickleOption,
    default_dtype,
    err_console,
    progress_bar,
    report,
    say,
    usable_device,
)


class Interpolation(str, Enum):
    bilinear = "bilinear"
    bicubic = "bicubic"


class Fit(str, Enum):
    stretch = "stretch"
    crop = "crop"
    pad = "pad"


def _parse_grid(text: str) -> tuple[int, int]:
    rows, x, columns = text.lower().partition("x")
    if not (x and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise typer.BadParameter(f"--grid must be ROWSxCOLUMNS, such as 2x2; got {text!r}")
    return int(rows), int(columns)


def encode(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Pictures to encode.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Monkey checkpoint directory; without it, random weights.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="One image: a .safetensors file (default tokens.safetensors). Several: a folder "
            "(default tokens) that gets NAME.safetensors for each."
        ),
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(help="Resize filter. Default: the config's, bicubic."),
    ] = None,
    fit: Annotated[
        Fit | None, typer.Option(help="How an aspect ratio meets the canvas. Default: stretch.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="ROWSxCOLUMNS of local crops. Default: the config's, 2x2.")
    ] = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one pass.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding threads. Default: one per core, up to 16."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="PNG of the first image's crops and their adapters.")
    ] = None,
    fast_decode: Annotated[
        bool,
        typer.Option(
            "--fast-decode", help="Decode large JPEGs at a reduced size: faster, other pixels."
        ),
    ] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s) images.")] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Turn pictures into visual tokens, one .safetensors file for each."""
    grid_size = None if grid is None else _parse_grid(grid)

    from PIL import Image

    from monkey_model.checkpoint import load_visual
    from monkey_model.serving.encode_files import encode_files, output_paths, seeded_encoder

    try:
        paths = output_paths(images, out, preview, checkpoint)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        report(f"the output cannot be written: {error}")
        raise typer.Exit(2) from None

    # The limit itself is an error of load_image's; this process is ours to keep quiet.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    settings: dict[str, Any] = {
        "grid": grid_size,
        "interpolation": interpolation.value if interpolation else None,
        "fit": fit.value if fit else None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        target = usable_device(device)
        settings |= {"device": target, "dtype": default_dtype(dtype, target)}
        if checkpoint is None:
            encoder = seeded_encoder(**settings)
        else:
            encoder = load_visual(checkpoint, allow_pickle=allow_pickle, **settings)
        encoder.adapter_index()  # what is wrong with it should not wait for pictures
        if checkpoint is None:
            err_console.print(
                "[yellow]No --checkpoint: a small encoder with random weights (seed 0) stands in. "
                "These tokens carry no meaning.[/]"
            )
        with progress_bar("Encoding", disable=len(images) == 1, unit="pictures") as progress:
            task = progress.add_task("Encoding", total=len(images), waited=0.0)
            failed = encode_files(
                encoder,
                images,
                paths,
                origin=str(checkpoint) if checkpoint else "none: random weights",
                batch_size=batch_size,
                workers=workers,
                preview=preview,
                allow_urls=allow_urls,
                fast_decode=fast_decode,
                on_done=lambda count, waited: progress.update(task, advance=count, waited=waited),
                on_written=lambda message: say(err_console, message),
                on_problem=report,
            )
    except (ValueError, OSError, RuntimeError) as error:  # the last: a backend, or memory
        report(str(error))
        raise typer.Exit(2) from None
    if failed:
        names = ", ".join(failed)
        report(f"{len(failed)} of {len(images)} images were not encoded: {names}")
        raise typer.Exit(1)
