"""The one description of an image's crops: from a config, in numbers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from monkey_kernels import extract_crops
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.crop_settings import CropSettings
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.visual import VisionTransformer
from tests.helpers.tiny import VISUAL


def test_the_published_config_is_the_default():
    settings = CropSettings.from_config(MonkeyConfig().visual)
    assert settings == CropSettings() == MonkeyImageProcessor().crop_settings
    assert (settings.crops_per_image, settings.image_span) == (5, 1280)
    assert settings.canvas_size == (896, 896) and settings.interpolation == "bicubic"


def test_numbers_of_another_grid():
    settings = CropSettings.from_config({"grid": [1, 3], "crop_size": 28, "n_queries": 4})
    assert settings.grid == (1, 3) and settings.canvas_size == (28, 84)
    assert (settings.crops_per_image, settings.image_span) == (4, 16)
    image = torch.zeros(9, 9, 3, dtype=torch.uint8)
    crops = extract_crops([image], **settings.cutting)
    assert crops.shape == (settings.crops_per_image, 3, 28, 28)


@pytest.mark.parametrize(
    ("visual", "grid"),
    [
        ({"image_size": 896}, (2, 2)),
        ({"image_size": [448, 1344]}, (1, 3)),
        ({"image_size": 84, "crop_size": 28, "grid": None}, (3, 3)),
        ({"image_size": 56, "crop_size": 28, "grid": [1, 2]}, (1, 2)),
    ],
)
def test_grid_of_a_config(visual, grid):
    """The encoder and whoever reads its config agree, for any canvas."""
    settings = CropSettings.from_config(visual)
    assert settings.grid == grid
    encoder = VisionTransformer(**{**VISUAL, "crop_size": 448, "n_queries": 256, **visual})
    assert encoder.crop_settings == settings


@pytest.mark.parametrize(
    ("visual", "error", "message"),
    [
        ({}, ValueError, "image_size or grid must be given; got neither"),
        ({"image_size": "896"}, TypeError, "image_size must be an int; got str"),
        ({"image_size": [896]}, ValueError, r"a side or \(height, width\); got \[896\]"),
        ({"image_size": 900}, ValueError, "a multiple of crop_size, 448, .* no grid.*; got 900"),
        ({"image_size": 0}, ValueError, "image_size must be positive; got 0"),
        ({"image_size": 896, "crop_size": 0}, ValueError, "crop_size must be positive; got 0"),
        ({"grid": 2}, ValueError, r"grid must be a pair \(rows, columns\); got 2"),
        ({"grid": (2, 2), "n_queries": 5}, ValueError, "n_queries must be a square .*; got 5"),
        ({"grid": (2, 2), "fit": "cover"}, ValueError, "fit must be one of .*'cover'"),
        ({"grid": (2, 2), "interpolation": 3}, ValueError, "interpolation must be one of .*; got"),
    ],
)
def test_refused(visual, error, message):
    with pytest.raises(error, match=message):
        CropSettings.from_config(visual)
