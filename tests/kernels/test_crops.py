"""extract_crops on the CPU: against Pillow and F.interpolate, and the op around the reference."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from monkey_kernels import CLIP_MEAN, CLIP_STD, extract_crops
from monkey_kernels.crops import reference
from monkey_kernels.crops.reference import extract_crops_reference, place, resize_uint8
from tests.helpers.pictures import needs_pillow_13

MODES = ["bilinear", "bicubic"]
FIXED_SIZES = [(1, 1), (1, 5000), (5000, 1), (896, 896), (3000, 4000), (480, 640), (1512, 2016)]
LEVEL = 1 / 255 / min(CLIP_STD)


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image[: height // 4] = 255  # clamping shows at the extremes
    image[height // 4 : height // 2, : width // 3] = 0
    return image


def random_sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(round(2 ** rng.uniform(0, 11)), round(2 ** rng.uniform(0, 11))) for _ in range(count)]


def pillow_resize(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Pillow, one axis at a time in our order, so that the oracle is the same for any Pillow."""
    picture = Image.fromarray(image.contiguous().numpy())
    resample = Image.Resampling[mode.upper()]
    if reference.vertical_first((image.shape[0], image.shape[1]), size):
        picture = picture.resize((picture.width, size[0]), resample)
    picture = picture.resize((size[1], picture.height), resample)
    return torch.from_numpy(np.array(picture.resize((size[1], size[0]), resample)))


def normalise(canvas: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (canvas.permute(2, 0, 1).float() / 255 - mean) / std


def assert_crops_close(crops: torch.Tensor, canvas: torch.Tensor, mode: str) -> None:
    """Local crops within 2 levels of ``canvas`` [896, 896, 3], 0.5 % off at all; global as said."""
    expected = normalise(canvas)
    tiles = [expected[:, r : r + 448, c : c + 448] for r in (0, 448) for c in (0, 448)]
    difference = (crops[:4] - torch.stack(tiles)).abs()
    assert difference.max() <= 2.01 * LEVEL
    assert (difference > 1e-5).float().mean() <= 0.005
    small = F.interpolate(expected[None], 448, mode=mode, align_corners=False)[0]
    difference = (crops[4] - small).abs()
    assert difference.max() <= 3.5 * LEVEL  # bicubic taps sum to 1.57 in absolute value, squared
    # A value of the global crop reads 4 (bilinear) or 16 (bicubic) of the canvas.
    assert (difference > 1e-5).float().mean() <= 0.005 * (16 if mode == "bicubic" else 4)


@pytest.mark.parametrize("mode", MODES)
def test_resize_is_pillow_to_the_bit(mode):
    for seed, size in enumerate(FIXED_SIZES + random_sizes(20)):
        image = noise(*size, seed)
        for out in ((896, 896), (112, 56)):
            assert torch.equal(resize_uint8(image, out, mode), pillow_resize(image, out, mode)), (
                size
            )


@needs_pillow_13  # whose order depends on the size, to say more than the oracle
@pytest.mark.parametrize("mode", MODES)
def test_order_of_passes_is_pillows(mode):
    for size in [(2300, 500), (1000, 947), (1000, 949), (895, 100), (897, 896), (4000, 3000)]:
        image = noise(*size)
        whole = Image.fromarray(image.numpy()).resize((896, 896), Image.Resampling[mode.upper()])
        assert torch.equal(resize_uint8(image, (896, 896), mode), torch.from_numpy(np.array(whole)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [20, pytest.param(193, marks=pytest.mark.slow)])
def test_op_against_pillow(count, mode):
    for seed, size in enumerate(FIXED_SIZES + random_sizes(count)):
        image = noise(*size, seed)
        crops = extract_crops([image], interpolation=mode)
        assert crops.shape == (5, 3, 448, 448) and crops.is_contiguous()
        assert_crops_close(crops, pillow_resize(image, (896, 896), mode), mode)


def test_planted_half_pixel_shift_is_caught(monkeypatch):
    def shifted(in_size, out_size, interpolation):
        first, weight = right(in_size, out_size, interpolation)
        return (first + 1).clamp(max=in_size - weight.shape[1]), weight

    right = reference.filter_weights
    monkeypatch.setattr(reference, "filter_weights", shifted)
    image = noise(448, 448)  # each canvas pixel is half an image pixel
    with pytest.raises(AssertionError):
        assert_crops_close(extract_crops([image]), pillow_resize(image, (896, 896), "bilinear"), "")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 100), (64, 64), (97, 31)])
def test_float_images_follow_interpolate(mode, size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    crops = extract_crops(image, crop_size=32, interpolation=mode).unflatten(0, (2, 5))
    canvas = F.interpolate(image, (64, 64), mode=mode, antialias=True)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    canvas = (canvas - mean) / std
    whole = torch.cat(
        [torch.cat([crops[:, 0], crops[:, 1]], 3), torch.cat([crops[:, 2], crops[:, 3]], 3)], 2
    )
    torch.testing.assert_close(whole, canvas, rtol=0, atol=1e-5)
    small = F.interpolate(canvas, 32, mode=mode, align_corners=False)
    torch.testing.assert_close(crops[:, 4], small, rtol=0, atol=1e-5)


def test_global_crop_at_one_half():
    image = noise(64, 64)
    crops = extract_crops([image], crop_size=32, interpolation="bilinear")
    canvas = normalise(image)
    expected = F.avg_pool2d(canvas, 2)
    torch.testing.assert_close(crops[4], expected, rtol=0, atol=1e-5)

    crops = extract_crops([image], crop_size=32, interpolation="bicubic")
    taps = torch.tensor([-3.0, 19.0, 19.0, -3.0]) / 32
    kernel = (taps[:, None] * taps).expand(3, 1, 4, 4)
    padded = F.pad(canvas[None], (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded, kernel, stride=2, groups=3)[0]
    torch.testing.assert_close(crops[4], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 2)])
def test_crops_are_row_major(grid):
    rows, columns = grid
    image = noise(rows * 16, columns * 16)
    crops = extract_crops([image], grid=grid, crop_size=16)
    canvas = normalise(image)
    for r in range(rows):
        for c in range(columns):
            tile = canvas[:, r * 16 : r * 16 + 16, c * 16 : c * 16 + 16]
            torch.testing.assert_close(crops[r * columns + c], tile, rtol=0, atol=0)
    assert len(crops) == rows * columns + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(30, 90), (90, 30), (1, 77), (64, 65), (200, 3)])
def test_fit_crop_reads_the_centre(size, mode):
    image = noise(*size)
    source, target = place(*size, (32, 64), "crop")
    assert target == (0, 0, 32, 64)
    top, left, height, width = source
    # The window has the canvas's aspect ratio, touches two borders, and is centred.
    assert abs(height * 64 - width * 32) <= 32 or min(height, width) == 1
    assert height == size[0] or width == size[1]
    assert abs(2 * top + height - size[0]) <= 1 and abs(2 * left + width - size[1]) <= 1
    window = image[top : top + height, left : left + width]
    crops = extract_crops([image], grid=(1, 2), crop_size=32, fit="crop", interpolation=mode)
    expected = extract_crops([window], grid=(1, 2), crop_size=32, interpolation=mode)
    assert torch.equal(crops, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(30, 90), (90, 30), (1, 77), (64, 65), (200, 3)])
def test_fit_pad_fills_with_the_mean(size, mode):
    image = noise(*size)
    source, target = place(*size, (32, 64), "pad")
    assert source == (0, 0, *size)
    top, left, height, width = target
    assert abs(height * size[1] - width * size[0]) <= max(size) or min(height, width) == 1
    assert height == 32 or width == 64
    crops = extract_crops([image], grid=(1, 2), crop_size=32, fit="pad", interpolation=mode)
    canvas = torch.zeros(3, 32, 64)  # the mean colour, normalised
    inner = normalise(pillow_resize(image, (height, width), mode))
    canvas[:, top : top + height, left : left + width] = inner
    got = torch.cat([crops[0], crops[1]], dim=2)
    assert ((got - canvas).abs() > 1e-5).float().mean() <= 0.005
    assert torch.equal(got == 0, canvas == 0)


def test_batch_list_and_strides_agree():
    images = torch.stack([noise(40, 50, seed) for seed in range(3)])
    expected = extract_crops(images, crop_size=16)
    assert torch.equal(extract_crops(list(images), crop_size=16), expected)
    wide = torch.zeros(3, 40, 70, 3, dtype=torch.uint8)
    wide[:, :, 10:60] = images
    assert torch.equal(extract_crops(wide[:, :, 10:60], crop_size=16), expected)
    four = torch.zeros(3, 40, 50, 4, dtype=torch.uint8)
    four[..., :3] = images
    assert torch.equal(extract_crops(four[..., :3], crop_size=16), expected)


def test_ragged_list_is_each_image_alone():
    images = [noise(20, 30), noise(500, 40, 1), noise(1, 1, 2)]
    together = extract_crops(images, crop_size=16)
    alone = [extract_crops([image], crop_size=16) for image in images]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_one_rounding(dtype):
    image = noise(50, 60)
    crops = extract_crops([image], crop_size=32, interpolation="bicubic", dtype=dtype)
    expected = extract_crops([image], crop_size=32, interpolation="bicubic").to(dtype)
    assert crops.dtype == dtype and torch.equal(crops, expected)


def test_half_precision_float_images():
    image = torch.rand(1, 3, 20, 30).half()
    expected = extract_crops(image.float(), crop_size=16)
    assert torch.equal(extract_crops(image, crop_size=16), expected)


def test_custom_mean_and_std():
    image = noise(32, 32)
    crops = extract_crops([image], crop_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    whole = torch.cat([torch.cat([crops[0], crops[1]], 2), torch.cat([crops[2], crops[3]], 2)], 1)
    assert torch.equal(whole, image.permute(2, 0, 1).float() / 255)


def test_empty_batch():
    crops = extract_crops(torch.zeros(0, 9, 9, 3, dtype=torch.uint8), dtype=torch.bfloat16)
    assert crops.shape == (0, 3, 448, 448) and crops.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_gradient_of_float_images(mode, fit):
    image = torch.rand(2, 3, 11, 17, requires_grad=True)
    settings = {"crop_size": 28, "interpolation": mode, "fit": fit}
    crops = extract_crops(image, **settings)
    out_grad = torch.randn_like(crops)
    crops.backward(out_grad)
    x = image.detach().clone().requires_grad_()
    extract_crops_reference(list(x), **settings).backward(out_grad)
    torch.testing.assert_close(image.grad, x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_reference_gradcheck(mode):
    image = torch.rand(3, 7, 5, dtype=torch.float64, requires_grad=True)

    def crops(x):
        return extract_crops_reference(
            [x], crop_size=4, interpolation=mode, fit="pad", dtype=torch.float64
        )

    assert torch.autograd.gradcheck(crops, image)


def op_arguments(images):
    return (images, [2, 2], 14, "bilinear", "stretch", list(CLIP_MEAN), list(CLIP_STD))


@pytest.mark.parametrize("kind", ["uint8", "float", "float with gradient"])
def test_opcheck(kind):
    images = [noise(9, 12), noise(20, 7, 1)]
    if kind != "uint8":
        images = [(image / 255).permute(2, 0, 1).contiguous() for image in images]
    if kind == "float with gradient":
        images = [image.requires_grad_() for image in images]
    op = torch.ops.monkey_kernels.extract_crops
    torch.library.opcheck(op, (*op_arguments(images), torch.float32))


def test_backward_opcheck():
    images = [torch.rand(3, 9, 12), torch.rand(3, 20, 7)]
    op = torch.ops.monkey_kernels.extract_crops_backward
    arguments = op_arguments(images)
    settings = (*arguments[:5], arguments[6])
    torch.library.opcheck(op, (torch.randn(10, 3, 14, 14), *settings))


def test_compile_and_export():
    image = torch.rand(1, 3, 20, 30, requires_grad=True)

    def loss(x):
        crops = extract_crops(x, crop_size=8)
        return (crops * crops).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(image), image)
    (got,) = torch.autograd.grad(compiled(image), image)
    torch.testing.assert_close(got, expected)

    class Module(torch.nn.Module):
        def forward(self, x):
            return extract_crops(x, crop_size=8)

    batch = torch.stack([noise(20, 30), noise(20, 30, 1)])
    program = torch.export.export(Module(), (batch,))
    assert torch.equal(program.module()(batch), extract_crops(batch, crop_size=8))


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        extract_crops([noise(3000, 4000)])
    # 12 MP, bilinear: 9 taps per value of each pass, two operations each.
    horizontal, vertical = 3000 * 896 * 3 * 9, 896 * 896 * 3 * 7
    assert counter.get_total_flops() == 2 * (horizontal + vertical)


GOOD = torch.zeros(4, 4, 3, dtype=torch.uint8)
NAN = torch.full((1, 3, 2, 2), float("nan"))


@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        (GOOD, {}, ValueError, r"images must have 4 dimensions .*got \[4, 4, 3\]"),
        ([GOOD[0]], {}, ValueError, r"images\[0\] must have 3 dimensions .*got \[4, 3\]"),
        ([], {}, ValueError, "at least one image; got an empty list"),
        ("photo.jpg", {}, TypeError, "tensor or a list of tensors; got str"),
        ([GOOD, 7], {}, TypeError, r"images\[1\] must be a tensor .*got int"),
        ([GOOD.int()], {}, TypeError, r"images\[0\] must be one of .*uint8.*got torch.int32"),
        ([GOOD, GOOD.float()], {}, ValueError, r"images\[1\] must have the dtype of images\[0\]"),
        (
            [GOOD, GOOD.to("meta")],
            {},
            ValueError,
            r"images\[1\] must have the device of images\[0\]",
        ),
        ([GOOD.permute(2, 0, 1)], {}, ValueError, r"must have 3 channels, \[\.\.\., H, W, 3\]"),
        ([GOOD.float()], {}, ValueError, r"must have 3 channels, \[\.\.\., 3, H, W\]"),
        ([GOOD[:0]], {}, ValueError, r"at least one pixel; got \[0, 4, 3\]"),
        ([GOOD.permute(2, 0, 1).contiguous().permute(1, 2, 0)], {}, ValueError, "stride 16"),
        (NAN, {}, ValueError, r"images\[0\] must be finite"),
        ([GOOD], {"grid": (0, 2)}, ValueError, "grid rows must be positive; got 0"),
        ([GOOD], {"grid": (2, 1.5)}, TypeError, "grid columns must be an int; got float"),
        ([GOOD], {"grid": 2}, ValueError, "grid must be a pair"),
        ([GOOD], {"crop_size": -1}, ValueError, "crop_size must be positive; got -1"),
        ([GOOD], {"interpolation": "lanczos"}, ValueError, "bilinear, bicubic; got 'lanczos'"),
        ([GOOD], {"fit": "cover"}, ValueError, "stretch, crop, pad; got 'cover'"),
        ([GOOD], {"dtype": torch.int8}, TypeError, "dtype must be one of .*got torch.int8"),
        ([GOOD], {"mean": (0, 0)}, ValueError, r"mean must be three finite numbers; got \(0, 0\)"),
        ([GOOD], {"std": "abc"}, TypeError, "std must be three numbers; got 'abc'"),
        ([GOOD], {"std": (1, 0, 1)}, ValueError, "std must be positive"),
    ],
)
def test_bad_input(images, settings, error, message):
    with pytest.raises(error, match=message):
        extract_crops(images, **settings)
