"""Picture files in, files of visual tokens out: what ``monkey encode`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monkey_kernels import extract_crops
from monkey_model.crop_settings import CropSettings
from monkey_model.files import atomic
from monkey_model.inputs.fetch import shown
from monkey_model.inputs.images import load_image
from monkey_model.inputs.picture_lists import Picture
from monkey_model.serving.crop_pictures import draw_crops
from monkey_model.serving.pipeline import (
    Device,
    Mark,
    Reserve,
    in_batches,
    read_ahead,
    write_behind,
)
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


def seeded_encoder(device: torch.device, dtype: torch.dtype, **settings: Any) -> VisionTransformer:
    """An encoder of random weights, the same ones every time, with an adapter for each crop."""
    adapters = CropSettings.from_config({**SEEDED_CONFIG, **settings}).crops_per_image - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = VisionTransformer(**SEEDED_CONFIG, lora_repeat_num=adapters, **settings)
    return encoder.to(device, dtype).eval()


def output_paths(
    images: Sequence[str], out: Path | None, preview: Path | None, checkpoint: Path | None = None
) -> list[Path]:
    """Where each image's tokens go, checked before any work is done.

    Args:
        images: paths or addresses.
        out: a ``.safetensors`` file for one image (by default ``tokens.safetensors``), or a folder
            (by default ``tokens``), which is made.
        preview: a ``.png`` file, if one is to be drawn.
        checkpoint: the directory that is read, in which nothing is written.

    Raises:
        OSError: a folder that cannot be made, or takes no files.
        ValueError: another kind of file, or one that would be written over an image, over another
            output or into the checkpoint.
    """
    if len(images) == 1 and (out is None or out.suffix == ".safetensors"):
        paths = [out or Path("tokens.safetensors")]
    else:
        folder = out or Path("tokens")
        if folder.suffix and not folder.is_dir():
            raise ValueError(
                f"--out must be a .safetensors file for one image, or a folder; got {folder}"
            )
        paths = [folder / f"{Path(image).name}.safetensors" for image in images]
    if preview is not None and preview.suffix.lower() != ".png":
        raise ValueError(f"--preview must be a .png file; got {preview}")
    # Nothing is written over an input or another output, however it is spelled.
    owner = {os.path.realpath(image): f"the image {shown(image)}" for image in images}
    outputs = [(path, f"the tokens of {shown(image)}")
               for image, path in zip(images, paths, strict=True)]  # fmt: skip
    if preview is not None:
        outputs.append((preview, "the preview"))
    for path, what in outputs:
        real = os.path.realpath(path)
        if real in owner:
            raise ValueError(f"{what} would be written over {owner[real]}: {path}")
        if checkpoint is not None and Path(real).is_relative_to(os.path.realpath(checkpoint)):
            raise ValueError(f"{what} would be written into the checkpoint {checkpoint}: {path}")
        owner[real] = what
    for path in {path.parent: path for path, _ in outputs}.values():
        with atomic(path, keep=False):
            pass  # the folder is there, or can be made, and takes files
    return paths


@dataclass(frozen=True)
class Row:
    """What came of a picture: tokens, or an error.

    Args:
        picture: which one.
        size: (height, width) in pixels of the decoded picture, None where it could not be read.
        tokens: [crops_per_image * n_queries, output_dim] on the CPU, or None.
        error: why there are none.
    """

    picture: Picture
    size: tuple[int, int] | None = None
    tokens: Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Decoded:
    """A picture as the encoder's device takes it: crops on a CPU, else its pixels."""

    size: tuple[int, int]
    pixels: Tensor


class PictureEncoder:
    """How a picture becomes tokens: on one machine, and on each of a cluster.

    Args:
        encoder: in eval mode.
        allow_urls: whether http(s) locations may be fetched.
        fast_decode: see :meth:`VisionTransformer.encode_images`.
    """

    def __init__(
        self, encoder: VisionTransformer, *, allow_urls: bool = False, fast_decode: bool = False
    ) -> None:
        self.encoder = encoder
        self.device = Device(encoder.proj.device)
        self._cutting = encoder.crop_settings.cutting
        self._loading: dict[str, Any] = {
            "allow_urls": allow_urls,
            "fast_decode": encoder.crop_settings.canvas_size if fast_decode else None,
        }
        side = encoder.crop_settings.crop_size
        self._crop_bytes = encoder.crop_settings.crops_per_image * 3 * side * side * 4

    @torch.inference_mode()
    def decode(self, picture: Picture, reserve: Reserve = lambda size: None) -> Decoded:
        """In any thread. On a CPU the crops are cut here, too: that takes as long as decoding.

        Raises:
            TypeError, ValueError, OSError: it cannot be read.
            RuntimeError: another failure, which names the picture.
        """
        with _naming([picture], but=_UNREADABLE):
            pixels = load_image(picture.source, reserve=reserve, **self._loading)
        size = (pixels.shape[0], pixels.shape[1])
        with _naming([picture]):
            if self.device.device.type != "cpu":
                pixels = self.device.stage(pixels)
                reserve(pixels.nbytes)
                return Decoded(size, pixels)
            reserve(pixels.nbytes + self._crop_bytes)
            crops = extract_crops([pixels], **self._cutting)
            del pixels
            reserve(crops.nbytes)
            return Decoded(size, crops)

    def crops(self, batch: Sequence[Decoded]) -> Tensor:
        """[batch * crops_per_image, 3, crop_size, crop_size], float32, on the encoder's device."""
        pixels = self.device.upload([decoded.pixels for decoded in batch])
        if self.device.device.type == "cpu":
            return pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return extract_crops(pixels, **self._cutting)

    @torch.inference_mode()
    def tokens(self, crops: Tensor) -> Tensor:
        """[batch, crops_per_image * n_queries, output_dim], on the encoder's device."""
        tokens = self.encoder.encode_crops(crops)
        return tokens.view(-1, self.encoder.crop_settings.image_span, tokens.shape[2])


# What load_image raises for a picture; all else would happen to any.
_UNREADABLE = (TypeError, ValueError, OSError)


@contextmanager
def _naming(pictures: Sequence[Picture], but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors, ``but`` those, become RuntimeErrors that say in which work they came up."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        names = ", ".join(shown(picture.id) for picture in pictures)
        raise RuntimeError(f"{names}: {error}") from error


# Rows, and where on the device their work begins and ends, if there is any.
_Batch: TypeAlias = tuple[list[Row], tuple[Mark, Mark] | None]


def encode_pictures(
    encoder: PictureEncoder,
    pictures: Sequence[Picture],
    write: Callable[[Iterator[Row]], None],
    *,
    batch_size: int = 1,
    workers: int | None = None,
    preview: Callable[[Picture, Tensor], None] | None = None,
    on_done: Callable[[int, float], None] = lambda count, waited: None,
) -> None:
    """Encode pictures, which are decoded ahead of the encoder and written behind it.

    In memory at any time: what is read ahead (at most :data:`pipeline.READ_AHEAD_BYTES`, or one
    larger picture), a batch on the device, and three batches of tokens.

    Args:
        encoder: see :class:`PictureEncoder`.
        pictures: in the order of the rows.
        write: gets one row for each picture, in a thread of its own. See
            :func:`monkey_model.serving.pipeline.write_behind`.
        batch_size: pictures in one pass.
        workers: threads that decode; by default one per core, up to 16.
        preview: called with the first picture that can be read, and its crops.
        on_done: called, in the writing thread, with the number of pictures that are handed to
            ``write`` and the share of the time that the device waited.

    Raises:
        RuntimeError: out of memory, or a backend that cannot run; it names pictures.
        OSError, ValueError: what ``write`` and ``preview`` raise.
    """
    device = encoder.device

    def write_batches(batches: Iterator[_Batch]) -> None:
        write(rows_of(batches))

    def rows_of(batches: Iterator[_Batch]) -> Iterator[Row]:
        for rows, marks in batches:
            if marks is not None:
                device.reach(*marks)
            for row in rows:
                yield row
                on_done(1, device.share_waited())

    decoded = read_ahead(pictures, encoder.decode, workers=workers)
    with write_behind(write_batches, 1) as put:
        for batch in in_batches(map(_outcome, decoded), batch_size, lambda row: row[1] is not None):
            rows = [row for row, _ in batch]
            good = [image for _, image in batch if image is not None]
            marks = None
            if good:
                with _naming([row.picture for row, image in batch if image is not None]):
                    start = device.mark()
                    crops = encoder.crops(good)
                    tokens = device.download(encoder.tokens(crops))
                    marks = (start, device.mark())
                if preview is not None:
                    first = next(row.picture for row, image in batch if image is not None)
                    preview(first, crops[: encoder.encoder.crop_settings.crops_per_image])
                    preview = None
                each = iter(tokens)
                rows = [
                    row if image is None else replace(row, size=image.size, tokens=next(each))
                    for row, image in batch
                ]
            put((rows, marks))


def _outcome(read: tuple[Picture, Future[Decoded]]) -> tuple[Row, Decoded | None]:
    picture, future = read
    try:
        return Row(picture), future.result()
    except _UNREADABLE as error:
        return Row(picture, error=str(error)), None


def encode_files(
    encoder: VisionTransformer,
    images: Sequence[str],
    paths: Sequence[Path],
    *,
    origin: str,
    batch_size: int = 1,
    workers: int | None = None,
    preview: Path | None = None,
    allow_urls: bool = False,
    fast_decode: bool = False,
    on_done: Callable[[int, float], None] = lambda count, waited: None,
    on_written: Callable[[str], None] = lambda message: None,
    on_problem: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Write the visual tokens of each image to a file of its own, as ``tokens``.

    The file's metadata says what they were made of: image, decoded_size, checkpoint, grid,
    interpolation, fit, fast_decode.

    Args:
        encoder: in eval mode.
        images: paths or addresses.
        paths: of the files, one for each image; see :func:`output_paths`.
        origin: where the weights are from, for the metadata.
        batch_size: of :func:`encode_pictures`, as are workers and on_done.
        preview: PNG of the crops of the first image that can be read.
        allow_urls: of :class:`PictureEncoder`, as is fast_decode.
        on_written: called with a line about each file.
        on_problem: called with what is wrong with an image, or with its file.

    Returns:
        The images that have no file.

    Raises:
        OSError: the preview cannot be written.
        RuntimeError: out of memory, or a backend that cannot run.
        ValueError: fewer adapters than local crops.
    """
    adapters, crop_settings = encoder.adapter_index(), encoder.crop_settings
    metadata = {
        "checkpoint": shown(origin),
        "grid": "x".join(map(str, crop_settings.grid)),
        "interpolation": crop_settings.interpolation,
        "fit": crop_settings.fit,
        "fast_decode": str(fast_decode).lower(),
    }
    failed: list[str] = []

    def write(rows: Iterator[Row]) -> None:
        for row, path in zip(rows, paths, strict=True):
            name = row.picture.id
            if row.tokens is None or row.size is None:
                failed.append(name)
                on_problem(str(row.error))
                continue
            about = {"image": shown(name), "decoded_size": "x".join(map(str, row.size)), **metadata}
            try:
                with atomic(path) as file:
                    save_file({"tokens": row.tokens.contiguous()}, file, about)
            except (OSError, SafetensorError) as error:  # the latter: a full disk
                failed.append(name)
                on_problem(f"the tokens of {name} cannot be written: {error}")
                continue
            shape = " x ".join(str(length) for length in row.tokens.shape)
            on_written(f"{shown(name)}: {shape} visual tokens -> {shown(str(path))}")

    def draw(picture: Picture, crops: Tensor) -> None:
        if preview is not None:
            with atomic(preview) as file:
                draw_crops(crops, crop_settings.grid, adapters).save(file, "PNG")
            on_written(f"crops of {shown(picture.id)} -> {shown(str(preview))}")

    encode_pictures(
        PictureEncoder(encoder, allow_urls=allow_urls, fast_decode=fast_decode),
        [Picture(name, name, Path(name).name) for name in images],
        write,
        batch_size=batch_size,
        workers=workers,
        preview=draw,
        on_done=on_done,
    )
    return failed
