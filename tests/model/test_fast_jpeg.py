"""JPEG files by simplejpeg: Pillow's pixels and Pillow's errors, or Pillow itself."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from monkey_model.inputs import fast_jpeg, images
from monkey_model.inputs.images import load_image
from tests.helpers.pictures import encoded, exif


@pytest.fixture(autouse=True)
def fresh():
    fast_jpeg._decoder.cache_clear()
    yield
    fast_jpeg._decoder.cache_clear()


def outcome(data: bytes, monkeypatch, *, fast: bool, **options):
    """What load_image makes of a file, and whether simplejpeg decoded it."""
    used = []

    def decode(image, file):
        pixels = fast_jpeg.decode_jpeg(image, file) if fast else None
        used.append(pixels is not None)
        return pixels

    monkeypatch.setattr(images, "decode_jpeg", decode)
    try:
        return load_image(data, **options), used == [True]
    except ValueError as error:
        return str(error), used == [True]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpegs():
    """Sizes about the edges of a block, each kind of colours, quality and layout."""
    for seed, (height, width) in enumerate([(1, 1), (1, 40), (17, 16), (33, 31), (64, 95)]):
        for kind in ("444", "422", "420", "440", "411"):
            yield simplejpeg.encode_jpeg(noise(height, width, seed), 20 + 15 * seed, "RGB", kind)
        picture = Image.fromarray(noise(height, width, seed))
        yield encoded(picture, "JPEG", progressive=True, quality=90)
        yield encoded(picture, "JPEG", keep_rgb=True, restart_marker_blocks=2)
        yield encoded(picture.convert("L"), "JPEG", progressive=bool(seed % 2))
        for orientation in range(1, 9):
            yield encoded(picture, "JPEG", exif=exif(orientation))


def test_pixels_are_pillows(monkeypatch):
    count = 0
    for data in jpegs():
        (ours, fast), (expected, _) = (
            outcome(data, monkeypatch, fast=fast) for fast in (True, False)
        )
        assert fast and torch.equal(ours, expected)
        count += 1
    assert count == 5 * 16


def test_a_picture_of_several_strips_is_turned(monkeypatch):
    for orientation in (3, 6, 8):
        data = encoded(Image.fromarray(noise(70, 900)), "JPEG", exif=exif(orientation))
        (ours, fast), (expected, _) = (
            outcome(data, monkeypatch, fast=fast) for fast in (True, False)
        )
        assert fast and torch.equal(ours, expected)


def test_what_is_damaged_is_pillows_to_judge(monkeypatch):
    """Bytes that are wrong, missing or too many: some make a picture, others do not."""
    random = np.random.default_rng(0)
    whole = encoded(Image.fromarray(noise(40, 50)), "JPEG")
    kinds = set()
    for _ in range(60):
        data = bytearray(whole[: random.integers(len(whole) // 2, len(whole) + 1)])
        for place in random.integers(200, len(data), random.integers(0, 3)):
            data[place] = random.integers(256)
        data += random.bytes(int(random.integers(2)) * 20)
        (ours, _), (expected, _) = (
            outcome(bytes(data), monkeypatch, fast=fast) for fast in (True, False)
        )
        same = ours == expected if isinstance(expected, str) else torch.equal(ours, expected)
        assert same
        kinds.add(type(expected))
    assert kinds == {str, torch.Tensor}


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (encoded(Image.fromarray(noise(20, 20)).convert("CMYK"), "JPEG"), {}),
        (encoded(Image.fromarray(noise(20, 20)), "PNG"), {}),
        (encoded(Image.fromarray(noise(80, 80)), "JPEG"), {"fast_decode": (20, 20)}),
    ],
    ids=["CMYK", "PNG", "reduced"],
)
def test_others_are_pillows(monkeypatch, data, options):
    (ours, fast), (expected, _) = (
        outcome(data, monkeypatch, fast=fast, **options) for fast in (True, False)
    )
    assert not fast and torch.equal(ours, expected)


def test_a_library_of_other_pixels_is_not_used(monkeypatch):
    real = simplejpeg.decode_jpeg
    data = encoded(Image.fromarray(noise(20, 20)), "JPEG")
    assert outcome(data, monkeypatch, fast=True)[1]
    fast_jpeg._decoder.cache_clear()
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **k: real(*a, **{**k, "fastupsample": True})
    )
    assert not outcome(data, monkeypatch, fast=True)[1]


def test_without_the_extra_pillow_decodes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    pixels, fast = outcome(encoded(Image.fromarray(noise(8, 8)), "JPEG"), monkeypatch, fast=True)
    assert not fast and pixels.shape == (8, 8, 3)


def test_a_header_that_says_another_size_is_pillows_to_judge():
    data = encoded(Image.fromarray(noise(8, 8)), "JPEG")
    other = encoded(Image.fromarray(noise(16, 8)), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert fast_jpeg.decode_jpeg(image, io.BytesIO(other)) is None
