"""Images from anywhere (paths, bytes, Pillow, numpy, torch, web) to tensors that
``monkey_kernels.extract_crops`` takes.

Pillow keeps RGB in four bytes per pixel, so a decoded picture has to be copied once into the three
bytes of the result. It is copied in strips, straight into the result: half the time of
``np.array(image)``, one copy of the picture fewer in memory, and every other step (conversion to
RGB, alpha, 16 bits, EXIF rotation) works on a strip that is still in the cache.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from monkey_kernels import extract_crops
from monkey_model.inputs.fast_jpeg import decode_jpeg
from monkey_model.inputs.fetch import SCHEME, fetch, redact
from monkey_model.inputs.picture_files import (
    check_exif,
    check_opened,
    check_pixels,
    open_file,
    open_picture,
)

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

# Pixels per strip, 8 rows of a 4000x3000 photo: longer strips are hardly faster, and cost memory.
_STRIP_PIXELS = 1 << 15

# Of decoding: Pillow's four, and the result's three.
_BYTES_PER_PIXEL = 7

# EXIF orientation: what turns the picture upright; whether that swaps rows and columns; whether the
# first stored row becomes the last row (or column).
_UPRIGHT: dict[Any, tuple[Image.Transpose | None, bool, bool]] = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, False),
    3: (Image.Transpose.ROTATE_180, False, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False),
    6: (Image.Transpose.ROTATE_270, True, True),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, False),
}

_DTYPES = ("uint8", "uint16", "bool", "float16", "bfloat16", "float32", "float64")


def load_image(
    source: ImageSource,
    *,
    allow_urls: bool = False,
    fast_decode: tuple[int, int] | None = None,
    max_bytes: int = 64 * 2**20,
    timeout: float = 10.0,
    reserve: Callable[[int], None] | None = None,
) -> Tensor:
    """Decode one image to upright uint8 RGB.

    Files follow Pillow: EXIF orientation is applied, alpha is composited on white, 16-bit grey is
    scaled to 8 bits by ``round(v / 257)``, of an animation the first frame is taken, colour
    profiles are ignored.

    Args:
        source: one of

            - a path, or the bytes of an image file: JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, ICO, or
              AVIF where Pillow has it;
            - a string ``http://...`` or ``https://...``, if ``allow_urls``;
            - a Pillow image (of an animation, its current frame), if it is opened from one of
              these formats, or made in memory. Modes ``I`` and ``F`` are grey in 0..65535 and in
              0..1;
            - an array or tensor [H, W] or [H, W, C] with C = 1 (grey), 3 (RGB) or 4 (RGBA), of
              dtype uint8 (0..255), uint16 (0..65535) or bool (black and white);
            - a float array [H, W, 3] or a float tensor [3, H, W], 0..1.
        allow_urls: fetch web addresses. Hosts in loopback, link-local, private and other
            non-public networks are refused all the same, after redirects too.
        fast_decode: (height, width) in pixels that are enough for the caller: a JPEG whose both
            sides are at least twice that is decoded at 1/2, 1/4 or 1/8 of its size, faster and
            less exactly, and never below that size. Ignored for what is no JPEG file.
        max_bytes: most bytes that a web address may send.
        timeout: seconds that a web address may take in all, redirects included.
        reserve: called with the bytes that decoding a file takes at its peak, result included,
            before it takes them. It may wait.

    Returns:
        uint8 [H, W, 3], contiguous, on the CPU, or on the tensor's device if ``source`` is a
        tensor. Float sources: [3, H, W] in their own dtype. An array or tensor that needs no
        conversion is not copied: the result shares its memory.

    Raises:
        TypeError: ``source`` of another type, or of a dtype that is not listed.
        ValueError: not an image, or a damaged, truncated or empty one; another format; not a
            regular file; more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or over a limit of
            :mod:`monkey_model.inputs.picture_files`; another array shape; float values outside
            0..1 or NaN; a web address that is not allowed, or sends more than ``max_bytes``;
            another URL scheme; ``fast_decode``, ``max_bytes`` or ``timeout`` not positive.
        OSError: the file cannot be opened (``FileNotFoundError``, ``IsADirectoryError``, ...), or
            the address cannot be fetched (``TimeoutError`` after ``timeout`` seconds).

    Source: upstream ``monkey_model/visual.py``, ``VisionTransformer.encode``, which converts to
    RGB without EXIF orientation, and drops alpha.
    """
    if fast_decode is not None and not (
        isinstance(fast_decode, tuple) and len(fast_decode) == 2 and min(fast_decode) >= 1
    ):
        raise ValueError(f"fast_decode must be a positive (height, width); got {fast_decode!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive; got {max_bytes}")
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds; got {timeout}")

    if isinstance(source, Tensor):
        return _from_pixels(source, "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, f"Pillow image of mode {source.mode}", None)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"of {len(source)} bytes", fast_decode, reserve)
    if isinstance(source, str) and (match := SCHEME.match(source)):
        name = repr(redact(source[:200]))
        if match[0].lower() not in ("http://", "https://"):
            raise ValueError(f"source must be a path or an http(s) URL; got {name}")
        if not allow_urls:
            raise ValueError(f"source is a URL, and allow_urls is False; got {name}")
        data = fetch(source, name, max_bytes, timeout)
        return _decode(io.BytesIO(data), name, fast_decode, reserve)
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        try:
            with open_file(path) as file:
                return _decode(file, repr(path), fast_decode, reserve)
        except OSError as error:  # OSError picks its subclass by the number
            message = f"source cannot be opened: {error.strerror}"
            raise OSError(error.errno, message, path) from None
    raise TypeError(
        "source must be a path, an http(s) URL, bytes, a PIL.Image.Image, a numpy.ndarray or a "
        f"torch.Tensor; got {type(source).__name__}"
    )


def load_crops(
    images: Sequence[ImageSource],
    *,
    device: str | torch.device,
    allow_urls: bool = False,
    fast_decode: tuple[int, int] | None = None,
    **settings: Any,
) -> Tensor:
    """Decode images and cut them into crops on ``device``.

    Args:
        images: of any kinds and sizes; see :func:`load_image`.
        device: where the crops are cut, and stay.
        allow_urls: of :func:`load_image`, as is ``fast_decode``.
        settings: of :func:`monkey_kernels.extract_crops`.

    Returns:
        [B * crops per image, 3, crop_size, crop_size], as ``extract_crops`` returns them.

    Raises:
        TypeError, ValueError: the errors of both functions, those of an image with its number.
    """
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise TypeError(
            f"images must be a list of images; got {type(images).__name__} (put one image in "
            "a list)"
        )
    decoded = []
    for number, image in enumerate(images):
        try:
            pixels = load_image(image, allow_urls=allow_urls, fast_decode=fast_decode)
        except (TypeError, ValueError) as error:
            # Not type(error): a UnicodeEncodeError, say, takes five arguments.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"images[{number}]: {error}") from error
        decoded.append(pixels.to(device))
    if len({image.dtype for image in decoded}) < 2:
        return extract_crops(decoded, **settings)
    return torch.cat([extract_crops([image], **settings) for image in decoded])


def _decode(
    source: Image.Image | IO[bytes],
    name: str,
    fast_decode: tuple[int, int] | None,
    reserve: Callable[[int], None] | None = None,
) -> Tensor:
    """A file or Pillow image to uint8 [H, W, 3]; ``name`` says in errors which one."""
    try:
        if isinstance(source, Image.Image):
            image = source
            check_opened(image)
        else:
            image = open_picture(source)
        check_pixels(image.height, image.width)
        stored_size = image.size
        if fast_decode is not None and image.format in ("JPEG", "MPO"):
            height, width = fast_decode[::-1] if _orientation(image) >= 5 else fast_decode
            image.draft(None, (width, height))
        if reserve is not None:
            reserve(_BYTES_PER_PIXEL * image.height * image.width)
        if not isinstance(source, Image.Image) and image.size == stored_size:
            pixels = decode_jpeg(image, source)
            if pixels is not None:
                return _turned(pixels, _orientation(image))
        image.load()
        check_pixels(image.height, image.width)  # a header need not tell the truth
        return _copy_pixels(
            image.size, lambda t, b: image.crop((0, t, image.width, b)), _orientation(image)
        )
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files make Pillow's decoders raise nearly anything: OSError, SyntaxError,
        # struct.error, IndexError, zlib.error, ...
        raise ValueError(f"source {name} is not a readable image: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 (upright) where there is none."""
    check_exif(len(image.info.get("exif") or b""))
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, struct.error, TypeError, ValueError, KeyError):
        return 1  # broken metadata say nothing about the pixels
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _turned(pixels: np.ndarray, orientation: int) -> Tensor:
    """Stored uint8 [H, W, 3], turned upright."""
    if orientation not in _UPRIGHT:
        return torch.from_numpy(pixels)
    height, width, _ = pixels.shape
    return _copy_pixels((width, height), lambda t, b: Image.fromarray(pixels[t:b]), orientation)


def _copy_pixels(
    size: tuple[int, int], strip_of: Callable[[int, int], Image.Image], orientation: int
) -> Tensor:
    """The rows of a picture of ``size`` (width, height) to uint8 [H, W, 3], turned upright.

    ``strip_of`` gives those from a top to a bottom, in any mode.
    """
    width, height = size
    if width == 0 or height == 0:
        raise ValueError(f"it has no pixels, but {height} rows and {width} columns")
    turn, swapped, mirrored = _UPRIGHT.get(orientation, (None, False, False))
    pixels = torch.empty((width, height, 3) if swapped else (height, width, 3), dtype=torch.uint8)
    upright = pixels.numpy()
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = strip_of(top, bottom)
        if turn is not None:
            strip = strip.transpose(turn)
        part = slice(height - bottom, height - top) if mirrored else slice(top, bottom)
        upright[(slice(None), part) if swapped else part] = _to_rgb(strip)
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], or [H, W, 1] for grey, of an image of any mode, alpha on white."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"mode F must hold 0..1; got {values.min()}..{values.max()}")
        return np.rint(values * 255).astype(np.uint8)[..., None]
    if image.mode.startswith("I"):  # I, I;16 and its byte orders: Pillow's convert would clip
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode I must hold 0..65535; got {values.min()}..{values.max()}")
        grey = _eight_bits(values).astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        return grey[..., None]
    if image.has_transparency_data:
        if image.mode == "La":  # the one mode with no direct way to RGBA
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(values: Any) -> Any:
    """16-bit values (in a wider dtype) to 0..255, rounded: 65535 = 257 * 255."""
    return (values + 128) // 257


def _from_array(array: np.ndarray) -> Tensor:
    # Checked first: torch's own complaint would not name the argument.
    _check_dtype("array", array.dtype.name)
    if array.dtype.kind == "f" and (array.ndim != 3 or array.shape[2] != 3):
        shape = list(array.shape)
        hint = "; call .transpose(1, 2, 0)" if len(shape) == 3 and shape[0] == 3 else ""
        raise ValueError(f"source float array must be [H, W, 3]; got {shape}{hint}")
    # torch takes native byte order, positive strides and writable memory only; np.require copies
    # only what has another.
    pixels = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    return _from_pixels(pixels.permute(2, 0, 1) if pixels.is_floating_point() else pixels, "array")


def _check_dtype(kind: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"source {kind} must be of dtype {', '.join(_DTYPES)}; got {dtype}")


def _from_pixels(pixels: Tensor, kind: str) -> Tensor:
    """Checked pixels: float [3, H, W] as they are, others as uint8 [H, W, 3]."""
    _check_dtype(kind, str(pixels.dtype).removeprefix("torch."))
    shape = list(pixels.shape)
    if pixels.is_floating_point():
        if pixels.dim() != 3 or shape[0] != 3:
            hint = "; call .permute(2, 0, 1)" if shape[2:] == [3] else ""
            raise ValueError(f"source float {kind} must be [3, H, W]; got {shape}{hint}")
    elif pixels.dim() != 2 and (pixels.dim() != 3 or shape[2] not in (1, 3, 4)):
        turn = "permute" if kind == "tensor" else "transpose"
        hint = f"; call .{turn}(1, 2, 0)" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        raise ValueError(
            f"source {kind} must be [H, W] or [H, W, C] with C = 1, 3 or 4; got {shape}{hint}"
        )
    if pixels.numel() == 0:
        raise ValueError(f"source {kind} must have at least one pixel; got {shape}")
    if pixels.is_floating_point():
        low, high = torch.aminmax(pixels.detach())  # NaN if any value is
        if not (low >= 0 and high <= 1):
            raise ValueError(f"source float {kind} must hold 0..1; got {low:.6g}..{high:.6g}")
        return pixels

    if pixels.dtype == torch.uint16:
        pixels = _eight_bits(pixels.to(torch.int32)).to(torch.uint8)
    elif pixels.dtype == torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    if pixels.dim() == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 4:
        colour, alpha = pixels[..., :3].to(torch.int32), pixels[..., 3:].to(torch.int32)
        # colour * alpha + 255 * (255 - alpha), in place; + 127 rounds: 255 is odd, so no ties.
        colour.sub_(255).mul_(alpha).add_(255 * 255 + 127)
        pixels = colour.div_(255, rounding_mode="floor").to(torch.uint8)
    return pixels.expand(-1, -1, 3).contiguous()
