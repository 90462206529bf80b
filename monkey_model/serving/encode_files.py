"""Picture files in, files of visual tokens out: what ``monkey encode`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from monkey_kernels import extract_crops
from monkey_kernels.checks import check_choice, check_positive_int
from monkey_model.checkpoint import load_visual
from monkey_model.crop_settings import CropSettings
from monkey_model.files import atomic, need_extra
from monkey_model.inputs.fetch import shown
from monkey_model.inputs.images import load_image
from monkey_model.inputs.picture_lists import Picture, is_outside
from monkey_model.inputs.prompts import check_no_surrogates
from monkey_model.serving.crop_pictures import draw_crops
from monkey_model.serving.pipeline import (
    Device,
    Mark,
    Reserve,
    in_batches,
    read_ahead,
    write_behind,
)
from monkey_model.serving.token_files import (
    SHARD_FORMATS,
    STORES,
    Manifest,
    Part,
    Row,
    check_unused,
    weights_mark,
    write_files,
    write_shards,
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


@dataclass(frozen=True)
class Output:
    """Where results go, and in which form.

    Args:
        path: a folder, which is made; or, if ``is_file``, one picture's ``.safetensors`` file.
        is_file: which of them.
        store: of :func:`monkey_model.serving.token_files.pack`.
        shard_size: pictures in one file; None for a file each.
        shard_format: ``"safetensors"`` or ``"parquet"``.
        share: (i, n) where this process does every n-th file, from the i-th.
        resume: go on with what the folder holds.
        preview: a ``.png`` file for the crops of the first picture that can be read.

    Raises:
        ValueError: not one of these.
    """

    path: Path
    is_file: bool = False
    store: str | None = None
    shard_size: int | None = None
    shard_format: str = "safetensors"
    share: tuple[int, int] | None = None
    resume: bool = False
    preview: Path | None = None

    def __post_init__(self) -> None:
        if self.store is not None:
            check_choice("store", self.store, STORES)
        check_choice("shard_format", self.shard_format, SHARD_FORMATS)
        if self.shard_size is not None:
            check_positive_int("shard_size", self.shard_size)
        if self.shard_format == "parquet":
            need_extra("pyarrow.parquet", "parquet", "--shard-format parquet")
        if self.share is not None and not 0 <= self.share[0] < self.share[1]:
            i, n = self.share
            raise ValueError(f"--shard must be I/N with I from 0 to N - 1; got {i}/{n}")
        if self.preview is not None and self.preview.suffix.lower() != ".png":
            raise ValueError(f"--preview must be a .png file; got {self.preview}")
        if self.path.suffix and not self.is_file and not self.path.is_dir():
            raise ValueError(
                f"--out must be a .safetensors file for one image, or a folder; got {self.path}"
            )


def plan_parts(
    pictures: Sequence[Picture], output: Output, checkpoint: Path | None = None
) -> list[Part]:
    """The files to write and the pictures of each, checked before any work is done.

    Args:
        pictures: with ids of their own.
        output: where they go. Parts are the same for all of its shares, which divide them.
        checkpoint: the directory that is read, in which nothing is written.

    Raises:
        OSError: a folder that cannot be made, or takes no files.
        ValueError: a file that would be written over a picture, over
            another output, out of the folder or into the checkpoint; results of an earlier run.
    """
    folder, size = output.path, output.shard_size
    if output.is_file:
        parts = [Part(folder, pictures)]
    elif size is None:
        parts = [Part(folder / f"{picture.name}.safetensors", [picture]) for picture in pictures]
        for picture in pictures:
            if is_outside(picture.name):
                raise ValueError(
                    f"each picture must have a name inside --out; got {picture.name!r} (shards, by "
                    "--shard-size, take any)"
                )
    else:
        starts = range(0, len(pictures), size)
        parts = [
            Part(folder / f"tokens-{n:05d}.{output.shard_format}", pictures[start : start + size])
            for n, start in enumerate(starts)
        ]
    if size is not None and output.shard_format == "parquet":
        for picture in pictures:
            check_no_surrogates("the id of a picture in Parquet", picture.id)
    # Nothing is written over an input or another output, however it is spelled.
    owner = {
        os.path.realpath(picture.source): f"the image {shown(picture.id)}"
        for picture in pictures
        if isinstance(picture.source, str)
    }
    outputs = [
        (part.path, f"the tokens of {shown(part.pictures[0].id)}" if size is None else "a shard")
        for part in parts
    ]
    if output.preview is not None:
        outputs.append((output.preview, "the preview"))
    inside = None if checkpoint is None else os.path.realpath(checkpoint)
    for path, what in outputs:
        real = os.path.realpath(path)
        if real in owner:
            raise ValueError(f"{what} would be written over {owner[real]}: {path}")
        if inside is not None and Path(real).is_relative_to(inside):
            raise ValueError(f"{what} would be written into the checkpoint {checkpoint}: {path}")
        owner[real] = what
    if size is not None:
        check_unused(folder, resume=output.resume, share=output.share)
    places = {folder / "x"} if not output.is_file else {folder}
    for path in places | ({output.preview} if output.preview else set()):
        with atomic(path, keep=False):
            pass  # the folder is there, or can be made, and takes files
    return parts


@dataclass(frozen=True)
class Decoded:
    """A picture as the encoder's device takes it: crops on a CPU, else its pixels."""

    size: tuple[int, int]
    pixels: Tensor


@dataclass(frozen=True)
class EncoderSource:
    """Which encoder, for every process that loads it.

    Args:
        checkpoint: directory; None for random weights.
        dtype: of weights and arithmetic.
        settings: grid, interpolation and fit, where they are not the checkpoint's.
        allow_pickle: of :func:`monkey_model.checkpoint.load_visual`.
    """

    checkpoint: Path | None
    dtype: torch.dtype
    settings: Mapping[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False

    @property
    def origin(self) -> str:
        """Where the weights are from, in words."""
        return str(self.checkpoint) if self.checkpoint else "none: random weights"

    def load(self, device: torch.device) -> VisionTransformer:
        """In eval mode.

        Raises:
            OSError, ValueError: those of load_visual; fewer adapters than local crops.
        """
        if self.checkpoint is None:
            encoder = seeded_encoder(device, self.dtype, **self.settings)
        else:
            encoder = load_visual(
                self.checkpoint, device=device, dtype=self.dtype,
                allow_pickle=self.allow_pickle, **self.settings,
            )  # fmt: skip
        encoder.adapter_index()  # what is wrong with it should not wait for pictures
        return encoder


class PictureReader:
    """How a picture becomes what an encoder on some device takes.

    Args:
        crop_settings: the encoder's.
        device: of the encoder. On a CPU the crops are cut here, too: that takes as long as
            decoding. Other devices get the pixels, on CUDA from memory that is pinned.
        allow_urls: whether http(s) locations may be fetched.
        fast_decode: see :meth:`VisionTransformer.encode_images`.
    """

    def __init__(
        self,
        crop_settings: CropSettings,
        device: torch.device,
        *,
        allow_urls: bool = False,
        fast_decode: bool = False,
        pin: bool = True,
    ) -> None:
        self.fast_decode = fast_decode
        self._cut = device.type == "cpu"
        self._pin = pin and device.type == "cuda"
        self._cutting = crop_settings.cutting
        self._loading: dict[str, Any] = {
            "allow_urls": allow_urls,
            "fast_decode": crop_settings.canvas_size if fast_decode else None,
        }
        side = crop_settings.crop_size
        self._crop_bytes = crop_settings.crops_per_image * 3 * side * side * 4

    @torch.inference_mode()
    def decode(self, picture: Picture, reserve: Reserve = lambda size: None) -> Decoded:
        """In any thread.

        Raises:
            TypeError, ValueError, OSError: it cannot be read.
            RuntimeError: another failure, which names the picture.
        """
        with _naming([picture], but=UNREADABLE):
            pixels = load_image(picture.read(), reserve=reserve, **self._loading)
        size = (pixels.shape[0], pixels.shape[1])
        with _naming([picture]):
            if not self._cut:
                pixels = pixels.pin_memory() if self._pin else pixels
                reserve(pixels.nbytes)
                return Decoded(size, pixels)
            reserve(pixels.nbytes + self._crop_bytes)
            crops = extract_crops([pixels], **self._cutting)
            del pixels
            reserve(crops.nbytes)
            return Decoded(size, crops)


class PictureEncoder:
    """How a picture becomes tokens: on one machine, and on each of a cluster.

    Args:
        encoder: in eval mode.
        reading: allow_urls and fast_decode of :class:`PictureReader`.
    """

    def __init__(self, encoder: VisionTransformer, **reading: bool) -> None:
        self.encoder = encoder
        self.device = Device(encoder.proj.device)
        self.reader = PictureReader(encoder.crop_settings, self.device.device, **reading)

    def settings(self, origin: str, output: Output) -> dict[str, Any]:
        """What makes the numbers in a file of results what they are."""
        crop_settings = self.encoder.crop_settings
        return {
            "checkpoint": shown(origin),
            "weights": weights_mark(self.encoder),
            "grid": "x".join(map(str, crop_settings.grid)),
            "crop_size": crop_settings.crop_size,
            "interpolation": crop_settings.interpolation,
            "fit": crop_settings.fit,
            "fast_decode": str(self.reader.fast_decode).lower(),
            "dtype": str(self.encoder.proj.dtype).removeprefix("torch."),
            "store": output.store or "as computed",
            "shard_size": output.shard_size,
            "shard_format": output.shard_format,
        }

    def crops(self, batch: Sequence[Decoded]) -> Tensor:
        """[batch * crops_per_image, 3, crop_size, crop_size], float32, on the encoder's device."""
        pixels = self.device.upload([decoded.pixels for decoded in batch])
        if self.device.device.type == "cpu":
            return pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return extract_crops(pixels, **self.encoder.crop_settings.cutting)

    @torch.inference_mode()
    def tokens(self, crops: Tensor) -> Tensor:
        """[batch, crops_per_image * n_queries, output_dim], on the encoder's device."""
        tokens = self.encoder.encode_crops(crops)
        return tokens.view(-1, self.encoder.crop_settings.image_span, tokens.shape[2])


# What load_image raises for a picture; all else would happen to any.
UNREADABLE = (TypeError, ValueError, OSError)


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

    decoded = read_ahead(pictures, encoder.reader.decode, workers=workers)
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
    except UNREADABLE as error:
        return Row(picture, error=str(error)), None


@dataclass(frozen=True)
class Outcome:
    """How many pictures there were, and which have no tokens (those of earlier runs by number)."""

    pictures: int
    failed: list[str]
    failed_before: int


def encode_files(
    encoder: PictureEncoder,
    parts: Sequence[Part],
    output: Output,
    *,
    origin: str,
    batch_size: int = 1,
    workers: int | None = None,
    on_done: Callable[[int, float], None] = lambda count, waited: None,
    on_written: Callable[[str], None] = lambda message: None,
    on_problem: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Write the visual tokens of pictures to files; see :mod:`monkey_model.serving.token_files`.

    A file's metadata says what they were made of: checkpoint, weights, grid, crop_size,
    interpolation, fit, fast_decode, dtype, store.

    Args:
        encoder: see :class:`PictureEncoder`.
        parts: of :func:`plan_parts`.
        output: where they go.
        origin: where the weights are from, for the metadata.
        batch_size: of :func:`encode_pictures`, as is workers.
        on_done: called with the number of pictures that are through, written or not, and the share
            of the time that the device waited.
        on_written: called with a line about each file.
        on_problem: called with what is wrong with a picture, or with its file's name.

    Raises:
        OSError: the disk is full, or the like. What was written is whole.
        RuntimeError: out of memory, or a backend that cannot run.
        ValueError: fewer adapters than local crops; results of other settings or pictures.
    """
    adapters, grid = encoder.encoder.adapter_index(), encoder.encoder.crop_settings.grid
    settings = encoder.settings(origin, output)
    i, n = output.share or (0, 1)
    parts = parts[i::n]
    pictures = sum(len(part.pictures) for part in parts)
    manifest, left, failed_before = None, parts, 0
    if not output.is_file:
        manifest = Manifest(output.path, settings, share=output.share)
        left = manifest.left(parts) if output.resume else parts
        before = {part.path for part in left}
        failed_before = manifest.errors([part for part in parts if part.path not in before])
        manifest.begin(left)
    todo = [picture for part in left for picture in part.pictures]
    on_done(pictures - len(todo), 0.0)
    failed: list[str] = []

    def write(rows: Iterator[Row]) -> None:
        if output.shard_size is not None and manifest is not None:
            write_shards(
                rows, left, manifest,
                store=output.store, on_written=on_written, on_problem=problem,
            )  # fmt: skip
            return
        shards = ("shard_size", "shard_format")
        metadata = {key: str(value) for key, value in settings.items() if key not in shards}
        write_files(
            rows, left, manifest,
            store=output.store, metadata=metadata, on_written=on_written, on_problem=problem,
        )  # fmt: skip

    def problem(id: str, message: str) -> None:
        failed.append(id)
        on_problem(message)

    def draw(picture: Picture, crops: Tensor) -> None:
        if output.preview is not None:
            with atomic(output.preview) as file:
                draw_crops(crops, grid, adapters).save(file, "PNG")
            on_written(f"crops of {shown(picture.id)} -> {shown(str(output.preview))}")

    encode_pictures(
        encoder,
        todo,
        write,
        batch_size=batch_size,
        workers=workers,
        preview=draw,
        on_done=on_done,
    )
    return Outcome(pictures, failed, failed_before)
