"""``monkey encode``: pictures in, files of visual tokens out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    shown,
    usable_device,
)
from monkey_model.files import atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from monkey_model.visual import VisionTransformer

# A stand-in for people without a checkpoint: the real head widths and token count, few weights.
SEEDED_CONFIG: dict[str, Any] = {
    "image_size": 896,
    "patch_size": 14,
    "width": 208,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 4.9231,
    "n_queries": 256,
    "output_dim": 512,
}


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


def _output_paths(images: Sequence[str], out: Path | None, preview: Path | None) -> list[Path]:
    """Where each image's tokens go, checked before any work is done."""
    if len(images) == 1 and (out is None or out.suffix == ".safetensors"):
        paths = [out or Path("tokens.safetensors")]
    else:
        folder = out or Path("tokens")
        if folder.suffix and not folder.is_dir():
            raise typer.BadParameter(
                f"--out must be a .safetensors file for one image, or a folder; got {folder}"
            )
        paths = [folder / f"{Path(image).name}.safetensors" for image in images]
    if preview is not None and preview.suffix.lower() != ".png":
        raise typer.BadParameter(f"--preview must be a .png file; got {preview}")
    # Nothing is written over an input or another output, however it is spelled.
    owner = {os.path.realpath(image): f"the image {shown(image)}" for image in images}
    outputs = [(path, f"the tokens of {shown(image)}")
               for image, path in zip(images, paths, strict=True)]  # fmt: skip
    if preview is not None:
        outputs.append((preview, "the preview"))
    for path, what in outputs:
        real = os.path.realpath(path)
        if real in owner:
            raise typer.BadParameter(f"{what} would be written over {owner[real]}: {path}")
        owner[real] = what
    for path in {path.parent: path for path, _ in outputs}.values():
        with atomic(path, keep=False):
            pass  # the folder is there, or can be made, and takes files
    return paths


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _build_encoder(
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    settings: dict[str, Any],
) -> VisionTransformer:
    import torch

    from monkey_model.checkpoint import load_visual
    from monkey_model.crop_settings import CropSettings
    from monkey_model.visual import VisionTransformer

    if checkpoint is not None:
        return load_visual(
            checkpoint, dtype=dtype, device=device, allow_pickle=allow_pickle, **settings
        )
    adapters = CropSettings.from_config({**SEEDED_CONFIG, **settings}).crops_per_image - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = VisionTransformer(**SEEDED_CONFIG, lora_repeat_num=adapters, **settings)
    return encoder.to(device, dtype).eval()


def draw_crops(crops: Tensor, grid: tuple[int, int], adapters: Sequence[int | None]) -> Any:
    """A picture of what the model sees: the local crops in place, the global crop beside them.

    Args:
        crops: one image's normalised crops [R*C + 1, 3, S, S].
        grid: (rows R, columns C).
        adapters: the adapter of each crop, None for none.

    Returns:
        A PIL image.
    """
    import torch
    from PIL import Image, ImageDraw, ImageFont

    from monkey_kernels import CLIP_MEAN, CLIP_STD

    rows, columns = grid
    side, gap, bar = crops.shape[-1], 16, 36
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    pixels = ((crops.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    cell = side + bar + gap
    picture = Image.new("RGB", ((columns + 1) * (side + gap) + 2 * gap, rows * cell + gap), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(22)
    for number, (crop, adapter) in enumerate(zip(pixels, adapters, strict=True)):
        is_global = number == rows * columns
        row, column = (0, columns) if is_global else divmod(number, columns)
        x = gap + column * (side + gap) + (gap if is_global else 0)
        y = gap + row * cell
        kind = "global" if is_global else f"row {row}, column {column}"
        label = "no adapter" if adapter is None else f"adapter {adapter}"
        draw.text((x, y + 4), f"crop {number} ({kind}): {label}", fill="black", font=font)
        picture.paste(Image.fromarray(crop.permute(1, 2, 0).numpy()), (x, y + bar))
    return picture


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
    try:
        paths = _output_paths(images, out, preview)
    except OSError as error:
        report(f"the output cannot be written: {error}")
        raise typer.Exit(2) from None

    import torch
    from PIL import Image

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
        encoder = _build_encoder(
            checkpoint, target, default_dtype(dtype, target), allow_pickle, settings
        )
        adapters = encoder.adapter_index()
    except (ValueError, OSError, RuntimeError) as error:
        report(str(error))
        raise typer.Exit(2) from None
    if checkpoint is None:
        err_console.print(
            "[yellow]No --checkpoint: a small encoder with random weights (seed 0) stands in. "
            "These tokens carry no meaning.[/]"
        )

    crop_settings = encoder.crop_settings
    metadata = {
        "checkpoint": shown(str(checkpoint)) if checkpoint else "none: random weights",
        "grid": "x".join(map(str, crop_settings.grid)),
        "interpolation": crop_settings.interpolation,
        "fit": crop_settings.fit,
        "fast_decode": str(fast_decode).lower(),
    }
    failed: list[str] = []
    progress = progress_bar("Encoding", disable=len(images) == 1)
    with progress, torch.inference_mode():
        task = progress.add_task("Encoding", total=len(images))
        for batch in _batches(list(zip(images, paths, strict=True)), batch_size):
            decoded = _decode_batch(batch, encoder, allow_urls, fast_decode, failed)
            if decoded:
                try:
                    crops = encoder.extract_crops([image for *_, image in decoded])
                    tokens = encoder.encode_crops(crops)
                except (ValueError, RuntimeError) as error:  # a backend, or memory
                    report(str(error))
                    raise typer.Exit(2) from None
                if preview is not None:
                    picture = draw_crops(crops[: len(adapters)], crop_settings.grid, adapters)
                    with atomic(preview) as file:
                        picture.save(file, "PNG")
                    say(err_console, f"crops of {shown(decoded[0][0])} -> {shown(str(preview))}")
                    preview = None
                tokens = tokens.unflatten(0, (len(decoded), -1)).flatten(1, 2)
                for (name, path, image), row in zip(decoded, tokens, strict=True):
                    _save(name, path, image, row, metadata, failed)
            progress.advance(task, len(batch))
    if failed:
        names = ", ".join(failed)
        report(f"{len(failed)} of {len(images)} images were not encoded: {names}")
        raise typer.Exit(1)


def _decode_batch(
    batch: Sequence[tuple[str, Path]],
    encoder: VisionTransformer,
    allow_urls: bool,
    fast_decode: bool,
    failed: list[str],
) -> list[tuple[str, Path, Tensor]]:
    """The images that can be read, and where their tokens go; the others are reported."""
    from monkey_model.inputs.images import load_image

    enough = encoder.crop_settings.canvas_size if fast_decode else None
    decoded = []
    for name, path in batch:
        try:
            image = load_image(name, allow_urls=allow_urls, fast_decode=enough)
            decoded.append((name, path, image))
        except (ValueError, OSError) as error:
            failed.append(name)
            report(str(error))
    return decoded


def _save(
    name: str,
    path: Path,
    image: Tensor,
    tokens: Tensor,
    metadata: dict[str, str],
    failed: list[str],
) -> None:
    """Write one image's tokens, or report why not."""
    from safetensors.torch import save_file

    size = f"{image.shape[0]}x{image.shape[1]}"
    metadata = {"image": shown(name), "decoded_size": size, **metadata}
    try:
        with atomic(path) as file:
            save_file({"tokens": tokens.contiguous().cpu()}, file, metadata)
    except OSError as error:
        failed.append(name)
        report(f"the tokens of {name} cannot be written: {error}")
        return
    shape = " x ".join(str(length) for length in tokens.shape)
    say(err_console, f"{shown(name)}: {shape} visual tokens -> {shown(str(path))}")
