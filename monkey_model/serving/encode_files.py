"""Picture files in, files of visual tokens out: what ``monkey encode`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monkey_model.crop_settings import CropSettings
from monkey_model.files import atomic
from monkey_model.inputs.fetch import shown
from monkey_model.inputs.images import load_image
from monkey_model.serving.crop_pictures import draw_crops
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


@torch.inference_mode()
def encode_files(
    encoder: VisionTransformer,
    images: Sequence[str],
    paths: Sequence[Path],
    *,
    origin: str,
    batch_size: int = 1,
    preview: Path | None = None,
    allow_urls: bool = False,
    fast_decode: bool = False,
    on_done: Callable[[int], None] = lambda count: None,
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
        batch_size: images in one pass.
        preview: PNG of the crops of the first image that can be read.
        allow_urls: whether http(s) locations may be fetched.
        fast_decode: see :meth:`VisionTransformer.encode_images`.
        on_done: called with the number of images that are through, written or not.
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
    enough = crop_settings.canvas_size if fast_decode else None
    failed: list[str] = []
    jobs = list(zip(images, paths, strict=True))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        decoded: list[tuple[str, Path, Tensor]] = []
        for name, path in batch:
            try:
                image = load_image(name, allow_urls=allow_urls, fast_decode=enough)
                decoded.append((name, path, image))
            except (ValueError, OSError) as error:
                failed.append(name)
                on_problem(str(error))
        if decoded:
            crops = encoder.extract_crops([image for *_, image in decoded])
            tokens = encoder.encode_crops(crops)
            if preview is not None:
                picture = draw_crops(crops[: len(adapters)], crop_settings.grid, adapters)
                with atomic(preview) as file:
                    picture.save(file, "PNG")
                on_written(f"crops of {shown(decoded[0][0])} -> {shown(str(preview))}")
                preview = None
            tokens = tokens.unflatten(0, (len(decoded), -1)).flatten(1, 2)
            for (name, path, image), row in zip(decoded, tokens, strict=True):
                size = f"{image.shape[0]}x{image.shape[1]}"
                about = {"image": shown(name), "decoded_size": size, **metadata}
                try:
                    with atomic(path) as file:
                        save_file({"tokens": row.contiguous().cpu()}, file, about)
                except (OSError, SafetensorError) as error:  # the latter: a full disk
                    failed.append(name)
                    on_problem(f"the tokens of {name} cannot be written: {error}")
                    continue
                shape = " x ".join(str(length) for length in row.shape)
                on_written(f"{shown(name)}: {shape} visual tokens -> {shown(str(path))}")
        on_done(len(batch))
    return failed
