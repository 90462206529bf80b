"""What :func:`monkey_kernels.extract_crops` computes, in plain torch.

Stage 1 resizes an image to the canvas. For uint8 it is the ``Image.resize`` of Pillow 13, to the
bit: a horizontal and a vertical pass, each an antialiased filter with 22-bit fixed-point weights
and a result rounded and clamped to 0..255. (Earlier Pillows took the horizontal pass first for
every size; see ``vertical_first``.) The weight matrix of a pass is banded, so the pass is a short
loop of small dense products; in float64 these are exact integers, which keeps Pillow's rounding
even where a value falls on a tie (7/5, the ratio of a 640 pixel side, is full of them).

Stage 2 divides by 255, normalises and cuts the local crops; stage 3 resizes the normalised canvas
to the global crop, without antialias, as upstream does.

Sources: Pillow ``src/libImaging/Resample.c``; upstream ``monkey_model/visual.py`` (``encode``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Mean and standard deviation of CLIP's training images, per channel, on a 0..1 scale.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

INTERPOLATIONS = ("bilinear", "bicubic")
FITS = ("stretch", "crop", "pad")

FILTER_RADIUS = {"bilinear": 1, "bicubic": 2}
WEIGHT_BITS = 22  # Pillow's fixed-point precision for 8-bit images

# torch's uint8 filter has 16-bit weights. Where sides shrink by this much, that changes at most
# 1.7 % of a photo's values, most of them by one level (tests/kernels/test_fast_shrink.py).
_FAST_SHRINK = 2.5

# Output rows of one dense product: wider reads fewer zeros' worth of overlap but more of the band.
_BAND_ROWS = 64


class Box(NamedTuple):
    """A rectangle in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def place(height: int, width: int, canvas: tuple[int, int], fit: str) -> tuple[Box, Box]:
    """The window of the image that is read and the part of the canvas that it fills.

    ``"stretch"`` maps all of the image to all of the canvas. ``"crop"`` reads the largest centred
    window with the canvas's aspect ratio; ``"pad"`` fills the largest centred part of the canvas
    with the image's. Both are rounded to whole pixels (half up), at least one.
    """
    rows, columns = canvas
    source, target = Box(0, 0, height, width), Box(0, 0, rows, columns)
    if fit == "crop":
        h = min(height, max(1, _round_ratio(width * rows, columns)))
        w = min(width, max(1, _round_ratio(height * columns, rows)))
        source = Box((height - h) // 2, (width - w) // 2, h, w)
    elif fit == "pad":
        h = min(rows, max(1, _round_ratio(height * columns, width)))
        w = min(columns, max(1, _round_ratio(width * rows, height)))
        target = Box((rows - h) // 2, (columns - w) // 2, h, w)
    return source, target


def _round_ratio(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def filter_weights(in_size: int, out_size: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Pillow's filter for one axis: first taps [out_size] int64, weights [out_size, taps] float64.

    The weights are multiples of 2**-22; a row's unused taps are 0.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)  # antialias: the filter widens with the pixel it stands for
    support = FILTER_RADIUS[interpolation] * stretch
    centre = (torch.arange(out_size, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).clamp(min=0).floor()
    end = (centre + support + 0.5).floor().clamp(max=in_size)
    tap = first[:, None] + torch.arange(int((end - first).max()), dtype=torch.float64)
    distance = ((tap - centre[:, None] + 0.5) / stretch).abs()
    if interpolation == "bilinear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = torch.where(tap < end[:, None], weight, 0.0)
    fixed = weight / weight.sum(1, keepdim=True) * 2**WEIGHT_BITS
    fixed = torch.trunc(fixed + torch.where(fixed < 0, -0.5, 0.5))
    return first.long(), fixed / 2**WEIGHT_BITS


def _filter_rows(x: Tensor, out_size: int, interpolation: str) -> Tensor:
    """Resize the first dimension of ``x`` [in_size, n] uint8 to ``out_size``, to Pillow's bit."""
    in_size = x.shape[0]
    first, weight = (t.to(x.device) for t in filter_weights(in_size, out_size, interpolation))
    column = first[:, None] + torch.arange(weight.shape[1], device=x.device)
    starts = first.tolist()
    y = x.new_empty(out_size, x.shape[1])
    for row in range(0, out_size, _BAND_ROWS):
        rows = slice(row, min(row + _BAND_ROWS, out_size))
        start = starts[row]
        stop = starts[rows.stop - 1] + weight.shape[1]
        band = weight.new_zeros(rows.stop - row, stop - start)
        band.scatter_(1, column[rows] - start, weight[rows])
        source = x[start : min(stop, in_size)].double()
        y[rows] = (band[:, : source.shape[0]] @ source).add_(0.5).floor_().clamp_(0, 255)
    return y


def _shrinks_fast(image: Tensor, axis: int, out_size: int) -> bool:
    return image.device.type == "cpu" and image.shape[axis] >= _FAST_SHRINK * out_size


def _torch_filter(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    nchw = image.permute(2, 0, 1).unsqueeze(0)
    y = F.interpolate(nchw, (height, width), mode=interpolation, antialias=True)
    return y[0].permute(1, 2, 0)


def _resize_axis(
    image: Tensor, axis: int, out_size: int, interpolation: str, exact: bool
) -> Tensor:
    """One pass over ``image`` [H, W, 3] uint8: axis 0 (vertical) or 1 (horizontal)."""
    in_size = image.shape[axis]
    if in_size == out_size:
        return image
    if not exact and _shrinks_fast(image, axis, out_size):
        size = (out_size, image.shape[1]) if axis == 0 else (image.shape[0], out_size)
        return _torch_filter(image, *size, interpolation)
    rows = image.movedim(axis, 0)
    y = _filter_rows(rows.reshape(in_size, -1), out_size, interpolation)
    return y.view(out_size, *rows.shape[1:]).movedim(0, axis)


def vertical_first(size: tuple[int, int], out_size: tuple[int, int]) -> bool:
    """Pillow's order of the two passes: horizontal first, unless the height shrinks by far more."""
    shrink = size[0] - out_size[0]
    return shrink > max(0, 2 * (size[1] - out_size[1]))


def resize_uint8(
    image: Tensor, size: tuple[int, int], interpolation: str, *, exact: bool = True
) -> Tensor:
    """Resize ``image`` [H, W, 3] uint8 to ``size`` (height, width) as Pillow's ``Image.resize``.

    With ``exact=False`` an axis that shrinks 2.5x or more on the CPU goes through torch's uint8
    filter instead: an order of magnitude faster on a large photo, and at most 2 levels off, in at
    most 1.7 % (bilinear) or 1.2 % (bicubic) of a photo's values.
    """
    height, width = image.shape[:2]
    axes = (0, 1) if vertical_first((height, width), size) else (1, 0)
    if not exact and axes == (1, 0) and all(_shrinks_fast(image, i, size[i]) for i in axes):
        # Both passes in one call, which reads the photo once: half the time of two.
        return _torch_filter(image, *size, interpolation)
    for axis in axes:
        image = _resize_axis(image, axis, size[axis], interpolation, exact)
    return image


def _canvas(
    image: Tensor,
    size: tuple[int, int],
    interpolation: str,
    fit: str,
    mean: Tensor,
    std: Tensor,
    exact: bool,
) -> Tensor:
    """One image as the normalised canvas [3, *size], in the dtype of ``mean`` [3, 1, 1]."""
    is_uint8 = image.dtype == torch.uint8
    height, width = image.shape[:2] if is_uint8 else image.shape[1:]
    source, target = place(height, width, size, fit)
    rows = slice(source.top, source.top + source.height)
    columns = slice(source.left, source.left + source.width)
    inner = (target.height, target.width)
    if is_uint8:
        pixels = resize_uint8(image[rows, columns], inner, interpolation, exact=exact)
        values = pixels.permute(2, 0, 1).to(mean.dtype, memory_format=torch.contiguous_format)
        values = values.div_(255).sub_(mean).div_(std)
    else:
        window = image[None, :, rows, columns].to(mean.dtype)
        # On the CPU torch 2.13 takes the vertical pass over a single column in another layout than
        # it lies in. Transposed, that pass is horizontal, and right.
        one_column = target.width == 1
        window, shape = (window.mT, inner[::-1]) if one_column else (window, inner)
        values = F.interpolate(window, shape, mode=interpolation, antialias=True)[0]
        values = ((values.mT if one_column else values) - mean) / std
    if inner == size:
        return values
    # The mean colour is 0 once normalised.
    bottom = size[0] - target.top - target.height
    right = size[1] - target.left - target.width
    return F.pad(values, (target.left, right, target.top, bottom))


def extract_crops_reference(
    images: Sequence[Tensor],
    grid: tuple[int, int] = (2, 2),
    crop_size: int = 448,
    interpolation: str = "bilinear",
    fit: str = "stretch",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = True,
) -> Tensor:
    """:func:`monkey_kernels.extract_crops` without checks, for images [H, W, 3] uint8 or [3, H, W].

    Computes in float32, or in float64 where ``dtype`` is float64 (for gradcheck). ``exact`` is
    that of :func:`resize_uint8`.
    """
    rows, columns = grid
    size = (rows * crop_size, columns * crop_size)
    device = images[0].device
    compute_dtype = torch.promote_types(dtype, torch.float32)
    mean_t = torch.tensor(mean, dtype=compute_dtype, device=device).view(3, 1, 1)
    std_t = torch.tensor(std, dtype=compute_dtype, device=device).view(3, 1, 1)
    local = rows * columns
    crops = torch.empty(len(images), local + 1, 3, crop_size, crop_size, dtype=dtype, device=device)
    for index, image in enumerate(images):
        canvas = _canvas(image, size, interpolation, fit, mean_t, std_t, exact)
        tiles = canvas.view(3, rows, crop_size, columns, crop_size).permute(1, 3, 0, 2, 4)
        crops[index, :local].unflatten(0, grid).copy_(tiles)
        small = F.interpolate(
            canvas[None], crop_size, mode=interpolation, align_corners=False, antialias=False
        )
        crops[index, local].copy_(small[0])
    return crops.flatten(0, 1)


def extract_crops_backward_reference(
    grad: Tensor,
    image_shape: Sequence[int],
    grid: tuple[int, int],
    crop_size: int,
    interpolation: str,
    fit: str,
    std: Sequence[float],
) -> Tensor:
    """Gradient of one float image [3, H, W] from that of its crops [R*C + 1, 3, S, S].

    The crops are affine in the image, so neither its values nor ``mean`` matter.
    """
    rows, columns = grid
    size = (rows * crop_size, columns * crop_size)
    _, height, width = image_shape
    source, target = place(height, width, size, fit)
    aten = torch.ops.aten
    resize_backward = getattr(aten, f"upsample_{interpolation}2d_backward")
    antialiased_backward = getattr(aten, f"_upsample_{interpolation}2d_aa_backward")

    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    small = grad[-1:].contiguous()
    canvas = resize_backward(small, (crop_size, crop_size), (1, 3, *size), False, None, None)
    tiles = grad[:-1].unflatten(0, grid).permute(2, 0, 3, 1, 4).reshape(1, 3, *size)
    canvas = (canvas + tiles) / grad.new_tensor(std).view(3, 1, 1)
    inner = canvas[
        ...,
        target.top : target.top + target.height,
        target.left : target.left + target.width,
    ].contiguous()
    window = antialiased_backward(
        inner, inner.shape[2:], (1, 3, source.height, source.width), False, None, None
    )
    right, bottom = width - source.left - source.width, height - source.top - source.height
    return F.pad(window[0], (source.left, right, source.top, bottom))
