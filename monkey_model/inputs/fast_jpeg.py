"""JPEG files by libjpeg-turbo alone, where it gives Pillow's pixels: twice as fast, without a copy.

Pillow decodes to four bytes per pixel, which are then copied to three. simplejpeg (extra ``jpeg``)
decodes to three, and lets other threads run meanwhile.
"""

from __future__ import annotations

import functools
import io
from typing import IO, Any

import numpy as np
from PIL import Image


def decode_jpeg(image: Image.Image, file: IO[bytes]) -> np.ndarray | None:
    """uint8 [H, W, 3], as stored, of a JPEG that Pillow has opened; None where Pillow is to do it.

    Args:
        image: opened, not loaded. Its header was checked, and says which size there has to be.
        file: from its beginning, seekable.
    """
    decoder = _decoder()
    if decoder is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None  # CMYK is Pillow's: its inverted kinds have no standard
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    file.seek(0)
    try:
        decoded = decoder.decode_jpeg(file.read(), "RGB", buffer=pixels, strict=True)
    except ValueError:
        return None  # damaged: what is still a picture is for Pillow to say
    return pixels if decoded.shape == pixels.shape else None


@functools.cache
def _decoder() -> Any:
    """simplejpeg, if it is installed and its libjpeg-turbo has the pixels of Pillow's.

    Releases differ in how they interpolate the colours of some kinds. So it is tried, once, on each
    kind.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    picture = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)
    picture[20:] = np.linspace(0, 255, 67, dtype=np.uint8)[:, None]  # noise, and a gradient
    kinds = ("444", "422", "420", "440", "411")
    files = [simplejpeg.encode_jpeg(picture, 85, "RGB", kind) for kind in kinds]
    files.append(simplejpeg.encode_jpeg(picture[..., :1].copy(), 85, "GRAY", "Gray"))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", progressive=True)
    files.append(buffer.getvalue())
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        if not np.array_equal(simplejpeg.decode_jpeg(data, "RGB"), expected):
            return None
    return simplejpeg
