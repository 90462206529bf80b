"""Images to normalised crops in transformers' conventions: ``MonkeyImageProcessor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from monkey_kernels import CLIP_MEAN, CLIP_STD
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.crop_settings import CropSettings
from monkey_model.inputs.images import ImageSource, load_crops
from monkey_model.transformers_compat import AutoImageProcessor

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
        grid: of :class:`monkey_model.crop_settings.CropSettings`, as are crop_size, interpolation,
            fit and n_queries.
        image_mean: red, green and blue to subtract, on a 0..1 scale.
        image_std: red, green and blue to divide by, on a 0..1 scale.
        image_processor_type, processor_class: transformers' own keys in what it saves; ignored.

    Raises:
        TypeError, ValueError: those of CropSettings.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = MonkeyImagesKwargs  # type: ignore[assignment]

    def __init__(
        self,
        grid: tuple[int, int] = CropSettings.grid,
        crop_size: int = CropSettings.crop_size,
        interpolation: str = CropSettings.interpolation,
        fit: str = CropSettings.fit,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        n_queries: int = CropSettings.n_queries,
        *,
        image_processor_type: str | None = None,
        processor_class: str | None = None,
    ) -> None:
        super().__init__()
        # Checked, and kept one by one: transformers saves the attributes.
        self.grid = CropSettings(grid, crop_size, interpolation, fit, n_queries).grid
        self.crop_size = crop_size
        self.interpolation = interpolation
        self.fit = fit
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.n_queries = n_queries

    @property
    def crop_settings(self) -> CropSettings:
        """How images become crops."""
        return CropSettings(self.grid, self.crop_size, self.interpolation, self.fit, self.n_queries)

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
        settings = self.crop_settings
        crops = load_crops(
            flatten_images(images),
            device=device,
            allow_urls=allow_urls,
            **settings.cutting,
            mean=self.image_mean,
            std=self.image_std,
        )
        pixel_values = crops.unflatten(0, (-1, settings.crops_per_image))
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
            settings = CropSettings.from_config(visual)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"'visual' in config.json of {name} does not describe an encoder: {error}"
            ) from None
        return asdict(settings), kwargs


def flatten_images(images: ImageSource | Sequence[Any]) -> list[ImageSource]:
    """The images of nested lists, in order."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    return [images]  # type: ignore[list-item]


AutoImageProcessor.register(MonkeyConfig, image_processor_classes={"pil": MonkeyImageProcessor})
