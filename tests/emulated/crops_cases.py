"""``extract_crops`` as machine code: cases for the emulated GPU, which calls each of CASES.

``guarded`` is the emulator's: a tensor of it lies between pages that may not be touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import guarded
import torch
from torch import Tensor

from monkey_kernels import CLIP_STD, extract_crops, use_backend
from monkey_kernels.crops import launch
from monkey_kernels.crops.reference import extract_crops_reference


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise, at full contrast in one half, that ends at a closed page: it starts anywhere."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image[: height // 2] = image[: height // 2] // 128 * 255
    return guarded.copy(image, alignment=1)


def window(height: int, width: int, left: int, right: int) -> Tensor:
    """A part of a wider picture: its rows start at any address."""
    return photo(height, left + width + right)[:, left : left + width]


def run(images: Sequence[Tensor], **settings: Any) -> Tensor:
    with use_backend("triton"), guarded.outputs():
        crops = extract_crops(images, **settings)
    guarded.check_slack()
    return crops


def to_the_bit(make: Callable[[], list[Tensor]], **settings: Any) -> str:
    """Levels of the local crops are the reference's, which are Pillow's."""
    images = make()
    plain = {**settings, "mean": (0, 0, 0), "std": (1, 1, 1)}
    got, want = run(images, **plain) * 255, extract_crops_reference(images, **plain) * 255
    rows, columns = settings["grid"]
    local = torch.arange(len(got)) % (rows * columns + 1) < rows * columns
    assert torch.equal(got[local].round(), want[local].round()), "levels differ"
    assert (got - want).abs().max() < 1e-3
    # Again, with the tables kept and the kernels launched as they were compiled.
    for image in images:
        image.bitwise_not_()
    got, want = run(images, **plain) * 255, extract_crops_reference(images, **plain) * 255
    assert torch.equal(got[local].round(), want[local].round()), "levels differ the second time"
    launch.prepared.clear()
    guarded.release()
    return f"{want[local].numel()} levels are the reference's"


def near(make: Callable[[], list[Tensor]], **settings: Any) -> str:
    """Within a thousandth of a level of the reference in float64, beyond one rounding."""
    images = make()
    got = run(images, **settings)
    want = extract_crops_reference(images, **{**settings, "dtype": torch.float64})
    eps = torch.finfo(got.dtype).eps
    error = ((got.double() - want).abs() - eps * want.abs()).clamp(min=0) * 255 * min(CLIP_STD)
    assert error.max() < 1e-3, f"{error.max().item():.2g} levels off"  # false for NaN, too
    launch.prepared.clear()
    guarded.release()
    return f"{error.max().item():.1e} levels off"


def ragged() -> list[Tensor]:
    return [photo(33, 29), photo(61, 9, 1), photo(1, 1, 2), window(9, 40, 1, 2)]


def alike() -> list[Tensor]:
    """Rows a multiple of 16 bytes apart: read as vectors, from where the first of them starts."""
    return [photo(20, 32), window(9, 40, 3, 5), window(30, 29, 0, 3)]


def floats(dtype: torch.dtype) -> list[Tensor]:
    images = [photo(31, 23), photo(9, 40, 1)]
    return [guarded.copy((image / 255).permute(2, 0, 1).to(dtype)) for image in images]


SMALL = {"grid": (2, 2), "crop_size": 8}
CASES: dict[str, Callable[[], str]] = {
    "bilinear, ragged": partial(to_the_bit, ragged, interpolation="bilinear", **SMALL),
    "bicubic, ragged": partial(to_the_bit, ragged, interpolation="bicubic", **SMALL),
    "rows alike": partial(to_the_bit, alike, interpolation="bicubic", fit="crop", **SMALL),
    "the centre": partial(to_the_bit, ragged, interpolation="bicubic", fit="crop", **SMALL),
    "a canvas of one pixel": partial(
        to_the_bit, ragged, interpolation="bicubic", grid=(1, 1), crop_size=1
    ),
    "filled up, bfloat16": partial(near, ragged, fit="pad", dtype=torch.bfloat16, **SMALL),
    "grid of 1 x 3, float16": partial(
        near, ragged, grid=(1, 3), crop_size=7, interpolation="bicubic", dtype=torch.float16
    ),
    "float32 images": partial(near, partial(floats, torch.float32), **SMALL),
    "float16 images": partial(
        near, partial(floats, torch.float16), interpolation="bicubic", fit="crop", **SMALL
    ),
}
