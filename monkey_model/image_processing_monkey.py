"""Images to normalised crops in transformers' conventions: ``MonkeyImageProcessor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

# The package's own name for it asks for torchvision in transformers 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from monkey_kernels import CLIP_MEAN, CLIP_STD
from monkey_kernels.checks import check_choice, check_grid, check_positive_int
from monkey_kernels.crops.reference import FITS, INTERPOLATIONS
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.inputs.images import ImageSource, load_crops
from monkey_model.visual import VisionTransformer

# Of transformers' own keyword arguments, those that say where a checkpoint's files are.
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MonkeyImagesKwargs(TypedDict, total=False):
    """What ``from_pretrained`` may override."""

    grid: tuple[int, int]
    crop_size: int
    interpolation: str
    fit: str
    image_mean: Sequence[float]
    image_std: Sequence[float]
    n_queries: int


class MonkeyImageProcessor(BaseImageProcessor):
    """Cuts images into the crops that the model's encoder reads.

    Args:
        grid: (rows, columns) of local crops; the global one comes after them.
        crop_size: side of a crop in pixels.
        interpolation: ``"bicubic"``, as the published checkpoints were trained, or ``"bilinear"``.
        fit: ``"stretch"`` (upstream), ``"crop"`` or ``"pad"``; see
            :func:`monkey_kernels.extract_crops`.
        image_mean: red, green and blue to subtract, on a 0..1 scale.
        image_std: red, green and blue to divide by, on a 0..1 scale.
        n_queries: visual tokens that the model makes of a crop.
        image_processor_type, processor_class: transformers' own keys in what it saves; ignored.

    Raises:
        TypeError: an argument of another type.
        ValueError: a grid, crop_size or n_queries that is not positive, or an unknown
            interpolation or fit.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = MonkeyImagesKwargs  # type: ignore[assignment]

    def __init__(
        self,
        grid: Sequence[int] = (2, 2),
        crop_size: int = 448,
        interpolation: str = "bicubic",
        fit: str = "stretch",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        n_queries: int = 256,
        *,
        image_processor_type: str | None = None,
        processor_class: str | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("crop_size", crop_size)
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        check_choice("fit", fit, FITS)
        check_positive_int("n_queries", n_queries)
        self.grid = check_grid(grid)
        self.crop_size = crop_size
        self.interpolation = interpolation
        self.fit = fit
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.n_queries = n_queries

    @property
    def crops_per_image(self) -> int:
        """Local crops plus the global one."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def image_span(self) -> int:
        """Visual tokens of an image, and so positions that it takes in a prompt."""
        return self.crops_per_image * self.n_queries

    def preprocess(
        self,
        images: ImageSource | Sequence[Any],
        *,
        allow_urls: bool = False,
        device: str | torch.device = "cpu",
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Decode images and cut them into crops.

        Args:
            images: an image of any kind that :func:`monkey_model.inputs.images.load_image` takes,
                or a list of them, nested as you like.
            allow_urls: whether http(s) locations may be fetched.
            device: where the crops are cut, and stay.
            return_tensors: ``"np"`` for an array. By default, and with ``"pt"``, a tensor.

        Returns:
            ``pixel_values`` [images, crops_per_image, 3, crop_size, crop_size], float32, in the
            order of the images, crops in crop order.

        Raises:
            TypeError, ValueError, OSError: an image that cannot be read, by its number.
        """
        crops = load_crops(
            flatten_images(images),
            device=device,
            allow_urls=allow_urls,
            grid=self.grid,
            crop_size=self.crop_size,
            interpolation=self.interpolation,
            fit=self.fit,
            mean=self.image_mean,
            std=self.image_std,
        )
        pixel_values = crops.unflatten(0, (-1, self.crops_per_image))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved settings; of a published checkpoint, which has none, those of its encoder.

        Raises:
            ValueError: no settings, and no ``visual`` in ``config.json``, or one that describes no
                encoder.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        if os.path.isfile(name) or any(
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
            for file in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
        ):
            return super().get_image_processor_dict(name, **kwargs)
        visual = PreTrainedConfig.get_config_dict(name, **hub)[0].get("visual")
        if not isinstance(visual, dict):
            raise ValueError(
                f"{name} must have {PROCESSOR_NAME}, {IMAGE_PROCESSOR_NAME} or an object 'visual' "
                "in config.json; got none"
            )
        try:
            with torch.device("meta"):  # one block is enough to ask
                encoder = VisionTransformer.from_config(visual, layers=1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"'visual' in config.json of {name} does not describe an encoder: {error}"
            ) from None
        settings = {
            "grid": encoder.grid,
            "crop_size": encoder.crop_size,
            "interpolation": encoder.interpolation,
            "fit": encoder.fit,
            "n_queries": encoder.attn_pool.num_queries,
        }
        return settings, kwargs


def flatten_images(images: ImageSource | Sequence[Any]) -> list[ImageSource]:
    """The images of nested lists, in order."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    return [images]  # type: ignore[list-item]


AutoImageProcessor.register(MonkeyConfig, image_processor_classes={"pil": MonkeyImageProcessor})
