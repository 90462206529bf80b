"""How an image becomes crops, and how many visual tokens those make: ``CropSettings``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monkey_kernels import FITS, INTERPOLATIONS
from monkey_kernels.checks import check_choice, check_grid, check_int
from monkey_model.families import check_is_monkey

# Of a size in a config, far beyond any encoder's: what torch makes of larger ones overflows.
LARGEST_SIZE = 2**18


@dataclass(frozen=True)
class CropSettings:
    """What the encoder, the model and the processors have to agree on; the defaults are upstream's.

    Args:
        grid: (rows, columns) of local crops; the global one comes after them.
        crop_size: side of a crop in pixels.
        interpolation: ``"bicubic"``, as the published checkpoints were trained, or ``"bilinear"``.
        fit: ``"stretch"`` (upstream), ``"crop"`` or ``"pad"``; see
            :func:`monkey_kernels.extract_crops`.
        n_queries: visual tokens per crop, a square number.

    Raises:
        TypeError: an argument of another type.
        ValueError: a grid, crop_size or n_queries that is not positive, an n_queries that is no
            square, or an unknown interpolation or fit.
    """

    grid: tuple[int, int] = (2, 2)
    crop_size: int = 448
    interpolation: str = "bicubic"
    fit: str = "stretch"
    n_queries: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", check_grid(self.grid))  # JSON has lists
        check_int("crop_size", self.crop_size, least=1, most=LARGEST_SIZE)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("fit", self.fit, FITS)
        check_int("n_queries", self.n_queries, least=1, most=LARGEST_SIZE)
        if math.isqrt(self.n_queries) ** 2 != self.n_queries:
            raise ValueError(f"n_queries must be a square number; got {self.n_queries}")

    @classmethod
    def from_config(cls, visual: Mapping[str, Any]) -> CropSettings:
        """The settings in ``visual`` of a checkpoint's config; other keys are ignored.

        Args:
            visual: the fields above, each with its default. Where ``grid`` is missing or None, it
                is as many crops as the canvas ``image_size`` holds: a side in pixels, or (height,
                width). A grid outranks image_size.

        Raises:
            TypeError, ValueError: as above; neither ``grid`` nor ``image_size``; an image_size that
                is no whole number of crops; the encoder of another family.
        """
        check_is_monkey(visual)
        given = {name: visual[name] for name in cls.__dataclass_fields__ if name in visual}
        if given.get("grid") is None:
            crop_size = given.get("crop_size", cls.crop_size)
            given["grid"] = _grid_of(visual.get("image_size"), crop_size)
        return cls(**given)

    @property
    def crops_per_image(self) -> int:
        """Local crops plus the global one."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the resized image that the local crops tile."""
        return self.grid[0] * self.crop_size, self.grid[1] * self.crop_size

    @property
    def image_span(self) -> int:
        """Visual tokens of an image, and so the positions that it takes in a prompt."""
        return self.crops_per_image * self.n_queries

    @property
    def cutting(self) -> dict[str, Any]:
        """The arguments of :func:`monkey_kernels.extract_crops`."""
        names = ("grid", "crop_size", "interpolation", "fit")
        return {name: getattr(self, name) for name in names}


def _grid_of(image_size: Any, crop_size: Any) -> tuple[int, int]:
    if image_size is None:
        raise ValueError("image_size or grid must be given; got neither")
    sides = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be a side or (height, width); got {image_size!r}")
    for side in sides:
        check_int("image_size", side, least=1, most=LARGEST_SIZE)
    check_int("crop_size", crop_size, least=1)
    if any(side % crop_size for side in sides):
        raise ValueError(
            f"image_size must be a multiple of crop_size, {crop_size}, where no grid is given; "
            f"got {image_size}"
        )
    return sides[0] // crop_size, sides[1] // crop_size
