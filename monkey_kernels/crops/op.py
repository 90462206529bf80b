"""``extract_crops``: the registered op, its gradient, and the checked public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from monkey_kernels import backend
from monkey_kernels.checks import (
    OUTPUT_DTYPES,
    check_choice,
    check_dtype,
    check_grid,
    check_positive_int,
    check_same,
    check_tensor,
)
from monkey_kernels.crops.reference import (
    CLIP_MEAN,
    CLIP_STD,
    FILTER_RADIUS,
    FITS,
    INTERPOLATIONS,
    extract_crops_backward_reference,
    extract_crops_reference,
    place,
)
from monkey_kernels.dispatch import is_plain_call

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Values are counted in int32 within an image (not within a batch).
_MOST_PIXELS = (2**31 - 1) // 3


def _run(
    images: Sequence[Tensor],
    grid: Sequence[int],
    crop_size: int,
    interpolation: str,
    fit: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    settings = (images, (grid[0], grid[1]), crop_size, interpolation, fit, mean, std, dtype)
    if backend.resolve("extract_crops", images[0].device) == "triton":
        # Here alone: the package imports without Triton.
        from monkey_kernels.crops.launch import extract_crops_triton

        return extract_crops_triton(*settings)
    for index, image in enumerate(images):
        if image.is_floating_point() and not bool(torch.isfinite(image).all()):
            raise ValueError(f"images[{index}] must be finite; got NaN or infinity")
    return extract_crops_reference(*settings, exact=False)


_extract_crops = torch.library.custom_op("monkey_kernels::extract_crops", _run, mutates_args=())


@_extract_crops.register_fake
def _(
    images: Sequence[Tensor],
    grid: Sequence[int],
    crop_size: int,
    interpolation: str,
    fit: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    crops = len(images) * (grid[0] * grid[1] + 1)
    return images[0].new_empty((crops, 3, crop_size, crop_size), dtype=dtype)


@torch.library.custom_op("monkey_kernels::extract_crops_backward", mutates_args=())
def _extract_crops_backward(
    grad: Tensor,
    images: Sequence[Tensor],
    grid: Sequence[int],
    crop_size: int,
    interpolation: str,
    fit: str,
    std: Sequence[float],
) -> list[Tensor]:
    return [
        extract_crops_backward_reference(
            image_grad, image.shape, (grid[0], grid[1]), crop_size, interpolation, fit, std
        ).to(image.dtype)
        for image, image_grad in zip(images, grad.chunk(len(images)), strict=True)
    ]


@_extract_crops_backward.register_fake
def _(grad: Tensor, images: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(image) for image in images]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, *settings, _mean, std, _dtype = inputs
    ctx.settings = (*settings, std)
    ctx.save_for_backward(*images)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    images = list(ctx.saved_tensors)
    gradients = _extract_crops_backward(grad.contiguous(), images, *ctx.settings)
    return (gradients, *[None] * 7)


_extract_crops.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.monkey_kernels.extract_crops)
def extract_crops_flop(
    image_shapes: Sequence[Sequence[int]],
    grid: Sequence[int],
    crop_size: int,
    interpolation: str,
    fit: str,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Multiply-adds of the two resampling passes, counted as two operations each."""
    canvas = (grid[0] * crop_size, grid[1] * crop_size)
    flops = 0
    for shape in image_shapes:
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        source, target = place(height, width, canvas, fit)

        def taps(size: int, out_size: int) -> int:
            return math.ceil(2 * FILTER_RADIUS[interpolation] * max(1.0, size / out_size))

        horizontal = source.height * target.width * taps(source.width, target.width)
        vertical = target.height * target.width * taps(source.height, target.height)
        flops += 2 * 3 * (horizontal + vertical)
    return flops


def _check_images(images: Any) -> None:
    """One tensor [B, H, W, 3] uint8 or [B, 3, H, W] float, or a non-empty list without the B."""
    if isinstance(images, Tensor):
        check_tensor("images", images, 4, "[B, H, W, 3] (uint8) or [B, 3, H, W] (float)")
        named = [("images", images)]
    elif isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images must hold at least one image; got an empty list")
        named = [(f"images[{index}]", image) for index, image in enumerate(images)]
        for name, image in named:
            check_tensor(name, image, 3, "[H, W, 3] (uint8) or [3, H, W] (float)")
            check_same(name, image.device, "images[0]", images[0].device, "device")
            check_same(name, image.dtype, "images[0]", images[0].dtype, "dtype")
    else:
        raise TypeError(
            f"images must be a tensor or a list of tensors; got {type(images).__name__}"
        )
    for name, image in named:
        check_dtype(name, image.dtype, (torch.uint8, *FLOAT_DTYPES))
        is_uint8 = image.dtype == torch.uint8
        channels = image.shape[-1 if is_uint8 else -3]
        height, width = image.shape[-3:-1] if is_uint8 else image.shape[-2:]
        if channels != 3:
            layout = "[..., H, W, 3]" if is_uint8 else "[..., 3, H, W]"
            raise ValueError(
                f"{name} must have 3 channels, {layout} for {image.dtype}; got {list(image.shape)}"
            )
        if height == 0 or width == 0:
            raise ValueError(f"{name} must have at least one pixel; got {list(image.shape)}")
        if height * width > _MOST_PIXELS:
            raise ValueError(
                f"{name} must have at most {_MOST_PIXELS} pixels; got {height} x {width}"
            )
        if is_uint8 and image.stride(-1) != 1:
            raise ValueError(
                f"{name} must have its 3 channels next to each other in memory (stride 1); got "
                f"stride {image.stride(-1)}: call .contiguous()"
            )


def _check_colour(name: str, values: Any) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be three numbers; got {values!r}") from None
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} must be three finite numbers; got {values!r}")
    return numbers


def extract_crops(
    images: Tensor | Sequence[Tensor],
    *,
    grid: tuple[int, int] = (2, 2),
    crop_size: int = 448,
    interpolation: str = "bilinear",
    fit: str = "stretch",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Resize images to the canvas, normalise, and cut the R*C local crops and the global one.

    ``canvas = resize(image, (R * crop_size, C * crop_size))``; local crop ``r * C + c`` is a tile
    of ``(canvas / 255 - mean) / std``, and the global crop, the last, is that normalised canvas
    resized to ``crop_size``.

    Args:
        images: uint8 [B, H, W, 3] (0..255), or float [B, 3, H, W] (0..1), or a list of uint8
            [H, W, 3] or of float [3, H, W] tensors whose sizes may differ. One device and one
            dtype. uint8 channels lie next to each other in memory; other strides are free.
        grid: (rows R, columns C) of local crops.
        crop_size: side of a crop in pixels.
        interpolation: ``"bilinear"`` or ``"bicubic"`` (which upstream's checkpoints were trained
            with). Image to canvas is antialiased, canvas to global crop is not, as upstream.
        fit: ``"stretch"`` ignores the aspect ratio (upstream); ``"crop"`` keeps it and reads the
            centred window, in whole pixels, that covers the canvas; ``"pad"`` keeps it and fills
            the rest of the canvas with ``mean``.
        mean: red, green and blue to subtract, on a 0..1 scale.
        std: red, green and blue to divide by, on a 0..1 scale.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [B * (R*C + 1), 3, crop_size, crop_size], contiguous; image b's crops are the rows from
        b * (R*C + 1), local crops row by row, then the global one. Empty for B = 0.

    Raises:
        TypeError: an argument of another type, or a dtype that is not listed above.
        ValueError: another rank or channel count, an image with no pixels, an empty list, images
            on different devices or of different dtypes, uint8 channels with a stride, NaN or
            infinity in a float image (plain torch alone checks it: the kernel would have to
            wait for the GPU, and lets them spread instead), more than 2**31 - 1 values in an
            image, a grid or crop_size that is not positive, an unknown interpolation or fit, three
            numbers missing in mean or std, a std that is not positive.
        RuntimeError: the backend ``"triton"`` was requested and cannot run.

    Numerics:
        uint8 images follow the ``Image.resize`` of Pillow 13, rounding to 0..255 after each of the
        two passes, to the bit, with one exception. On the CPU sides that shrink 2.5x or more take
        a faster filter in plain torch, at most 2 levels off in at most 1.7 % of a photo's values.
        Float images follow ``F.interpolate(antialias=True)`` and are not clamped. All in float32,
        rounded once to ``dtype``. Deterministic. Differentiable in float images.

    Source: upstream ``monkey_model/visual.py``, ``VisionTransformer.encode``.
    """
    _check_images(images)
    rows, columns = check_grid(grid)
    check_positive_int("crop_size", crop_size)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("fit", fit, FITS)
    check_dtype("dtype", dtype, OUTPUT_DTYPES)
    mean, std = _check_colour("mean", mean), _check_colour("std", std)
    if min(std) <= 0:
        raise ValueError(f"std must be positive; got {tuple(std)}")
    if isinstance(images, Tensor):
        if images.shape[0] == 0:
            return images.new_empty((0, 3, crop_size, crop_size), dtype=dtype)
        images = images.unbind(0)
    images = list(images)
    settings = [rows, columns], crop_size, interpolation, fit, mean, std, dtype
    return (_run if is_plain_call(*images) else _extract_crops)(images, *settings)
