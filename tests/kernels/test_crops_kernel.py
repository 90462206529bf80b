"""The Triton kernels of ``extract_crops``: in the interpreter, or on a GPU where there is one."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from monkey_kernels import CLIP_MEAN, CLIP_STD, extract_crops, use_backend
from monkey_kernels.crops import plan
from monkey_kernels.crops.op import _extract_crops
from monkey_kernels.crops.reference import extract_crops_reference, place, vertical_first

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from monkey_kernels.crops import filter_kernel, launch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
GRIDS = ((1, 1), (1, 3), (2, 2), (3, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every buffer that a launcher allocates starts as NaN, or as the largest integer."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        if buffer.device.type == "meta":
            return buffer
        whole = not buffer.is_floating_point()
        return buffer.fill_(torch.iinfo(buffer.dtype).max if whole else float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def photo(height, width, seed=0):
    """Noise at full contrast in one half, and smooth in the other: both 0 and 255 occur."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image[: height // 2] = image[: height // 2] // 128 * 255
    return image.to(DEVICE)


def run(images, **settings):
    with use_backend("triton"):
        return extract_crops(images, **settings)


def levels_off(got, want):
    """Error in steps of 1/255 of the image, beyond one rounding of the dtype: largest, share."""
    step = 1 / (255 * torch.tensor(CLIP_STD, dtype=torch.float64).view(3, 1, 1))
    assert got.isfinite().all(), "not every element was written"
    got, eps = got.cpu().double(), torch.finfo(got.dtype).eps
    error = ((got - want).abs() - eps * want.abs()).clamp(min=0) / step
    return error.max().item(), (error > 0.25).double().mean().item()


def check(images, **settings):
    """The kernel against the exact reference in float64: no level differs."""
    want = extract_crops_reference(
        [image.cpu() for image in images], **{**settings, "dtype": torch.float64}
    )
    worst, share = levels_off(run(images, **settings), want)
    assert worst <= 0.01, f"{worst} levels off, {share:.2%} of values"


def random_case(seed):
    rng = random.Random(seed)

    def side():
        return rng.choice((1, 2, rng.randint(3, 40), rng.randint(3, 90), rng.randint(90, 230)))

    images = [photo(side(), side(), seed + i) for i in range(rng.randint(1, 3))]
    settings = {
        "grid": rng.choice(GRIDS),
        "crop_size": rng.randint(4, 20),
        "interpolation": rng.choice(("bilinear", "bicubic")),
        "fit": rng.choice(("stretch", "crop", "pad")),
        "dtype": rng.choice(DTYPES),
    }
    return images, settings


BLOCKS = [*range(4), *(pytest.param(block, marks=pytest.mark.slow) for block in range(4, 16))]


@pytest.mark.parametrize("block", BLOCKS)
def test_random_cases_agree_with_the_reference(block):
    for seed in range(10 * block, 10 * block + 10):
        images, settings = random_case(seed)
        try:
            check(images, **settings)
        except AssertionError as error:
            sizes = [tuple(image.shape) for image in images]
            raise AssertionError(f"seed {seed}, {sizes}, {settings}: {error}") from error


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_local_and_global_crops_agree_with_pillow(seed):
    images, settings = random_case(seed)
    settings |= {"dtype": torch.float32}
    (rows, columns), size = settings["grid"], settings["crop_size"]
    canvas_size = (rows * size, columns * size)
    mean, std = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    want = []
    for image in images:
        source, target = place(*image.shape[:2], canvas_size, settings["fit"])
        pixels = image.cpu().numpy()[source.top :, source.left :][: source.height, : source.width]
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        # One axis at a time, so that the order does not depend on Pillow's version.
        axes = [(target.width, source.height), (target.width, target.height)]
        if vertical_first(source[2:], target[2:]):
            axes[0] = (source.width, target.height)
        for axis in axes:
            picture = picture.resize(axis, PILLOW[settings["interpolation"]])
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double()
        canvas = torch.zeros(3, *canvas_size, dtype=torch.float64)
        box = canvas[:, target.top :, target.left :][:, : target.height, : target.width]
        box.copy_((values / 255 - mean) / std)
        tiles = canvas.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).flatten(0, 1)
        whole = F.interpolate(canvas[None], size, mode=settings["interpolation"])
        want += [tiles, whole]
    worst, share = levels_off(run(images, **settings), torch.cat(want))
    assert worst <= 0.01, f"{worst} levels off, {share:.2%} of values"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (70, 1), (2, 600), (500, 3), (480, 420)])
def test_extreme_shapes(sizes, interpolation):
    # 480 x 420 to 8 x 8 shrinks 60 times and 52 times.
    check([photo(*sizes)], grid=(2, 2), crop_size=4, interpolation=interpolation)


def test_no_tie_is_rounded_otherwise_than_by_the_reference():
    # At 7/5 many sums are exactly halfway between two levels.
    images = [photo(70, 98)]
    got = run(images, grid=(1, 1), crop_size=50, mean=(0, 0, 0), std=(1, 1, 1))
    want = extract_crops_reference([images[0].cpu()], (1, 1), 50, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal((got.cpu() * 255).round(), (want * 255).round())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype, interpolation):
    images = [photo(37, 53), photo(90, 20)]
    settings = {"crop_size": 14, "interpolation": interpolation}
    exact = extract_crops_reference([i.cpu() for i in images], dtype=torch.float64, **settings)
    torch_error = extract_crops_reference([i.cpu() for i in images], dtype=dtype, **settings)
    torch_error = (torch_error.double() - exact).abs()
    error = (run(images, dtype=dtype, **settings).cpu().double() - exact).abs()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert error.max() <= 2 * torch_error.max() + rounding.max()
    assert error.square().mean() <= (2 * torch_error.square().mean().sqrt() + rounding.mean()) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_float_images(interpolation, fit, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 61, 43), (3, 9, 150), (3, 200, 17)]
    images = [torch.rand(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    images.append(images[0].permute(0, 2, 1)[:, ::2])
    settings = {"grid": (1, 2), "crop_size": 12, "interpolation": interpolation, "fit": fit}
    on_cpu = [image.cpu() for image in images]
    exact = extract_crops_reference(on_cpu, dtype=torch.float64, **settings)
    torch_error = (extract_crops_reference(on_cpu, **settings).double() - exact).abs()
    error = (run(images, **settings).cpu().double() - exact).abs()
    rounding = torch.finfo(torch.float32).eps / 2 * exact.abs().max()
    assert error.max() <= 2 * torch_error.max() + rounding


def test_float_gradient_is_that_of_the_reference():
    x = torch.rand(2, 3, 20, 31, device=DEVICE)
    grad = torch.randn(10, 3, 14, 14, device=DEVICE)
    gradients = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            extract_crops(leaf, crop_size=14).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("as_float", [False, True])
def test_the_registered_op(as_float):
    image = torch.rand(3, 9, 11, device=DEVICE, requires_grad=True) if as_float else photo(9, 11)
    settings = ([1, 1], 14, "bicubic", "pad", list(CLIP_MEAN), list(CLIP_STD), torch.float32)
    with use_backend("triton"):
        torch.library.opcheck(_extract_crops, ([image], *settings))


def test_nan_in_a_float_image_reaches_the_crop():
    image = torch.rand(1, 3, 8, 8, device=DEVICE)
    image[0, 1, 3, 3] = float("nan")
    crops = run(image, grid=(1, 1), crop_size=8)
    assert crops[:, 1, 3, 3].isnan().all()


def strided_views():
    generator = torch.Generator().manual_seed(1)
    rgba = torch.randint(0, 256, (40, 60, 4), dtype=torch.uint8, generator=generator).to(DEVICE)
    rgb = photo(50, 66)
    return {
        "rgba": rgba[..., :3],
        "columns": rgb[:, ::2],
        "rows": rgb[::3],
        "window": rgb[3:40, 5:61],
        "rows at one distance from 16 bytes": photo(50, 64)[3:40, 5:61],
        "transposed": rgb.permute(1, 0, 2),
        "repeated row": rgb[:1].expand(30, -1, -1),
    }


@pytest.mark.parametrize("name", strided_views())
def test_strided_images(name):
    view = strided_views()[name]
    settings = {"crop_size": 9, "fit": "crop"}
    assert torch.equal(run([view], **settings), run([view.contiguous()], **settings))
    check([view], **settings)


def test_batch_tensor_is_a_list_of_its_images():
    batch = torch.stack([photo(31, 44, seed) for seed in range(3)])
    settings = {"crop_size": 8, "grid": (1, 2)}
    assert torch.equal(run(batch, **settings), run(list(batch), **settings))
    assert torch.equal(run(batch[:, ::2], **settings), run(batch[:, ::2].contiguous(), **settings))


def surrounded(image, sentinel, offset):
    """``image`` inside a buffer of ``sentinel``, ``offset`` bytes in, with bytes between rows."""
    height, width, _ = image.shape
    stride = 3 * width + 5
    buffer = torch.full((64 + offset + height * stride,), sentinel, dtype=torch.uint8)
    buffer = buffer.to(DEVICE)
    inside = buffer[32 + offset :].as_strided((height, width, 3), (stride, 3, 1))
    inside.copy_(image)
    return inside


@pytest.mark.parametrize(
    "offset, fit", [*((i, "stretch") for i in range(4)), (1, "crop"), (1, "pad")]
)
def test_bytes_around_an_image_are_never_read_into_a_result(offset, fit):
    images = [photo(33, 29), photo(70, 9), photo(9, 70)]  # the second is vertical first
    settings = {"crop_size": 10, "fit": fit, "interpolation": "bicubic"}
    results = [
        run([surrounded(image, sentinel, offset) for image in images], **settings)
        for sentinel in (0, 255)
    ]
    assert torch.equal(*results)
    assert torch.equal(results[0], run(images, **settings))


def test_images_that_exceed_the_scratch_are_split_over_launches(monkeypatch):
    images = [photo(30, 50, seed) for seed in range(5)]
    whole = run(images, crop_size=8)
    scratch = 3 * 16 * 32  # of an image: 16 columns of 30 lines, padded
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 2 * scratch)
    assert torch.equal(run(images, crop_size=8), whole)
    settings = (torch.uint8, (16, 16), "bilinear", "stretch", (8, 8, 32), (8, 8, 32), 2 * scratch)
    layouts = [plan.layout(image, images[0]) for image in images]
    assert [group.images for group in plan.make_plan(layouts, *settings).groups] == [2, 2, 1]


def count_launches(monkeypatch, name):
    counted, kernel = [], getattr(launch, name)

    class Counted:
        def __getitem__(self, grid):
            counted.append(grid)
            return kernel[grid]

    monkeypatch.setattr(launch, name, Counted())
    return counted


def test_tables_and_filters_are_kept_for_images_that_lie_alike(monkeypatch):
    made = count_launches(monkeypatch, "bands_kernel")
    settings = {"grid": (1, 2), "crop_size": 8}
    batch = torch.stack([photo(31, 44, seed) for seed in range(3)])
    expected = run([photo(31, 44, 3)], **settings)
    for images in (batch, batch.flip(1), batch.clone()):
        check(list(images), **settings)
    assert len(made) == 2  # one image, and three of a batch, wherever the batch lies
    assert torch.equal(run([photo(31, 44, 3)], **settings), expected)
    assert len(made) == 2
    check([photo(31, 44)], interpolation="bicubic", **settings)  # other filters
    check([photo(44, 31)], **settings)  # another size
    check([photo(31, 90)[:, ::2][:, :44].contiguous()[:, :44]], **settings)
    check([photo(31, 50)[:, 3:47]], **settings)  # another stride
    check([photo(31, 44)], grid=(2, 2), crop_size=4)  # another canvas
    assert len(made) == 6


def test_only_so_many_bands_are_kept(monkeypatch):
    made = count_launches(monkeypatch, "bands_kernel")
    run([photo(3, 4)], crop_size=2)
    [first] = launch.prepared.values()
    monkeypatch.setattr(launch, "KEPT_BYTES", 2 * first.bands.nbytes)
    for width in (5, 4, 6, 4, 5):  # 5 gives way to 6, being longer unused than 4
        run([photo(3, width)], crop_size=2)
    assert len(made) == 4
    assert sum(call.bands.nbytes for call in launch.prepared.values()) <= launch.KEPT_BYTES
    monkeypatch.setattr(launch, "KEPT_BYTES", 0)
    run([photo(3, 7)], crop_size=2)
    assert len(launch.prepared) == 1  # what is in use


_filter_value = filter_kernel._filter_value


@triton.jit
def _shifted_filter_value(tap, centre, stretch, end, BICUBIC: tl.constexpr):
    return _filter_value(tap, centre + 0.5, stretch, end, BICUBIC)


def half_pixel_shift(monkeypatch):
    monkeypatch.setattr(filter_kernel, "_filter_value", _shifted_filter_value)


def unmasked_tail(monkeypatch):
    def wider(*args):
        source, target = place(*args)
        return source._replace(width=source.width + 1), target

    monkeypatch.setattr(plan, "place", wider)


def swapped_passes(monkeypatch):
    monkeypatch.setattr(plan, "vertical_first", lambda *args: not vertical_first(*args))


def too_few_taps(monkeypatch):
    most = plan.most_taps
    monkeypatch.setattr(plan, "most_taps", lambda *args: most(*args) - 4)


@pytest.mark.skipif(HAS_GPU, reason="faults are planted in the interpreted kernel")
@pytest.mark.parametrize("fault", [half_pixel_shift, unmasked_tail, swapped_passes, too_few_taps])
def test_planted_faults_are_found(monkeypatch, fault):
    images, settings = [surrounded(photo(60, 47), 255, 0)], {"crop_size": 10}
    check(images, **settings)
    fault(monkeypatch)
    launch.prepared.clear()
    with pytest.raises(AssertionError, match="levels off"):
        check(images, **settings)


BAD_INPUT = {
    "devices": ([photo(2, 2), torch.zeros(2, 2, 3, dtype=torch.uint8, device="meta")], {}),
    "channel stride": ([photo(4, 4).permute(2, 0, 1).contiguous().permute(1, 2, 0)], {}),
    "pixels": ([photo(1, 1).expand(2**16, 2**15, 3)], {}),
    "dtype": ([photo(2, 2).int()], {}),
    "empty list": ([], {}),
}
MESSAGES = {
    "devices": "images.1. must have the device of images.0., .*; got meta",
    "channel stride": "next to each other in memory .stride 1.; got stride 16",
    "pixels": "at most 715827882 pixels; got 65536 x 32768",
    "dtype": "must be one of torch.uint8, .*; got torch.int32",
    "empty list": "at least one image",
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_a_launch(name, monkeypatch):
    monkeypatch.setattr(launch, "prepare", None)
    images, settings = BAD_INPUT[name]
    with pytest.raises((TypeError, ValueError), match=MESSAGES[name]):
        run(images, **settings)


def test_empty_batch():
    batch = torch.zeros(0, 5, 5, 3, dtype=torch.uint8, device=DEVICE)
    assert run(batch, crop_size=28).shape == (0, 3, 28, 28)


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(dtype, interpolation):
    sizes = [(3000, 4000), (2400, 1080), (480, 640), (2017, 1511)]
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    settings = {"interpolation": interpolation, "dtype": dtype}
    got = run(images, **settings)
    want = extract_crops_reference([i.cpu() for i in images], interpolation=interpolation)
    worst, _ = levels_off(got, want.double())
    assert worst <= 0.01


@pytest.mark.gpu
def test_more_than_714_images():
    # 715 * 5 * 3 * 448 * 448 values pass 2**31.
    image = photo(16, 16)
    crops = run([image] * 720, dtype=torch.float16)
    assert torch.equal(crops[-5:], run([image], dtype=torch.float16))
