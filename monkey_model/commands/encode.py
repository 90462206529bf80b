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
    ShardOption,
    default_dtype,
    err_console,
    one_error,
    parse_pair,
    parse_shard,
    progress_bar,
    report,
    say,
    usable_device,
)
from monkey_model.files import list_problems


class Interpolation(str, Enum):
    bilinear = "bilinear"
    bicubic = "bicubic"


class Fit(str, Enum):
    stretch = "stretch"
    crop = "crop"
    pad = "pad"


class Store(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"
    int8 = "int8"
    pooled = "pooled"


class ShardFormat(str, Enum):
    safetensors = "safetensors"
    parquet = "parquet"


def _parse_grid(text: str) -> tuple[int, int]:
    example = "ROWSxCOLUMNS, such as 2x2"
    rows, columns = parse_pair("--grid", text, "x", example)
    if not rows:
        raise typer.BadParameter(f"--grid must be {example}; got {text!r}")
    return rows, columns


def encode(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="Pictures, folders (with -r), patterns, WebDataset tars, or - for paths on stdin.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Monkey checkpoint directory; without it, random weights.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="One image: a .safetensors file (default tokens.safetensors). Several: a folder "
            "(default tokens) that gets NAME.safetensors for each, or shards."
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Take the pictures in folders.")
    ] = False,
    manifest: Annotated[
        list[Path] | None, typer.Option(help="JSONL or Parquet that lists pictures.")
    ] = None,
    column: Annotated[
        str, typer.Option(help="Of --manifest: paths, or in Parquet also bytes.")
    ] = "image",
    id_column: Annotated[
        str | None, typer.Option(help="Of --manifest: ids. Default: the path, or FILE:ROW.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures in one file. Default: a file for each.")
    ] = None,
    shard_format: Annotated[
        ShardFormat, typer.Option(help="Of the files with several pictures.")
    ] = ShardFormat.safetensors,
    store: Annotated[
        Store | None,
        typer.Option(help="Keep the tokens in fewer bits, or their mean. Default: as computed."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds; skip what is whole.")
    ] = False,
    shard: ShardOption = None,
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
        int | None, typer.Option(min=1, help="Decoding threads. Default: one per core, up to 16.")
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
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    models: Annotated[
        int | None,
        typer.Option(min=1, help="With --ray: processes that hold a model. Default: one per GPU."),
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s) images.")] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Turn pictures into visual tokens: a .safetensors file for each, or shards of many."""
    grid_size = None if grid is None else _parse_grid(grid)
    share = None if shard is None else parse_shard(shard)
    if bool(images) == bool(manifest):
        raise typer.BadParameter("give IMAGE... or --manifest")

    if ray is not None and (share or preview or workers):
        raise typer.BadParameter("--shard, --preview and --workers do not go with --ray")
    if models is not None and ray is None:
        raise typer.BadParameter("--models needs --ray")

    from PIL import Image

    from monkey_model.inputs.picture_lists import list_manifests, list_pictures
    from monkey_model.serving.encode_files import (
        EncoderSource,
        Output,
        PictureEncoder,
        encode_files,
        plan_parts,
    )

    try:
        if manifest:
            pictures = list_manifests(manifest, column=column, id_column=id_column)
        else:
            pictures = list_pictures(images or [], recursive=recursive)
        alone = len(pictures) == 1 and [pictures[0].source] == images
        is_file = alone and not (shard_size or resume or share or ray)
        is_file = is_file and (out is None or out.suffix == ".safetensors")
        output = Output(
            out or Path("tokens.safetensors" if is_file else "tokens"),
            is_file=is_file,
            store=store.value if store else None,
            shard_size=shard_size or (1 if ray else None),
            shard_format="parquet" if ray else shard_format.value,
            share=share,
            resume=resume,
            preview=preview,
        )
        parts = plan_parts(pictures, output, checkpoint)
    except (ValueError, ImportError) as error:
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
    reading = {"allow_urls": allow_urls, "fast_decode": fast_decode}
    if checkpoint is None:
        err_console.print(
            "[yellow]No --checkpoint: a small encoder with random weights (seed 0) stands in. "
            "These tokens carry no meaning.[/]"
        )
    with one_error():
        if ray is not None:
            from monkey_model.serving.encode_on_ray import encode_on_ray
            from monkey_model.serving.on_ray import cluster_device

            target = cluster_device(ray, device)
            source = EncoderSource(checkpoint, default_dtype(dtype, target), settings, allow_pickle)
            outcome = encode_on_ray(
                source,
                pictures,
                output,
                address=ray,
                device=target,
                models=models,
                batch_size=batch_size,
                reading=reading,
                on_ready=lambda count: say(err_console, f"{count} models on {target}, on Ray"),
            )
        else:
            target = usable_device(device)
            source = EncoderSource(checkpoint, default_dtype(dtype, target), settings, allow_pickle)
            encoder = source.load(target)
            with progress_bar("Encoding", disable=len(pictures) == 1, unit="pictures") as progress:
                of_parts = parts[share[0] :: share[1]] if share else parts
                total = sum(len(part.pictures) for part in of_parts)
                task = progress.add_task("Encoding", total=total, waited=0.0)
                outcome = encode_files(
                    PictureEncoder(encoder, **reading),
                    parts,
                    output,
                    origin=source.origin,
                    batch_size=batch_size,
                    workers=workers,
                    on_done=lambda n, waited: progress.update(task, advance=n, waited=waited),
                    on_written=lambda message: say(err_console, message),
                    on_problem=report,
                )
    if outcome.failed or outcome.failed_before:
        names = [*outcome.failed]
        if outcome.failed_before:
            names.append(f"{outcome.failed_before} in earlier runs")
        count = len(outcome.failed) + outcome.failed_before
        names_text = list_problems(names, separator=", ")
        report(f"{count} of {outcome.pictures} images were not encoded: {names_text}")
        raise typer.Exit(1)
